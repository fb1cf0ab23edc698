"""Which detection has found which object, by the rules of Pascal VOC; `detection.evaluation` names their source.

Within a class the detections are taken in descending order of score (equal scores in the order given). Each looks at
the one object of its class and image with the highest intersection over union, difficult or not, claimed or not. If the
overlap is greater than the threshold, a difficult object makes the detection ignored, one that an earlier detection has
claimed makes it a false positive, any other makes it a true positive; else it is a false positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Detections:
    """Detections on a whole dataset, one a row.

    Attributes:
        image: (N,) integers, positions in the list of dataset dicts.
        category: (N,) integers, positions in the list of class names.
        score: (N,) floats, higher is more certain.
        box: (N, 4) floats, XYXY in pixels of the original image, continuous and counted from 0.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray

    def check(self, images: int, categories: int) -> None:
        """Raises ValueError if the arrays differ in length, or name an image or a class that does not exist."""
        n = len(self.score)
        shapes = [array.shape for array in (self.image, self.category, self.score, self.box)]
        if shapes != [(n,), (n,), (n,), (n, 4)]:
            raise ValueError(f"detections have shapes {shapes}, expected three of ({n},) and one of ({n}, 4)")
        for values, limit, name in ((self.image, images, "image"), (self.category, categories, "category")):
            if n and not 0 <= values.min() <= values.max() < limit:
                raise ValueError(f"detections name {name} {values.min()} to {values.max()}, expected 0 to {limit - 1}")


@dataclass(frozen=True)
class Objects:
    """The annotated objects of a whole dataset, one a row, image by image.

    Attributes:
        image: (G,) integers, ascending, positions in the list of dataset dicts.
        category: (G,) integers, positions in the list of class names.
        box: (G, 4) floats, XYXY in pixels, continuous and counted from 0.
        is_difficult: (G,) booleans.
    """

    image: np.ndarray
    category: np.ndarray
    box: np.ndarray
    is_difficult: np.ndarray


@dataclass(frozen=True)
class Matches:
    """The detections of one class in descending order of score, each with the object that it looks at.

    Attributes:
        detection: (N,) integers, positions in the detections.
        object: (N,) integers, positions in the objects; meaningless where the overlap is 0.
        iou: (N,) floats, the overlap with it.
    """

    detection: np.ndarray
    object: np.ndarray
    iou: np.ndarray

    def judge(self, threshold: float, is_ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which detections are right, and which count at all.

        Args:
            threshold: of the overlap.
            is_ignored: (G,) booleans, the objects that make a detection neither right nor wrong.

        Returns:
            Positions of the true positives in these matches, ascending, and (N,) booleans, false where ignored.
        """
        is_over = self.iou > threshold
        counts = ~(is_over & is_ignored[self.object]) if len(is_ignored) else np.ones(len(self.iou), dtype=bool)
        claims = np.flatnonzero(is_over & counts)
        return claims[first_claims(self.object[claims])], counts


def first_claims(objects: np.ndarray) -> np.ndarray:
    """Positions (ascending) of the first claim on each object, among claims (N,) on numbered objects."""
    places = np.arange(len(objects))
    first = np.empty(objects.max(initial=-1) + 1, dtype=np.int64)
    first[objects[::-1]] = places[::-1]  # of several values for one place the last stays
    return np.flatnonzero(first[objects] == places)


def list_objects(ground_truth: Sequence[dict]) -> Objects:
    """The objects of Detectron2's dataset dicts; one that says nothing about its difficulty is not difficult."""
    annotations = [(image, box) for image, record in enumerate(ground_truth) for box in record["annotations"]]
    return Objects(
        np.array([image for image, _ in annotations], dtype=np.int64),
        np.array([box["category_id"] for _, box in annotations], dtype=np.int64),
        np.array([box["bbox"] for _, box in annotations], dtype=np.float64).reshape(-1, 4),
        np.array([box.get("difficult", 0) for _, box in annotations], dtype=bool),
    )


def match_classes(objects: Objects, detections: Detections, classes: int) -> list[Matches]:
    """The matches of each class."""
    order = np.lexsort((-np.asarray(detections.score, dtype=np.float64), detections.category))
    bounds = np.searchsorted(detections.category[order], np.arange(classes + 1))
    matches = []
    for category in range(classes):
        own = np.flatnonzero(objects.category == category)
        rows = order[bounds[category] : bounds[category + 1]]
        nearest, iou = nearest_objects(
            objects.image[own], objects.box[own], detections.image[rows], detections.box[rows]
        )
        matches.append(Matches(rows, own[nearest] if len(own) else nearest, iou))
    return matches


def nearest_objects(
    gt_image: np.ndarray, gt_box: np.ndarray, det_image: np.ndarray, det_box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the first object of the highest IoU in its image, and that IoU; 0, 0 without any.

    `gt_image` is ascending. All pairs of an image are laid out one after another, detection by detection.
    """
    start = np.searchsorted(gt_image, det_image)
    pairs = np.searchsorted(gt_image, det_image, side="right") - start
    iou, match = np.zeros(len(det_image)), np.zeros(len(det_image), dtype=np.int64)
    paired = np.flatnonzero(pairs)
    if len(paired):
        start, pairs = start[paired], pairs[paired]
        first = np.cumsum(pairs) - pairs
        gt = np.arange(pairs.sum()) + np.repeat(start - first, pairs)
        overlap = _pairwise_iou(np.repeat(det_box[paired], pairs, axis=0), gt_box[gt])
        iou[paired] = np.maximum.reduceat(overlap, first)
        is_best = overlap == np.repeat(iou[paired], pairs)
        match[paired] = np.minimum.reduceat(np.where(is_best, gt, len(gt_box)), first)
    return match, iou


def box_area(box: np.ndarray) -> np.ndarray:
    """Areas (N,) of boxes (N, 4), XYXY."""
    return (box[:, 2:] - box[:, :2]).prod(axis=1)


def box_aspect(box: np.ndarray) -> np.ndarray:
    """Width by height (N,) of boxes (N, 4), XYXY; infinite without height, nan without both."""
    width, height = (box[:, 2:] - box[:, :2]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return width / height


def _pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of the boxes (N, 4) in the same rows, 0 where both are empty."""
    size = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = size.clip(min=0).prod(axis=1)
    union = box_area(a) + box_area(b) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
