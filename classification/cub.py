"""CUB-200-2011: its index files, checked against one another.

The official layout, 200 classes, 5,994 training and 5,794 test images:

    CUB_200_2011/
        classes.txt               1 001.Black_footed_Albatross
        images.txt                1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
        image_class_labels.txt    1 1
        train_test_split.txt      1 0          (1: training, 0: test)
        images/001.Black_footed_Albatross/...

Any other folder in this layout is read as well, with any number of classes. So is a root without it that holds `train/`
and `test/` (or `val/`, `valid/`), each with one folder of photographs per class, or that holds such class folders
itself: then a fifth of each class is drawn as the test split.

Source: C. Wah, S. Branson, P. Welinder, P. Perona, S. Belongie. The Caltech-UCSD Birds-200-2011 Dataset. 2011.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.images import SUFFIXES, is_of_a_program

FOLDER = "CUB_200_2011"
INDICES = ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt")
TEST_SHARE = 0.2  # of a tree that has no split


class Bird(NamedTuple):
    """One photograph: where it lies and its class, counted from 0."""

    path: Path
    label: int


@dataclass(frozen=True)
class Cub:
    """The data set: class names without their numbers, in the order of the labels, and the official split."""

    class_names: list[str]
    train: list[Bird]
    test: list[Bird]


def read_cub(root: Path) -> Cub:
    """Reads the four index files under `root/CUB_200_2011`, or the class folders of a root without it.

    Class folders without a split get a drawn one: the same for the same files, whatever the training seed.

    Raises:
        UserError: a file is missing or malformed, the files disagree, an image is missing, or a split is empty.
    """
    if is_folder_tree(root):
        return _read_folders(root) if (root / "train").is_dir() else _divide_folders(root)
    cub = read_indices(root / FOLDER)
    birds = [*cub.train, *cub.test]
    if missing := [bird.path for bird in birds if not bird.path.is_file()]:
        raise UserError(
            f"{missing[0]}: no such image ({len(missing)} of {len(birds)} missing); images.txt names it:"
            " unpack CUB_200_2011.tgz again"
        )
    return cub


def read_indices(folder: Path) -> Cub:
    """Reads the four index files in a folder; the images themselves need not be there.

    Raises:
        UserError: a file is missing or malformed, the files disagree, or a split is empty.
    """
    classes, images, labels, split = (_read_index(folder / name) for name in INDICES)
    if sorted(classes, key=int) != [str(number) for number in range(1, len(classes) + 1)]:
        raise UserError(f"{folder / 'classes.txt'}: expected the class numbers 1 to {len(classes)}, each once")
    for name, index in (("image_class_labels.txt", labels), ("train_test_split.txt", split)):
        if unmatched := images.keys() ^ index.keys():
            raise UserError(
                f"{folder / name}: {len(index)} images, but images.txt has {len(images)}; image {min(unmatched)} is in"
                " only one of them: unpack CUB_200_2011.tgz again"
            )

    birds: dict[str, list[Bird]] = {"0": [], "1": []}
    for image, name in images.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"{folder / 'images.txt'}: image {image} is {name}: expected a path inside images/")
        if labels[image] not in classes:
            raise UserError(
                f"{folder / 'image_class_labels.txt'}: image {image} has class {labels[image]}, expected one of the"
                f" {len(classes)} in classes.txt"
            )
        if relative.parent.name != classes[labels[image]]:
            raise UserError(
                f"{folder / 'image_class_labels.txt'}: image {image} ({name}) has class {classes[labels[image]]}:"
                " the index files are not of one edition; unpack CUB_200_2011.tgz again"
            )
        if split[image] not in birds:
            raise UserError(
                f"{folder / 'train_test_split.txt'}: image {image} has {split[image]!r},"
                " expected 1 (training) or 0 (test)"
            )
        birds[split[image]].append(Bird(folder / "images" / relative, int(labels[image]) - 1))

    for part, flag in (("training", "1"), ("test", "0")):
        if not birds[flag]:
            raise UserError(
                f"{folder / 'train_test_split.txt'}: no {part} images; expected some lines ending in {flag}"
            )
    names = [re.sub(r"^\d+\.(?=.)", "", classes[str(number)]) for number in range(1, len(classes) + 1)]
    return Cub([name.replace("_", " ") for name in names], birds["1"], birds["0"])


def is_folder_tree(root: Path) -> bool:
    """Whether a root has no `CUB_200_2011/`, but `train/` or several class folders with photographs."""
    return not (root / FOLDER).is_dir() and ((root / "train").is_dir() or len(_classes_with_images(root)) > 1)


def _classes_with_images(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(child.name for child in folder.iterdir() if _is_class(child) and any(map(_is_image, child.glob("*"))))


def _is_class(folder: Path) -> bool:
    return folder.is_dir() and not is_of_a_program(folder.name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _divide_folders(root: Path) -> Cub:
    names = _classes_with_images(root)
    birds = [
        Bird(path, n) for n, name in enumerate(names) for path in sorted(filter(_is_image, (root / name).glob("*")))
    ]
    try:
        train, test = hold_out(birds, TEST_SHARE, seed=0)
    except UserError as error:
        raise UserError(f"{root}: no class has two images, so that none can be tested on; expected more") from error
    return Cub(names, train, test)


def _read_folders(root: Path) -> Cub:
    """Reads `train/CLASS/*` and `test/CLASS/*` (or `val/`, `valid/`): the classes are the sorted names of train's."""
    test = next((root / name for name in ("test", "val", "valid") if (root / name).is_dir()), None)
    if test is None:
        raise UserError(f"{root}: train/ without test/ or val/; expected both, each with a folder of images a class")
    names = sorted(child.name for child in (root / "train").iterdir() if _is_class(child))
    if strange := sorted({child.name for child in test.iterdir() if _is_class(child)} - set(names)):
        raise UserError(f"{test / strange[0]}: no class of {root / 'train'}; expected {', '.join(names[:5])}, ...")
    parts = []
    for part in (root / "train", test):
        birds = [
            Bird(path, label)
            for label, name in enumerate(names)
            if (part / name).is_dir()
            for path in sorted(filter(_is_image, (part / name).rglob("*")))
            if not any(map(is_of_a_program, path.relative_to(part).parts[:-1]))
        ]
        if not birds:
            raise UserError(f"{part}: no images; expected a folder of them ({', '.join(sorted(SUFFIXES))}) a class")
        parts.append(birds)
    if without := sorted(set(range(len(names))) - {bird.label for bird in parts[0]}):
        raise UserError(f"{root / 'train' / names[without[0]]}: no images; expected some, or no such folder")
    return Cub(names, *parts)


def _read_index(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected CUB-200-2011 in its official layout: give DATA=<folder of {FOLDER}>,"
            " of train/ and test/ with a folder of images a class, or of such folders"
        )
    index: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not key.isdecimal() or not value or key in index:
            raise UserError(f"{path}: line {number} is {line[:60]!r}, expected a new number and a value")
        index[key] = value.strip()
    return index


def hold_out(birds: Sequence[Bird], share: float, seed: int) -> tuple[list[Bird], list[Bird]]:
    """Splits images into a part to learn from and a part to choose on, class by class.

    Every class with two or more images gives `share` of them, at least one and not all, drawn by `seed`.

    Returns:
        The two parts, each in the order of `birds`.

    Raises:
        UserError: every class has one image, so that the second part would be empty.
    """
    by_class = defaultdict(list)
    for index, bird in enumerate(birds):
        by_class[bird.label].append(index)
    generator = np.random.default_rng(seed)
    held: set[int] = set()
    for label in sorted(by_class):
        members = by_class[label]
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.update(generator.permutation(members)[:count].tolist())
    if not held:
        raise UserError(
            f"holdout={share:g}: none of the {len(by_class)} classes has two training images, so that none can "
            "be held out; expected more images, or OPTS=holdout=0, which chooses on the test split"
        )
    return [bird for i, bird in enumerate(birds) if i not in held], [birds[i] for i in sorted(held)]
