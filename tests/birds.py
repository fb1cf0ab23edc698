"""Birds in CUB's layout: five classes that differ in colour."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"001.Red_Bird": (200, 30, 30), "002.Green_Bird": (30, 180, 40), "003.Blue_Bird": (40, 40, 210)}
COLOURS |= {"004.White_Bird": (230, 230, 230), "005.Black_Bird": (20, 20, 20)}


def draw_birds(root: Path, train: int = 6, test: int = 2) -> Path:
    """Draws so many pictures of 48 x 40 pixels a class, those for training first; returns the root."""
    folder = root / "CUB_200_2011"
    generator = np.random.default_rng(0)
    images, labels, split = [], [], []
    for label, (name, colour) in enumerate(COLOURS.items(), start=1):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(train + test):
            noise = generator.integers(-20, 20, (40, 48, 3))
            file = f"{name}/{name[4:]}_{number:04d}.jpg"
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / file)
            images.append(f"{len(images) + 1} {file}")
            labels.append(f"{len(labels) + 1} {label}")
            split.append(f"{len(split) + 1} {int(number < train)}")
    classes = [f"{number} {name}" for number, name in enumerate(COLOURS, start=1)]
    for name, lines in (
        ("classes", classes),
        ("images", images),
        ("image_class_labels", labels),
        ("train_test_split", split),
    ):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root
