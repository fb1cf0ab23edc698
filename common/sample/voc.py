"""The pictures of VOC2007 and VOC2012: several objects on each, with annotations and the lists of the splits."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from common.sample.canvas import Canvas
from common.sample.sprite import Sprite, read_silhouettes

_SILHOUETTES = read_silhouettes(Path(__file__).with_name("silhouettes.txt"))
_PICTURES = {  # of each split, and how many of them are without objects
    "VOC2007": {"train": (80, 1), "val": (80, 1), "test": (100, 2)},
    "VOC2012": {"train": (80, 2), "val": (80, 2)},
}
_TOTALS = {folder: sum(count for count, _ in splits.values()) for folder, splits in _PICTURES.items()}
COUNT = sum(_TOTALS.values())
_SHARES = {1: (0.45, 0.7), 2: (0.36, 0.56), 3: (0.32, 0.48), 4: (0.3, 0.44)}  # of an object in the long side, by count


class Picture(NamedTuple):
    """What is decided about an image before it is drawn."""

    folder: str
    split: str
    image_id: str
    seed: tuple[int, ...]
    classes: list[str]
    extra: str | None  # class of an additional, difficult object
    fractional: bool = False  # box corners with decimals


class Object(NamedTuple):
    """One drawn object; `box` is xmin, ymin, xmax, ymax in pixels from 1, both ends included."""

    name: str
    pose: str
    truncated: bool
    difficult: bool
    occluded: bool
    box: tuple[float, float, float, float]


def draw(root: Path, seed: int) -> Iterator[None]:
    """Draws VOC2007/ and VOC2012/ into `root`, a step for each picture."""
    pictures = plan(seed)
    for folder, splits in _PICTURES.items():
        for child in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder / child).mkdir(parents=True)
        for name in (*splits, "trainval"):  # whose name has both of its splits in it
            listed = [picture for picture in pictures if picture.folder == folder and picture.split in name]
            _write_lists(root / folder / "ImageSets" / "Main", name, listed)
    for picture in pictures:
        jpeg, objects, size = draw_picture(picture)
        (root / picture.folder / "JPEGImages" / f"{picture.image_id}.jpg").write_bytes(jpeg)
        annotation = _annotation(picture, objects, size)
        (root / picture.folder / "Annotations" / f"{picture.image_id}.xml").write_text(annotation)
        yield


def plan(seed: int) -> list[Picture]:
    """Deals ids and classes to the images so that every split holds each class about equally often."""
    rng = np.random.default_rng((seed, 2))
    numbers = rng.choice(np.arange(1, 9964), _TOTALS["VOC2007"], replace=False)
    others = rng.choice(6000, _TOTALS["VOC2012"], replace=False)
    ids = {
        "VOC2007": [f"{number:06d}" for number in numbers],
        "VOC2012": [f"{2008 + i % 4}_{number:06d}" for i, number in enumerate(others)],
    }
    pictures: list[Picture] = []
    for folder, splits in _PICTURES.items():
        for split, (count, empty) in splits.items():
            sizes = [0] * empty + [(1, 2, 3, 3, 3, 4, 4, 4)[i % 8] for i in range(count - empty)]
            rounds = 1 + sum(sizes) // len(_SILHOUETTES)
            deck = np.concatenate([rng.permutation(list(_SILHOUETTES)) for _ in range(rounds)]).tolist()
            for position, size in enumerate(rng.permutation(sizes)):
                own_seed = seed, int(folder[3:]), len(pictures)
                classes = [deck.pop() for _ in range(size)]
                extra = str(rng.choice(list(_SILHOUETTES))) if size and position % 6 == 0 else None
                pictures.append(Picture(folder, split, ids[folder].pop(), own_seed, classes, extra))
    # The official VOC2012 has decimals in one file too (2011_003353), which breaks every reader that expects integers.
    last = max(i for i, picture in enumerate(pictures) if picture.split == "train" and picture.classes)
    pictures[last] = pictures[last]._replace(fractional=True)
    return pictures


def draw_picture(picture: Picture) -> tuple[bytes, list[Object], tuple[int, int]]:
    """Returns the JPEG, its objects, and width and height."""
    rng = np.random.default_rng(picture.seed)
    size = int(rng.integers(200, 257)), int(rng.integers(145, 195))
    if rng.random() < 0.3:
        size = size[::-1]
    canvas = Canvas(rng, *size)
    taken: list[tuple[int, int, int, int]] = []
    drawn: list[tuple[str, str, bool, bool]] = []
    for name in picture.classes + ([picture.extra] if picture.extra else []):
        silhouette = _SILHOUETTES[name]
        difficult = len(drawn) == len(picture.classes)
        sprite = Sprite(rng, silhouette, tilt=12, hue=0.03)
        truncated = bool(rng.random() < 0.08) and not difficult
        faded = difficult and rng.random() < 0.4
        tiny = difficult and not faded
        length = rng.uniform(18, 28) if tiny else rng.uniform(*_SHARES[len(picture.classes)]) * max(size)
        while (corner := _find_place(rng, size, sprite.size(length), truncated, taken)) is None:
            length *= 0.93
        taken.append((*corner, *sprite.size(length)))
        canvas.paste(sprite, length, corner, opacity=rng.uniform(0.25, 0.35) if faded else 1.0)
        pose = "Frontal" if silhouette.view == "front" else "Left" if sprite.mirrored else "Right"
        drawn.append((name, pose, truncated, difficult))
    inset = 0.3 if picture.fractional else 0
    objects = []
    for index, facts in enumerate(drawn):
        xmin, ymin, xmax, ymax = canvas.box(index)
        box = xmin + inset, ymin + inset, xmax - inset, ymax - inset
        objects.append(Object(*facts, canvas.is_occluded(index), box))
    return canvas.develop(rng), objects, size


def _find_place(
    rng: np.random.Generator, canvas: tuple[int, int], size: tuple[int, int], truncated: bool, taken: list
) -> tuple[int, int] | None:
    """Looks for the left upper corner of an object of `size` on `canvas` (both width, height) beside those `taken`."""
    for _ in range(40):
        corner = [int(rng.integers(0, max(1, canvas[i] - size[i] + 1))) for i in (0, 1)]
        if truncated:
            axis, hidden = rng.integers(2), rng.uniform(0.15, 0.35)
            low_side = rng.random() < 0.5
            corner[axis] = round(-hidden * size[axis] if low_side else canvas[axis] - (1 - hidden) * size[axis])
        inside = all(corner[i] >= 0 and corner[i] + size[i] <= canvas[i] for i in (0, 1))
        if inside != truncated and not any(_overlaps((*corner, *size), other) for other in taken):
            return corner[0], corner[1]
    return None


def _overlaps(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two boxes (x, y, width, height) share more than 12 % of the smaller one."""
    shared = [min(first[i] + first[i + 2], second[i] + second[i + 2]) - max(first[i], second[i]) for i in (0, 1)]
    return min(shared) > 0 and shared[0] * shared[1] > 0.12 * min(first[2] * first[3], second[2] * second[3])


def _annotation(picture: Picture, objects: list[Object], size: tuple[int, int]) -> str:
    """The XML of an image with VOC's tags, in the order that its year has them."""
    year = picture.folder if picture.folder == "VOC2007" else f"VOC{picture.image_id[:4]}"
    content = _tags(
        folder=picture.folder,
        filename=f"{picture.image_id}.jpg",
        source=_tags(database=f"The {year} Database", annotation=f"PASCAL {year}", image="drawn"),
        size=_tags(width=size[0], height=size[1], depth=3),
        segmented=0,
    )
    for item in objects:
        box = _tags(**dict(zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True)))
        tags = {"occluded": int(item.occluded), "bndbox": box, "difficult": int(item.difficult)}
        if picture.folder == "VOC2007":
            tags = {"difficult": int(item.difficult), "bndbox": box}
        content += _tags(object=_tags(name=item.name, pose=item.pose, truncated=int(item.truncated), **tags))
    root = ElementTree.fromstring(_tags(annotation=content))
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _tags(**contents: object) -> str:
    return "".join(f"<{tag}>{content}</{tag}>" for tag, content in contents.items())


def _write_lists(lists: Path, name: str, pictures: list[Picture]) -> None:
    """The ids of a split, and for each class 1 (present), 0 (only difficult) or -1 (absent)."""
    pictures = sorted(pictures, key=lambda picture: picture.image_id)
    (lists / f"{name}.txt").write_text("".join(f"{picture.image_id}\n" for picture in pictures))
    for label in _SILHOUETTES:
        flags = [1 if label in picture.classes else 0 if label == picture.extra else -1 for picture in pictures]
        lines = [f"{picture.image_id} {flag:2d}\n" for picture, flag in zip(pictures, flags, strict=True)]
        (lists / f"{label}_{name}.txt").write_text("".join(lines))
