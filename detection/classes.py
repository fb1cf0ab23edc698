"""Names of classes: COCO's eighty, which names mean the same, and what carries over from one list to another.

A detector that was trained on other classes has already learned those that both lists name.
"""

from collections import Counter
from collections.abc import Sequence

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

COCO_CLASSES = tuple(category["name"] for category in COCO_CATEGORIES if category["isthing"])
"""The 80 classes of COCO's detection task, in the order of their ids."""

SYNONYMS = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
"""VOC's words, without blanks, and COCO's for the same things."""


def canonical(name: str) -> str:
    """What a class is known by: without case, blanks, hyphens and underscores, a synonym as COCO's word."""
    word = "".join(character for character in name.lower() if character not in " -_")
    return SYNONYMS.get(word, word)


def pair_classes(old: Sequence[str], new: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of indices (in `old`, in `new`) of the classes that both lists name, in the order of `new`.

    They have the same name, or else are the only further ones of their lists that mean the same.
    """
    places = {name: place for place, name in enumerate(old)}
    pairs = [(places[name], index) for index, name in enumerate(new) if name in places]
    others, wanted = _others(old, new), _others(new, old)
    pairs += [(others[word], wanted[word]) for word in others.keys() & wanted.keys()]
    return sorted(pairs, key=lambda pair: pair[1])


def in_words_of(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names, spelled as in `words` where that list has the same class."""
    known = {index: words[place] for place, index in pair_classes(words, names)}
    return [known.get(index, name) for index, name in enumerate(names)]


def _others(names: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """By meaning, where the classes are that `known` does not name as they are; none that share a meaning."""
    words = {place: canonical(name) for place, name in enumerate(names) if name not in known}
    count = Counter(words.values())
    return {word: place for place, word in words.items() if count[word] == 1}


def is_class_layer(name: str) -> bool:
    """Whether a parameter's shape depends on the number of classes."""
    return "box_predictor" in name or ".prediction" in name


def carry_over(name: str, value: Tensor, own: Tensor, old: Sequence[str], new: Sequence[str]) -> Tensor | None:
    """A parameter of a class layer for other classes: the rows of those named in both, the rest as in `own`.

    What does not depend on the class, YOLOv3's box and objectness and Faster R-CNN's background, is taken over too. So
    are the box deltas of a single class for another single class: they have the shape of class-agnostic ones.

    Args:
        name: of the parameter.
        value: for the classes `old`.
        own: for the classes `new`.
        old: names of the classes that `value` predicts.
        new: names of the classes to predict.

    Returns:
        A tensor like `own`; None where the layers differ in more than their classes.
    """
    columns: tuple[int, ...] = ()
    if ".prediction" in name:  # box, objectness and classes of each anchor
        groups, head, tail = -1, 5, 0
    elif "cls_score" in name:  # classes and background
        groups, head, tail = 1, 0, 1
    elif len(value) == len(own) == 4:  # one box for all classes
        return value
    else:  # a box for each class
        groups, head, tail, columns = 1, 0, 0, (4,)
    try:
        before, after = (
            tensor.reshape(groups, head + len(classes) + tail, *columns, *tensor.shape[1:])
            for tensor, classes in ((value, old), (own.clone(), new))
        )
    except RuntimeError:  # no such number of rows
        return None
    if before.shape[0] != after.shape[0] or before.shape[2:] != after.shape[2:]:
        return None
    after[:, :head] = before[:, :head]
    after[:, head + len(new) :] = before[:, head + len(old) :]
    for here, there in pair_classes(old, new):
        after[:, head + there] = before[:, head + here]
    return after.reshape(own.shape)
