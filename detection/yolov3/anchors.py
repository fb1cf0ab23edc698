"""Anchors of YOLOv3: where they lie, what the network says about them, and which sizes suit a data set."""

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from torch import Tensor

# Largest log of a predicted side over its anchor's, so that exp does not overflow (the value of Detectron2's R-CNN).
SCALE_CLAMP = math.log(1000.0 / 16)


@ANCHOR_GENERATOR_REGISTRY.register()
class YOLOAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors, of free width and height, the same number in every cell of a level."""

    @configurable
    def __init__(self, *, sizes: list[list[tuple[float, float]]], strides: list[int]):
        """All lists have one entry a level, finest first.

        Args:
            sizes: width and height in pixels of each anchor.
            strides: side of a cell in pixels.
        """
        super().__init__(sizes=sizes, aspect_ratios=[1.0], strides=strides)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        """Reads `MODEL.YOLOV3.ANCHORS`."""
        return {"sizes": cfg.MODEL.YOLOV3.ANCHORS, "strides": [shape.stride for shape in input_shape]}

    def generate_cell_anchors(self, sizes: list[tuple[float, float]], aspect_ratios: list[float]) -> Tensor:
        """Anchors (A, 4) around the origin, XYXY in pixels."""
        half = torch.tensor(sizes, dtype=torch.float32) / 2
        return torch.cat([-half, half], dim=1)


class YOLOBox2BoxTransform:
    """Boxes as deltas from anchors: the centre's place in its cell, and the logarithm of the sizes' ratio.

    With cell corner c, stride s and anchor size a, a box of centre b and size d has the deltas (b - c) / s, in [0, 1]
    where the centre lies in the cell, and log(d / a) (Redmon and Farhadi, 2018, section 2.1).
    """

    def get_deltas(self, anchors: Tensor, boxes: Tensor, strides: Tensor) -> Tensor:
        """The deltas (..., N, 4) that turn anchors into boxes: x, y, log width, log height.

        Args:
            anchors: (N, 4) x1, y1, x2, y2 in pixels, centred on their cells.
            boxes: (..., N, 4) likewise, of positive size.
            strides: (N,) side of each anchor's cell in pixels.
        """
        anchor_centres, anchor_sizes = _centres_and_sizes(anchors)
        centres, sizes = _centres_and_sizes(boxes)
        return torch.cat([(centres - anchor_centres) / strides[:, None] + 0.5, (sizes / anchor_sizes).log()], dim=-1)

    def apply_deltas(self, deltas: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """The boxes (..., N, 4) x1, y1, x2, y2 in pixels; the inverse of `get_deltas`, with the same arguments."""
        anchor_centres, anchor_sizes = _centres_and_sizes(anchors)
        centres = anchor_centres + (deltas[..., :2] - 0.5) * strides[:, None]
        half_sizes = anchor_sizes * deltas[..., 2:].clamp(max=SCALE_CLAMP).exp() / 2
        return torch.cat([centres - half_sizes, centres + half_sizes], dim=-1)

    def decode(self, logits: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """The boxes of raw predictions, whose first two columns (the places in the cells) are still logits."""
        deltas = torch.cat([logits[..., :2].sigmoid(), logits[..., 2:]], dim=-1)
        return self.apply_deltas(deltas, anchors, strides)


def shape_iou(sizes1: Tensor, sizes2: Tensor) -> Tensor:
    """IoU (N, M) of boxes that share their centre, from their widths and heights (N, 2) and (M, 2)."""
    intersection = torch.minimum(sizes1[:, None], sizes2).prod(dim=2)
    return intersection / (sizes1.prod(dim=1)[:, None] + sizes2.prod(dim=1) - intersection)


def kmeans_anchors(sizes: Tensor, num_anchors: int, num_starts: int = 10, max_iterations: int = 100) -> Tensor:
    """Clusters box sizes with the distance 1 - IoU (Redmon and Farhadi, "YOLO9000", 2017, section 2).

    A cluster's centre is the median of its widths and heights, which leaves a higher mean best IoU than their mean. It
    starts from objects drawn with a fixed seed, so the same objects always give the same anchors.

    Args:
        sizes: (N, 2) width and height of the objects, in pixels of the network's input; N >= num_anchors.
        num_anchors: number of clusters.
        num_starts: number of draws; the one that ends with the highest mean best IoU is kept.
        max_iterations: rounds for each draw at most; it stops as soon as no object changes its cluster.

    Returns:
        (num_anchors, 2) width and height, smallest area first.
    """
    generator = torch.Generator().manual_seed(0)
    candidates = []
    for _ in range(num_starts):
        anchors = sizes[torch.randperm(len(sizes), generator=generator)[:num_anchors]]
        nearest = torch.full((len(sizes),), -1)
        for _ in range(max_iterations):
            previous, nearest = nearest, shape_iou(sizes, anchors).argmax(dim=1)
            if torch.equal(previous, nearest):
                break
            for index in nearest.unique().tolist():
                anchors[index] = sizes[nearest == index].median(dim=0).values
        candidates.append(anchors)
    best = max(candidates, key=lambda anchors: mean_best_iou(sizes, anchors))
    return best[best.prod(dim=1).argsort(stable=True)]


def mean_best_iou(sizes: Tensor, anchors: Tensor) -> float:
    """Mean over objects (N, 2) of the IoU with the anchor (M, 2) that fits best by shape."""
    return shape_iou(sizes, anchors).amax(dim=1).mean().item()


def _centres_and_sizes(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
