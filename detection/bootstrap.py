"""How far a mean average precision may be chance: a bootstrap over the images of the test set.

A resample draws as many images as there are, with replacement. What an image adds to the curves does not depend on the
others, so that a resample only weighs detections and objects anew; an image drawn twice counts as two. Two detectors
are compared on the same resamples, which leaves their difference far less spread than either of them.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from detection.average_precision import RECALLS, highest_beyond
from detection.matching import Detections, Matches, list_objects, match_classes

RESAMPLES = 1000
SEED = 0
IOU = 0.5


def resample_ap(
    ground_truth: Sequence[dict], detections: Detections, classes: int, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """The mean AP at IoU 0.5 of each resample, over the classes that have objects in it.

    Args:
        ground_truth: Detectron2 dataset dicts with `annotations`, as for `evaluate_voc`.
        detections: detections on these images.
        classes: number of classes.
        resamples: how many.

    Returns:
        `AP50_11point` and `AP50` -> (resamples,) from 0 to 1, nan where no class has an object.

    Raises:
        ValueError: `detections` name an image or a class that does not exist.
    """
    images = len(ground_truth)
    detections.check(images, classes)
    weight = torch.from_numpy(draw_images(images, resamples))
    objects = list_objects(ground_truth)
    sums = {"AP50_11point": np.zeros(resamples), "AP50": np.zeros(resamples)}
    classes_asked = np.zeros(resamples)
    for category, match in enumerate(match_classes(objects, detections, classes)):
        asked = objects.image[(objects.category == category) & ~objects.is_difficult]
        gts = weight[asked].sum(dim=0).numpy()
        recall, precision = _weighted_curve(match, objects.is_difficult, detections.image, weight, gts)
        beyond = highest_beyond(precision)
        levels = [np.max(beyond, axis=0, where=recall >= level, initial=0) for level in RECALLS]
        sums["AP50_11point"] += np.mean(levels, axis=0)
        sums["AP50"] += (np.diff(recall, axis=0, prepend=0) * beyond).sum(axis=0)
        classes_asked += gts > 0
    return {name: values / np.where(classes_asked, classes_asked, np.nan) for name, values in sums.items()}


def draw_images(images: int, resamples: int) -> np.ndarray:
    """How often each resample has each image: (images, resamples), float32; the same for equal numbers of both."""
    drawn = np.random.default_rng(SEED).integers(images, size=(resamples, images))
    cells = drawn + images * np.arange(resamples)[:, None]
    counts = np.bincount(cells.ravel(), minlength=images * resamples).reshape(resamples, images)
    return np.ascontiguousarray(counts.T, dtype=np.float32)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bounds of the middle 95 % of resampled figures, ignoring nan; nan if all are nan."""
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def _weighted_curve(
    match: Matches, is_difficult: np.ndarray, image: np.ndarray, weight: torch.Tensor, gts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision of each resample at the true positives of one class, (true positives, resamples)."""
    true, counts = match.judge(IOU, is_difficult)
    places = np.cumsum(counts)[true]  # of each true positive among the detections that count, from 1
    counted = torch.from_numpy(image[match.detection[counts]][: places[-1] if len(places) else 0])
    starts = torch.from_numpy(np.append(0, places[:-1])[: len(places)])
    found = weight[torch.from_numpy(image[match.detection[true]])].cumsum(dim=0, dtype=torch.float64).numpy()
    # From one true positive to the next, without a matrix of all detections by all resamples.
    seen = embedding_bag(counted, weight, starts, mode="sum").cumsum(dim=0).numpy()
    return found / np.maximum(gts, 1), found / np.maximum(seen, 1)
