"""Shows training batches as the model sees them, mixed, augmented, resized and padded, with their boxes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.structures import ImageList

from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.images import write_picture
from detection.config import LEAF, RECIPES
from detection.data_loader import build_training_stream
from detection.drawing import Picture, beside, class_colors
from detection.experiment import new_experiment
from detection.voc import records_of

MAX_IMAGES = 16  # drawn of a batch


def draw_batch(batch: Sequence[dict], classes: Sequence[str], title: str) -> np.ndarray:
    """A grid of the images of a batch, all padded to one size at their right and lower edges, uint8 (H, W, 3), RGB.

    Args:
        batch: the mapper's samples, with `image` and `instances`.
        classes: names of the classes.
        title: written above.
    """
    images = ImageList.from_tensors([sample["image"] for sample in batch], size_divisibility=32).tensor
    height, width = images.shape[-2:]
    colors = class_colors(classes)
    panels = []
    for image, sample in zip(images, batch, strict=True):
        instances = sample["instances"]
        names = [classes[index] for index in instances.gt_classes]
        weights = instances.gt_weights.numpy() if instances.has("gt_weights") else None
        panel = Picture(image)
        panel.draw_objects(names, instances.gt_boxes.tensor, colors, weights)
        panels.append(panel.pixels)
    columns = int(np.ceil(len(batch) ** 0.5))
    return beside(panels, [], columns, f"{title}: {len(batch)} images, {width} x {height} pixels")


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Draws one picture a batch.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: data or options are missing or wrong.
    """
    parser = ArgumentParser(prog="tools.visualize_batches", description=__doc__)
    parser.add_argument("--model", choices=sorted(LEAF), default="yolov3")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--recipe", choices=RECIPES, default="best")
    choice.add_argument("--config", type=Path, help="a YAML of your own over those of detection/configs")
    parser.add_argument("--data", help="data root, or one folder in VOC layout; default datasets/, else the sample")
    parser.add_argument("--batches", type=int, default=2, help="number of batches, from the first on")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs over the configuration")
    args = parser.parse_args(argv, argparse.Namespace(start=None, backbone=None, pretrained=0))
    if args.batches < 1:
        raise UserError(f"BATCHES={args.batches}: expected 1 or more")

    experiment = new_experiment(args)
    experiment.resolve()
    cfg, name = experiment.cfg, experiment.name
    entries = records_of(cfg.DATASETS.TRAIN)
    size = cfg.SOLVER.IMS_PER_BATCH
    stream = build_training_stream(cfg, entries)
    folder = args.output / "batches" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(args.batches):
        batch = [stream[number * size + place] for place in range(min(size, MAX_IMAGES))]
        path = folder / f"{number:03d}.png"
        write_picture(path, draw_batch(batch, cfg.MODEL.CLASSES, f"{name}, batch {number}"))
        print(path)


if __name__ == "__main__":
    main()
