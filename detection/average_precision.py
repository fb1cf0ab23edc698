"""Average precision from the matches of `detection.matching`: both VOC definitions, and by size or shape of object.

Sources: Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2 (11 points);
development kit of VOC2010, section 3.4.1 (area under the curve); sizes: cocodataset.org, "Detection Evaluation".
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from detection.matching import Detections, Matches, Objects

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
RECALLS = np.arange(0.0, 1.1, 0.1)
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # areas, the bounds included
ASPECTS = {"tall": (0, 2 / 3), "square": (2 / 3, 3 / 2), "wide": (3 / 2, math.inf)}  # width / height, likewise


def precision_recall(true: np.ndarray, counts: np.ndarray, gts: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at each true positive, from what `Matches.judge` says and the number of objects."""
    found = np.arange(1, len(true) + 1)
    return found / gts, found / np.cumsum(counts)[true]


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall or beyond (VOC2007).

    The recalls are the devkit's floating-point numbers: its 0.3, for one, is just above 3/10 and not reached by it.

    Args:
        recall: (N,) ascending.
        precision: (N,) precision at these recalls.
    """
    beyond = np.append(highest_beyond(precision), 0.0)
    return float(beyond[np.searchsorted(recall, RECALLS)].mean())


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the highest precision at each recall or beyond (VOC2010 and later).

    Args:
        recall: (N,) ascending.
        precision: (N,) precision at these recalls.
    """
    return float((np.diff(recall, prepend=0.0) * highest_beyond(precision)).sum())


def highest_beyond(precision: np.ndarray) -> np.ndarray:
    """The highest precision at each place or beyond, along the first axis."""
    return np.maximum.accumulate(precision[::-1])[::-1]


def evaluate_groups(
    groups: Mapping[str, tuple[float, float]],
    measure: Callable[[np.ndarray], np.ndarray],
    objects: Objects,
    detections: Detections,
    matches: Sequence[Matches],
) -> dict[str, dict[str, float]]:
    """How objects of each size are found, or of each shape.

    As with COCO, objects of other groups are ignored like difficult ones, and so is a detection of another group that
    has found no object of its class. The rest is VOC's matching.

    Args:
        groups: name -> the lowest and the highest measure in the group, `SIZES` or `ASPECTS`.
        measure: of boxes (N, 4), XYXY: `box_area` or `box_aspect`.
        objects: of the dataset.
        detections: on it.
        matches: of each class.

    Returns:
        Group -> `gts`, and means over the classes with such objects: `recall` at IoU 0.5, `AP50`, and `AP`, the mean
        over the IoU thresholds 0.50, 0.55, ..., 0.95, both areas under the curve; nan where there are no such objects.
    """
    found = {}
    measure_of_objects, measure_of_detections = measure(objects.box), measure(detections.box)
    for name, (low, high) in groups.items():
        is_ignored = objects.is_difficult | ~((measure_of_objects >= low) & (measure_of_objects <= high))
        is_in_group = (measure_of_detections >= low) & (measure_of_detections <= high)
        gts = np.bincount(objects.category[~is_ignored], minlength=len(matches))
        figures = []
        for match, asked in zip(matches, gts.tolist(), strict=True):
            if asked:
                points = []
                for threshold in IOU_THRESHOLDS:
                    true, counts = match.judge(threshold, is_ignored)
                    counts &= is_in_group[match.detection] | (match.iou > threshold)
                    points.append(precision_recall(true, counts, asked))
                areas = [area_ap(*point) for point in points]
                figures.append((len(points[0][0]) / asked, areas[0], float(np.mean(areas))))
        means = np.mean(figures, axis=0).tolist() if figures else [math.nan] * 3
        found[name] = {"gts": int(gts.sum())} | dict(zip(("recall", "AP50", "AP"), means, strict=True))
    return found
