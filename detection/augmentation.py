"""Augmentation of images together with their boxes: torchvision's transforms by name, and samples made of several.

A sample is a dict of `image` (tv_tensors.Image, uint8, (3, H, W)), `boxes` (tv_tensors.BoundingBoxes, (N, 4), XYXY in
pixels of the image), `labels` (N,) and `weights` (N,): how much of an object is seen, 1 unless it is mixed with
another image. All randomness comes from torch's generator.
"""

from collections.abc import Mapping, Sequence

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from common.errors import UserError

# Defaults are those of the SSD recipe (Liu et al. 2016), which torchvision's classes implement.
AUGMENTATIONS = {
    "RandomHorizontalFlip": v2.RandomHorizontalFlip,
    "RandomPhotometricDistort": v2.RandomPhotometricDistort,
    "RandomZoomOut": v2.RandomZoomOut,
    "RandomIoUCrop": v2.RandomIoUCrop,
}


def build_augmentations(
    augmentations: Sequence[str | Mapping], fill: Sequence[float] = (0, 0, 0)
) -> list[v2.Transform]:
    """The torchvision transforms of `INPUT.AUGMENTATIONS`.

    Args:
        augmentations: names, or `{name: {argument: value}}` where the arguments are not torchvision's own defaults.
        fill: colour around an image that is zoomed out, RGB from 0 to 255.

    Raises:
        UserError: a name is not in `AUGMENTATIONS`, or the transform has no such argument.
    """
    built = []
    for entry in augmentations:
        for name, arguments in (entry if isinstance(entry, Mapping) else {str(entry): {}}).items():
            if name not in AUGMENTATIONS:
                raise UserError(f"INPUT.AUGMENTATIONS: unknown {name}; expected some of {', '.join(AUGMENTATIONS)}")
            defaults = {"fill": tuple(round(value) for value in fill)} if name == "RandomZoomOut" else {}
            try:
                built.append(AUGMENTATIONS[name](**(defaults | arguments)))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"INPUT.AUGMENTATIONS: {name} {arguments}: {error}; see torchvision.transforms.v2.{name}"
                ) from error
    return built


def mixup(first: dict, second: dict, share: float) -> dict:
    """Two images laid over each other from the upper left corner, with the objects of both.

    Zhang et al. (2018) for detection, as in Zhang et al., "Bag of Freebies for Training Object Detection Neural
    Networks" (2019): images are not resized, and an object weighs what its image does.

    Args:
        first: sample that shows with weight `share`.
        second: sample that shows with weight 1 - `share`.
        share: from 0 to 1.

    Returns:
        The sample, as high and as wide as the higher and the wider of the two; black where there is neither.
    """
    height, width = (max(a, b) for a, b in zip(first["image"].shape[1:], second["image"].shape[1:], strict=True))
    one, two = (v2.functional.crop(sample["image"], 0, 0, height, width) for sample in (first, second))
    return {
        "image": tv_tensors.Image(torch.lerp(two.float(), one.float(), share).round().to(torch.uint8)),
        "boxes": _boxes([first["boxes"], second["boxes"]], height, width),
        "labels": torch.cat([first["labels"], second["labels"]]),
        "weights": torch.cat([first["weights"] * share, second["weights"] * (1 - share)]),
    }


def mosaic(samples: Sequence[dict]) -> dict:
    """Four images in the quarters of a square (Bochkovskiy et al., "YOLOv4", 2020, section 3.3).

    The quarters meet at a random point in the middle of the square. Each is covered by its image, scaled without
    distortion and cut at random; an object stays where its centre does.

    Args:
        samples: four; the square is as long as the longer side of the first.

    Returns:
        The sample.
    """
    side = max(samples[0]["image"].shape[1:])
    row, column = torch.randint(side // 4, side - side // 4 + 1, (2,)).tolist()
    quarters = [
        (top, left, height, width)
        for top, height in ((0, row), (row, side - row))
        for left, width in ((0, column), (column, side - column))
    ]
    image = tv_tensors.Image(samples[0]["image"].new_empty(3, side, side))
    boxes, labels, weights = [], [], []
    for sample, (top, left, height, width) in zip(samples, quarters, strict=True):
        tile, tile_boxes = _cover(sample["image"], sample["boxes"], height, width)
        y, x = (int(torch.randint(excess + 1, ())) for excess in (tile.shape[1] - height, tile.shape[2] - width))
        image[:, top : top + height, left : left + width] = v2.functional.crop(tile, y, x, height, width)
        centres = (tile_boxes[:, :2] + tile_boxes[:, 2:]) / 2 - torch.tensor([x, y])
        kept = ((centres >= 0) & (centres < torch.tensor([width, height]))).all(dim=1)
        boxes.append(v2.functional.crop(tile_boxes, y, x, height, width)[kept] + torch.tensor([left, top, left, top]))
        labels.append(sample["labels"][kept])
        weights.append(sample["weights"][kept])
    return {
        "image": image,
        "boxes": _boxes(boxes, side, side),
        "labels": torch.cat(labels),
        "weights": torch.cat(weights),
    }


def _cover(
    image: torch.Tensor, boxes: tv_tensors.BoundingBoxes, height: int, width: int
) -> tuple[torch.Tensor, tv_tensors.BoundingBoxes]:
    """Scales both to the smallest size that is at least `height` x `width`, without distortion."""
    scale = max(height / image.shape[1], width / image.shape[2])
    size = [max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))]
    return v2.functional.resize(image, size), v2.functional.resize(boxes, size)


def _boxes(parts: Sequence[torch.Tensor], height: int, width: int) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(torch.cat(list(parts)), format="XYXY", canvas_size=(height, width))
