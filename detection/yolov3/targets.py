"""Which prediction answers for which object, and which ones are no background examples.

Everything works on all objects of a batch at once. Predictions are numbered level by level (finest first), row by row,
cell by cell, anchor by anchor: 0 to R - 1, in the order of `YOLOAnchorGenerator`. On a GPU the host waits for nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from common.runtime import to_device
from detection.yolov3.anchors import SCALE_CLAMP, YOLOAnchorGenerator, YOLOBox2BoxTransform, shape_iou


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
        cells = to_device([[f.shape[-1], f.shape[-2]] for f in features], generator.strides.device)
        counts = cells.prod(dim=1) * generator.num_anchors
        anchors = generator(features)
        strides = [
            stride.expand(level.tensor.shape[0]) for stride, level in zip(generator.strides, anchors, strict=True)
        ]
        return cls(
            sizes=generator.sizes,
            strides=generator.strides,
            cells=cells,
            offsets=counts.cumsum(0) - counts,
            anchors=Boxes.cat(anchors).tensor,
            anchor_strides=torch.cat(strides),
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
    find_ignored = _find_ignored_among_all if deltas.is_cuda else _find_ignored_among_near
    return Targets(
        images,
        predictions,
        torch.where(has_area[:, None], boxes, grid.anchors[predictions]),
        classes,
        weights * wins,
        deltas.new_zeros(deltas[..., 0].numel()).scatter_add_(0, slots, wins.to(deltas)).view(deltas.shape[:2]),
        find_ignored(deltas, grid, transform, boxes.split(counts), ignore_thresh),
    )


def match_anchors(boxes: Tensor, grid: Grid) -> Tensor:
    """Number (G,) of the prediction that answers for each box (G, 4) x1, y1, x2, y2 in pixels."""
    num_anchors = grid.sizes.shape[1]
    best = shape_iou(boxes[:, 2:] - boxes[:, :2], grid.sizes.flatten(0, 1)).argmax(dim=1)
    level, anchor = best // num_anchors, best % num_anchors
    cell = (boxes[:, :2] + boxes[:, 2:]) / 2 // grid.strides[level, None]
    cell = cell.long().clamp(min=grid.cells.new_zeros(2), max=grid.cells[level] - 1)  # a centre on the far edge
    return grid.offsets[level] + (cell[:, 1] * grid.cells[level, 0] + cell[:, 0]) * num_anchors + anchor


def _find_ignored_among_all(
    deltas: Tensor, grid: Grid, transform: YOLOBox2BoxTransform, boxes: Sequence[Tensor], thresh: float
) -> Tensor:
    """Mask (N, R) of the predictions whose IoU with a box of their image (each (G, 4)) exceeds `thresh`.

    All pairs of an image cost a GPU less than the wait for how many of them are worth the computation.
    """
    predicted = transform.decode(deltas, grid.anchors, grid.anchor_strides)
    return torch.stack(
        [
            (pairwise_iou(Boxes(ours), Boxes(theirs)) > thresh).any(dim=1)
            for ours, theirs in zip(predicted, boxes, strict=True)
        ]
    )


def _find_ignored_among_near(
    deltas: Tensor, grid: Grid, transform: YOLOBox2BoxTransform, boxes_by_image: Sequence[Tensor], thresh: float
) -> Tensor:
    """The same mask, for a CPU.

    Most pairs of box and prediction are ruled out before any IoU is computed: for an IoU above t both centre and size
    must agree along each axis. What remains of the time is spent in taking the pairs' values from memory, for which
    `index_select` takes a third of the time of an index.
    """
    ignored = torch.zeros(deltas.shape[:2], dtype=torch.bool, device=deltas.device)
    boxes = torch.cat(list(boxes_by_image))
    images = torch.arange(len(boxes_by_image)).repeat_interleave(torch.tensor([len(part) for part in boxes_by_image]))
    has_area = Boxes(boxes).nonempty()
    boxes, images = boxes[has_area], images[has_area]
    deltas = deltas.flatten(0, 1)
    log_anchors = (grid.anchors[:, 2:] - grid.anchors[:, :2]).log()
    log_boxes = (boxes[:, 2:] - boxes[:, :2]).log()
    owners, near = _near_predictions(boxes, grid, thresh)
    slots = (images * len(grid.anchors)).index_select(0, owners) + near
    for axis in (0, 1):
        log_sizes = deltas[:, 2 + axis].index_select(0, slots).clamp_(max=SCALE_CLAMP)
        log_ratios = log_sizes + log_anchors[:, axis].index_select(0, near)
        log_ratios -= log_boxes[:, axis].index_select(0, owners)
        similar = (log_ratios.abs() < 1e-3 - math.log(thresh)).nonzero()[:, 0]
        owners, near, slots = owners[similar], near[similar], slots[similar]
    near_boxes = transform.decode(deltas[slots], grid.anchors[near], grid.anchor_strides[near])
    overlaps = matched_pairwise_iou(Boxes(near_boxes), Boxes(boxes[owners])) > thresh
    ignored.view(-1)[slots[overlaps]] = True
    return ignored


def _near_predictions(boxes: Tensor, grid: Grid, thresh: float) -> tuple[Tensor, Tensor]:
    """Pairs of a box and a prediction whose centres are close enough for an IoU above `thresh`.

    For an IoU above t the intervals of both boxes along each axis must have one as well, which they can only with
    centres closer than w (1 - t) / 2t, for a box of width w. A predicted centre never leaves its cell, so only the
    cells that this window touches remain, a few in a hundred.

    Returns:
        Indices of the boxes (M,) and numbers of the predictions (M,).
    """
    num_levels, num_anchors = grid.sizes.shape[:2]
    centres, sizes = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2, boxes[:, None, 2:] - boxes[:, None, :2]
    reach = sizes * (1 - thresh) / (2 * thresh) + 1e-2  # pixels, for rounding errors
    zero, strides = grid.cells.new_zeros(2), grid.strides[:, None]
    first = ((centres - reach) // strides).long().clamp(min=zero, max=grid.cells - 1)  # (G, L, 2): x, y
    last = ((centres + reach) // strides).long().clamp(min=zero, max=grid.cells - 1)

    # One window for each box and level, of so many rows, each a run of consecutive predictions.
    lengths, heights = ((last - first + 1) * grid.cells.new_tensor([num_anchors, 1])).flatten(0, 1).unbind(1)
    windows, rows = _ranges(first[..., 1].flatten(), heights)
    levels = windows % num_levels
    cells = rows * grid.cells[levels, 0] + first[..., 0].flatten()[windows]
    runs, predictions = _ranges(grid.offsets[levels] + cells * num_anchors, lengths[windows])
    return (windows // num_levels).index_select(0, runs), predictions


def _ranges(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of the ranges [start, start + length), one range after the other, and the range each belongs to.

    Returns:
        Indices of the ranges and the integers, both (sum of the lengths,).
    """
    owners = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    shifts = starts - (lengths.cumsum(0) - lengths)
    return owners, torch.arange(len(owners), device=lengths.device) + shifts.index_select(0, owners)
