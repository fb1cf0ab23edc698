"""Average precision by hand, and that of objects of one size or shape against the plain devkit."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pytest import approx

from detection.average_precision import area_ap, eleven_point_ap
from detection.evaluation import evaluate_voc
from detection.matching import Detections
from tests.detection.scenes import CLASSES, THRESHOLDS, area, detect, iou, objects, plain_devkit, scene


def test_average_precision_formulas_by_hand():
    assert eleven_point_ap(np.array([]), np.array([])) == area_ap(np.array([]), np.array([])) == 0
    recall, precision = np.array([0.25, 0.5, 0.75]), np.array([0.5, 1.0, 0.6])
    assert area_ap(recall, precision) == approx(0.5 * 1 + 0.25 * 0.6)
    assert eleven_point_ap(recall, precision) == approx((6 * 1 + 2 * 0.6) / 11)  # 0 to 0.5, then 0.6 and 0.7
    # The devkit's third step is 0.1 * 3 = 0.30000000000000004: three objects of ten do not reach it.
    assert eleven_point_ap(np.array([0.1, 0.2, 3 / 10]), np.ones(3)) == approx(3 / 11)


def aspect(box: Sequence[float]) -> float:
    height = box[3] - box[1]
    return (box[2] - box[0]) / height if height else math.inf


GROUPS = {
    "sizes": (area, {"small": (0, 1024), "medium": (1024, 9216), "large": (9216, math.inf)}),
    "aspects": (aspect, {"tall": (0, 1 / 1.5), "square": (1 / 1.5, 1.5), "wide": (1.5, math.inf)}),
}


@pytest.mark.parametrize(("seed", "kind"), [(0, "sizes"), (1, "sizes"), (2, "aspects")])
def test_groups_are_the_plain_devkit_with_other_groups_made_difficult(seed: int, kind: str):
    measure, groups = GROUPS[kind]
    records, detections = scene(seed)
    detections = replace(detections, box=3 * detections.box)
    for record in records:
        for annotation in record["annotations"]:
            annotation["bbox"] = [3 * side for side in annotation["bbox"]]
    found_by_group = getattr(evaluate_voc(records, detections, CLASSES), kind)
    for group, (low, high) in groups.items():
        judged = [
            {
                "annotations": [
                    a | {"difficult": a["difficult"] or not low <= measure(a["bbox"]) <= high} for a in annotations
                ]
            }
            for annotations in (record["annotations"] for record in records)
        ]
        at = {}
        for threshold in THRESHOLDS:
            # A detection of another group stays only where it has found something.
            rows = [
                row
                for row, box in enumerate(detections.box)
                if low <= measure(box) <= high
                or any(
                    iou(box, a["bbox"]) > threshold
                    for a in records[detections.image[row]]["annotations"]
                    if a["category_id"] == detections.category[row]
                )
            ]
            kept = Detections(*(array[rows] for array in vars(detections).values()))
            found = [plain_devkit(judged, kept, category, threshold) for category in range(len(CLASSES))]
            at[threshold] = pd.DataFrame(found).query("gts > 0")
        assert (len(at[0.5]) > 0) and found_by_group[group] == approx(
            {
                "gts": at[0.5]["gts"].sum(),
                "recall": at[0.5]["recall"].mean(),
                "AP50": at[0.5]["area"].mean(),
                "AP": np.mean([table["area"].mean() for table in at.values()]),
            },
            abs=1e-9,
        )


def test_sizes_by_hand():
    small, large = (0, 0, 32, 32), (200, 200, 300, 300)  # an area on the bound is of both sizes
    sizes = evaluate_voc(objects(small, large), detect((0.9, *large), (0.95, 50, 50, 60, 60)), ["cat"]).sizes
    assert sizes["small"] == sizes["medium"] == {"gts": 1, "recall": 0, "AP50": 0, "AP": 0}
    assert sizes["large"] == {"gts": 1, "recall": 1, "AP50": 1, "AP": 1}
    nothing = evaluate_voc(objects(small), detect(), ["cat"]).sizes["large"]
    assert nothing == approx({"gts": 0, "recall": math.nan, "AP50": math.nan, "AP": math.nan}, nan_ok=True)


def test_aspects_by_hand():
    tall, square, wide, bound = (0, 0, 20, 60), (100, 0, 140, 50), (0, 100, 90, 130), (200, 0, 230, 20)
    found = detect((0.9, *tall), (0.8, 300, 300, 310, 390), (0.7, *wide), (0.6, *bound))
    aspects = evaluate_voc(objects(tall, square, wide, bound), found, ["cat"]).aspects
    assert aspects["tall"] == {"gts": 1, "recall": 1, "AP50": 1, "AP": 1}  # the other tall one comes after
    assert aspects["square"] == {"gts": 2, "recall": 0.5, "AP50": 0.5, "AP": 0.5}  # 30 by 20 is square and wide
    assert aspects["wide"] == {"gts": 2, "recall": 1, "AP50": 1, "AP": 1}
    # A box without an area has no shape.
    empty = evaluate_voc(objects(tall), detect((0.9, 5, 5, 5, 5), (0.8, *tall)), ["cat"]).aspects
    assert empty["tall"]["AP50"] == 1
