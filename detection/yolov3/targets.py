"""Which prediction answers for which object, and which ones are no background examples.

All objects of a batch are assigned at once. Predictions are numbered level by level (finest first), row by row, cell by
cell, anchor by anchor: 0 to R - 1, in the order of `YOLOAnchorGenerator`. On a GPU the host waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from common.runtime import to_device
from detection.yolov3.anchors import YOLOAnchorGenerator, YOLOBox2BoxTransform, shape_iou


@dataclass(frozen=True)
class Grid:
    """All anchors for one input size. L levels, finest first, with A anchors a cell make R predictions.

    Attributes:
        sizes: (L, A, 2) width and height of the anchors, in pixels.
        strides: (L,) side of a cell in pixels.
        cells: (L, 2) columns and rows.
        offsets: (L,) number of each level's first prediction.
        anchors: (R, 4) the anchor of each prediction, x1, y1, x2, y2 in pixels.
        anchor_strides: (R,) side of its cell in pixels.
    """

    sizes: Tensor
    strides: Tensor
    cells: Tensor
    offsets: Tensor
    anchors: Tensor
    anchor_strides: Tensor

    @classmethod
    def of(cls, generator: YOLOAnchorGenerator, features: list[Tensor]) -> "Grid":
        """The grid for features (N, C, H, W), finest first."""
        sizes = torch.stack([anchors[:, 2:] - anchors[:, :2] for anchors in generator.cell_anchors])
        cells = to_device([[f.shape[-1], f.shape[-2]] for f in features], sizes.device)
        counts = cells.prod(dim=1) * sizes.shape[1]
        anchors = generator(features)
        strides = to_device(generator.strides, sizes.device)
        of_anchors = [stride.expand(level.tensor.shape[0]) for stride, level in zip(strides, anchors, strict=True)]
        return cls(
            sizes=sizes,
            strides=strides,
            cells=cells,
            offsets=counts.cumsum(0) - counts,
            anchors=Boxes.cat(anchors).tensor,
            anchor_strides=torch.cat(of_anchors),
        )


@dataclass(frozen=True)
class Targets:
    """What a batch of N images with P objects should have predicted.

    Attributes:
        images: (P,) image of each object.
        predictions: (P,) number of the prediction that answers for it.
        boxes: (P, 4) its box, x1, y1, x2, y2 in pixels.
        classes: (P,) its class.
        weights: (P,) what its losses count: 1, or the share of its image in a mixture; 0 where it has no area, or
            another object has its prediction.
        objectness: (N, R) 1 for predictions that answer for an object, 0 for the others.
        ignored: (N, R) predictions that overlap an object too well to be called background.
    """

    images: Tensor
    predictions: Tensor
    boxes: Tensor
    classes: Tensor
    weights: Tensor
    objectness: Tensor
    ignored: Tensor


@torch.no_grad()
def assign_targets(
    deltas: Tensor, grid: Grid, transform: YOLOBox2BoxTransform, gt_instances: list[Instances], ignore_thresh: float
) -> Targets:
    """Assigns each object to one prediction, and finds the predictions to ignore.

    The prediction is that of the cell in which the object's centre lies, with the anchor, of all levels, whose shape
    has the highest IoU with the object's. Where several objects claim one prediction the last of them gets it, as in
    Darknet. Boxes without an area count for nothing, and their prediction's anchor stands in their place.

    Args:
        deltas: (N, R, 4) predicted deltas: logits of x and y, logarithms of width and height.
        grid: the anchors.
        transform: decodes `deltas`.
        gt_instances: N with `gt_boxes`, `gt_classes` and, where images are mixed, `gt_weights`.
        ignore_thresh: IoU, in (0, 1), above which a predicted box is ignored.

    Returns:
        The targets; a prediction may be both an object's and ignored.
    """
    boxes = torch.cat([instances.gt_boxes.tensor for instances in gt_instances]).to(deltas)
    classes = torch.cat([instances.gt_classes for instances in gt_instances])
    weights = torch.cat(
        [i.gt_weights.to(deltas) if i.has("gt_weights") else deltas.new_ones(len(i)) for i in gt_instances]
    )
    counts = [len(instances) for instances in gt_instances]
    images = to_device([image for image, count in enumerate(counts) for _ in range(count)], deltas.device).long()
    predictions = match_anchors(boxes, grid)
    has_area = Boxes(boxes).nonempty()
    slots = images * len(grid.anchors) + predictions
    claims, order = torch.where(has_area, slots, -1).sort(stable=True)
    is_last = torch.ones_like(has_area)
    is_last[:-1] = claims[1:] != claims[:-1]
    wins = has_area & torch.empty_like(is_last).scatter(0, order, is_last)
    return Targets(
        images,
        predictions,
        torch.where(has_area[:, None], boxes, grid.anchors[predictions]),
        classes,
        weights * wins,
        deltas.new_zeros(deltas[..., 0].numel()).scatter_add_(0, slots, wins.to(deltas)).view(deltas.shape[:2]),
        _find_ignored(deltas, grid, transform, boxes.split(counts), ignore_thresh),
    )


def match_anchors(boxes: Tensor, grid: Grid) -> Tensor:
    """Number (G,) of the prediction that answers for each box (G, 4) x1, y1, x2, y2 in pixels."""
    num_anchors = grid.sizes.shape[1]
    best = shape_iou(boxes[:, 2:] - boxes[:, :2], grid.sizes.flatten(0, 1)).argmax(dim=1)
    level, anchor = best // num_anchors, best % num_anchors
    cell = (boxes[:, :2] + boxes[:, 2:]) / 2 // grid.strides[level, None]
    cell = cell.long().clamp(min=grid.cells.new_zeros(2), max=grid.cells[level] - 1)  # a centre on the far edge
    return grid.offsets[level] + (cell[:, 1] * grid.cells[level, 0] + cell[:, 0]) * num_anchors + anchor


def _find_ignored(
    deltas: Tensor, grid: Grid, transform: YOLOBox2BoxTransform, boxes: Sequence[Tensor], thresh: float
) -> Tensor:
    """Mask (N, R) of the predictions whose IoU with a box of their image (each (G, 4)) exceeds `thresh`."""
    predicted = transform.decode(deltas, grid.anchors, grid.anchor_strides)
    return torch.stack(
        [
            (pairwise_iou(Boxes(ours), Boxes(theirs)) > thresh).any(dim=1)
            for ours, theirs in zip(predicted, boxes, strict=True)
        ]
    )
