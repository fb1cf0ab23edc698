"""A tiny data set in CUB's layout: five classes that differ in colour, a few pictures each."""

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"001.Red_Bird": (200, 30, 30), "002.Green_Bird": (30, 180, 40), "003.Blue_Bird": (40, 40, 210)}
COLOURS |= {"004.White_Bird": (230, 230, 230), "005.Black_Bird": (20, 20, 20)}


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    """Data root with 5 classes x (6 training + 2 test) pictures of 48 x 40 pixels, for a test to spoil."""
    return draw_birds(tmp_path / "data")


@pytest.fixture(scope="session")
def kept_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for tests that leave it as it is."""
    return draw_birds(tmp_path_factory.mktemp("birds"))


def draw_birds(root: Path) -> Path:
    folder = root / "CUB_200_2011"
    generator = np.random.default_rng(0)
    images, labels, split = [], [], []
    for label, (name, colour) in enumerate(COLOURS.items(), start=1):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(8):
            noise = generator.integers(-20, 20, (40, 48, 3))
            file = f"{name}/{name[4:]}_{number:04d}.jpg"
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / file)
            images.append(f"{len(images) + 1} {file}")
            labels.append(f"{len(labels) + 1} {label}")
            split.append(f"{len(split) + 1} {int(number < 6)}")
    classes = [f"{number} {name}" for number, name in enumerate(COLOURS, start=1)]
    for name, lines in (
        ("classes", classes),
        ("images", images),
        ("image_class_labels", labels),
        ("train_test_split", split),
    ):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Calls a command line's main and returns its exit code, output and errors."""
    logger = logging.getLogger("classification")  # as it was before, for the next test
    for name, value in (("handlers", []), ("level", logger.level), ("propagate", True)):
        monkeypatch.setattr(logger, name, value)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    def run(main: Callable, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run
