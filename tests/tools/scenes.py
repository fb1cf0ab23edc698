"""Photographs for detectors, a red and a blue rectangle on grey, and settings of detectors that train in a moment."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests import narrow

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


def draw_scene(height: int, width: int, seed: int) -> tuple[Image.Image, list[tuple[str, int, int, int, int]]]:
    """A photograph, and class and corners of each rectangle, as VOC counts them."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 120, dtype=np.uint8)
    objects = []
    for name, colour in COLOURS.items():
        (x, y), (w, h) = rng.integers(0, 16, 2), rng.integers(16, 32, 2)
        image[y : y + h, x : x + w] = colour
        objects.append((name, x + 1, y + 1, x + w, y + h))
    return Image.fromarray(image), objects


THINGS = {"red_thing_with_a_name_that_is_much_longer_than_a_column": (200, 30, 30), "blue": (30, 30, 200)}
OBJECT = """<object><name>{}</name><difficult>0</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
TINY = {"MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0, "INPUT.MIN_SIZE_TEST": 64}
TINY |= {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 2, "SOLVER.LOG_PERIOD": 1}
TINY |= {"TEST.EVAL_PERIOD": 1, "TEST.VALIDATION_LOSS_IMAGES": 2}
TINY_FRCNN = {**narrow.FASTER_RCNN, "SOLVER.STEPS": (1,), "INPUT.MIN_SIZE_TRAIN": (64,)}
TINY_YOLOV3 = {
    "MODEL.TIMM.NAME": "resnet10t",
    "MODEL.YOLOV3.CONV_DIMS": [8, 16, 16],
    "MODEL.YOLOV3.NUM_CONVS": [1, 1, 1],
    "INPUT.SQUARE_SIZES_TRAIN": [64],
    "INPUT.MAX_SIZE_TEST": 64,
}


def draw_voc(folder: Path) -> None:
    """Eight photographs in VOC layout, two rectangles each."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "labels.txt").write_text("\n".join(THINGS) + "\n")
    rng = np.random.default_rng(0)
    for number in range(8):
        image, objects = np.full((48, 64, 3), 120, dtype=np.uint8), ""
        for name, colour in THINGS.items():
            (x, y), (w, h) = rng.integers(0, 16, 2), rng.integers(16, 32, 2)
            image[y : y + h, x : x + w] = colour
            objects += OBJECT.format(name, x + 1, y + 1, x + w, y + h)
        Image.fromarray(image).save(folder / "JPEGImages" / f"{number}.png")
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (folder / "ImageSets/Main/trainval.txt").write_text("0\n1\n2\n3\n")
    (folder / "ImageSets/Main/test.txt").write_text("4\n5\n6\n7\n")
