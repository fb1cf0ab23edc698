"""The pictures of CUB_200_2011: one invented bird for each of its 200 names, and the index files."""

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np

from common.sample.canvas import Canvas
from common.sample.sprite import Silhouette, Sprite

_NAMES = Path(__file__).with_name("birds.txt").read_text().split()  # of class 1 to 200
_PICTURES, _TRAIN_PICTURES = 12, 8  # of each class
COUNT = _PICTURES * len(_NAMES)
_COLOURS = (
    *("#24262b", "#f4f1e8", "#8b929b", "#d6322e", "#ee7f1f", "#f5cf2e", "#7d8430", "#3a9c48"),
    *("#1fa3a0", "#2f67d0", "#7746b8", "#6e4426", "#b35a2c", "#ea8fb0", "#e3cfa3"),
)


def draw(root: Path, seed: int) -> Iterator[None]:
    """Draws CUB_200_2011/ into `root`, a step for each picture.

    Index files have one line an image or a class, numbered from 1; boxes are x y width height.
    """
    root = root / "CUB_200_2011"
    classes = [f"{number:03d}.{name}" for number, name in enumerate(_NAMES, 1)]
    rows = []
    for label, folder in enumerate(classes):
        (root / "images" / folder).mkdir(parents=True)
        stem = "_".join(word[0].upper() + word[1:] for word in _NAMES[label].split("_"))
        trained = np.random.default_rng((seed, 5, label)).permutation(_PICTURES) < _TRAIN_PICTURES
        for number, is_train in enumerate(trained):
            jpeg, box = draw_picture(seed, label, number)
            path = f"{folder}/{stem}_{number + 1:04d}_{1000 * (label + 1) + number}.jpg"
            (root / "images" / path).write_bytes(jpeg)
            rows.append((path, label + 1, int(is_train), "{:.1f} {:.1f} {:.1f} {:.1f}".format(*box)))
            yield
    names = "images", "image_class_labels", "train_test_split", "bounding_boxes"
    for name, values in [("classes", classes), *zip(names, zip(*rows, strict=True), strict=True)]:
        (root / f"{name}.txt").write_text("".join(f"{number} {value}\n" for number, value in enumerate(values, 1)))


def draw_picture(seed: int, label: int, number: int) -> tuple[bytes, tuple[int, int, int, int]]:
    """Returns picture `number` of class `label` (from 0) as JPEG, and its box x, y, width, height (pixels from 0)."""
    rng = np.random.default_rng((seed, 2011, label, number))
    size = rng.integers(96, 113, 2)
    canvas = Canvas(rng, *size.tolist())
    sprite = Sprite(rng, invent(seed, label), tilt=15, hue=0.015)
    length = rng.uniform(0.75, 0.98) * ((size - 5) / sprite.extent).min() * sprite.extent.max()
    corner = [int(rng.integers(0, room + 1)) for room in size - sprite.size(length)]
    canvas.paste(sprite, length, corner)
    left, top, right, bottom = canvas.box(0)
    return canvas.develop(rng), (left - 1, top - 1, right - left + 1, bottom - top + 1)


def invent(seed: int, label: int) -> Silhouette:
    """The look of bird `label` (from 0) in the world of `seed`; no two share the colours of both body and wing."""
    pairs = np.random.default_rng((seed, 3)).permutation(list(permutations(_COLOURS, 2)))
    rng = np.random.default_rng((seed, 4, label))
    body, wing = (str(colour) for colour in pairs[label])
    colours = {"body": body, "wing": wing}
    for name, like, chance in (("head", body, 0.4), ("tail", wing, 0.5), ("belly", body, 0.3), ("mark", wing, 0.1)):
        colours[name] = like if rng.random() < chance else str(rng.choice(_COLOURS))
    colours["beak"] = str(rng.choice(["#24262b", "#f5cf2e", "#ee7f1f", "#d6322e", "#8b929b"]))
    plump, radius, neck = rng.uniform(0.8, 1.3), rng.uniform(10, 14), rng.uniform(0, 14)
    leg, beak, thick, hook = rng.uniform(4, 22), rng.uniform(6, 28), rng.uniform(2.5, 6), rng.uniform(-2, 6)
    tail, drop, fan = rng.uniform(14, 40), rng.uniform(-14, 18), rng.uniform(4, 10)
    x, y = 68 + neck / 4, 34 - neck
    end, ground, chin = 22 - tail, 70 + 10 * plump + leg, 58 + 18 * plump
    tails = [
        [24, 54, end, 62 + drop - fan, end, 62 + drop + fan, 28, 70],
        [24, 54, end, 60 + drop - 1.6 * fan, end + 0.5 * tail, 62 + drop, end, 64 + drop + 1.6 * fan, 28, 70],
        [24, 54, end, 62 + drop, 28, 70],
        [24, 54, end + 0.3 * tail, 62 + drop - 2 * fan, end, 62 + drop, end + 0.3 * tail, 62 + drop + 2 * fan, 28, 70],
    ]
    parts = [
        ("line", "beak", [3, 44, 66, 42, ground, 52, ground]),
        ("line", "beak", [3, 54, 66, 53, ground, 63, ground]),
        ("polygon", "tail", tails[rng.integers(len(tails))]),
        ("stroke", "head", [1.5 * radius, 56, 52, x, y]),
        ("curve", "body", [16, 62, 34, 62 - 18 * plump, 56, 56 - 14 * plump, 72, 48, 68, 66, 50, chin, 30, chin - 6]),
        ("curve", "belly", [70, 50, 67, 66, 50, chin - 1, 34, chin - 5, 46, 64]),
        ("curve", "wing", [12, 66, 32, 60 - 12 * plump, 52, 48, 60, 58, 42, 70]),
    ]
    for bar in range(rng.integers(0, 3)):
        parts.append(("line", "mark", [3, 40 - 12 * bar, 52, 44 - 12 * bar, 68 - bar]))
    for streak in range(rng.integers(0, 4)):
        parts.append(("line", "mark", [2, 66 - 7 * streak, 60 + 4 * streak, 64 - 7 * streak, 67 + 4 * streak]))
    if rng.random() < 0.3:
        parts.append(("polygon", "mark", [x, y - radius, x - 2.2 * radius, y - 1.7 * radius, x - radius, y]))
    parts.append(("disc", "head", [x, y, radius, radius]))
    if rng.random() < 0.5:
        crown = [x - radius, y - 2, x - 0.6 * radius, y - radius, x + 0.5 * radius, y - radius, x + radius, y - 4]
        parts.append(("curve", "mark", crown))
    if rng.random() < 0.35:
        parts.append(("line", "mark", [5, x - radius, y, x + radius, y]))
    if rng.random() < 0.35:
        parts.append(("disc", "mark", [x + 1, y + 0.8 * radius, 0.7 * radius, 0.5 * radius]))
    tip = x + radius + beak
    parts += [
        ("polygon", "beak", [x + 0.8 * radius, y - thick, tip, y + hook, x + 0.8 * radius, y + thick]),
        ("disc", "white", [x + 0.3 * radius, y - 0.15 * radius, 4, 4]),
        ("disc", "dark", [x + 0.3 * radius, y - 0.15 * radius, 2.5, 2.5]),
    ]
    return Silhouette("side", colours, parts)
