"""The bootstrap against one that repeats images and evaluates them anew."""

import numpy as np
import pytest
from pytest import approx

from detection.bootstrap import draw_images, interval, resample_ap
from detection.evaluation import evaluate_voc
from detection.matching import Detections
from tests.detection.scenes import CLASSES, scene


@pytest.mark.parametrize(("seed", "images"), [(0, 40), (1, 12)])
def test_each_resample_is_the_evaluation_of_its_images(seed: int, images: int):
    records, detections = scene(seed, images, tied=False)
    found = resample_ap(records, detections, len(CLASSES), resamples=10)
    times = draw_images(images, 10)
    assert (times.sum(axis=0) == images).all() and times.max() > 2
    for number, of_image in enumerate(times.T.astype(int)):
        chosen = np.repeat(np.arange(images), of_image)
        rows = [np.flatnonzero(detections.image == image) for image in chosen]
        table = {name: array[np.concatenate(rows)] for name, array in vars(detections).items()}
        table["image"] = np.repeat(np.arange(images), list(map(len, rows)))
        metrics = evaluate_voc([records[image] for image in chosen], Detections(**table), CLASSES).metrics
        for name, values in found.items():
            assert values[number] == approx(metrics[name], abs=1e-9)


def test_the_spread_is_that_of_the_share_of_good_images():
    """Each image has one object, found in three of four: AP50 of a resample is the share of those images in it."""
    images = 200
    records = [{"annotations": [{"bbox": [0, 0, 9, 9], "category_id": 0}]}] * images
    good = np.flatnonzero(np.arange(images) % 4)
    zeros = np.zeros(len(good), dtype=np.int64)
    detections = Detections(good, zeros, zeros + 0.5, np.tile([0.0, 0, 9, 9], (len(good), 1)))
    values = resample_ap(records, detections, 1, resamples=4000)["AP50"]
    error = np.sqrt(0.75 * 0.25 / images)
    assert values.mean() == approx(0.75, abs=0.1 * error)
    assert interval(values) == approx((0.75 - 1.96 * error, 0.75 + 1.96 * error), abs=0.2 * error)
    # On the same resamples a detector is as good as itself.
    assert (resample_ap(records, detections, 1, resamples=4000)["AP50"] == values).all()


def test_nothing_found_is_zero_and_nothing_to_find_is_nan():
    records, detections = scene(0, images=8)
    nothing = Detections(*(array[:0] for array in vars(detections).values()))
    assert (resample_ap(records, nothing, len(CLASSES), resamples=5)["AP50"] == 0).all()
    unknown = resample_ap([{"annotations": []}], nothing, 1, resamples=5)["AP50"]
    assert np.isnan([*unknown, *interval(unknown)]).all()
