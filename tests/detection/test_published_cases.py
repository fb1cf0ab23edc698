"""Small cases whose precision, recall or AP other projects state in their own tests, retyped as numbers.

Overlaps of inclusive pixels are those of continuous boxes that end one pixel later.
"""

import numpy as np
import pytest
from pytest import approx

from detection.average_precision import area_ap, eleven_point_ap, precision_recall
from detection.evaluation import evaluate_voc
from detection.matching import Detections, list_objects, match_classes


def truth(images: int, *objects: tuple) -> list[dict]:
    """Dataset dicts of objects (image, class, x0, y0, x1, y1, difficult)."""
    records: list[dict] = [{"annotations": []} for _ in range(images)]
    for image, category, *box, difficult in objects:
        records[image]["annotations"].append({"category_id": category, "bbox": box, "difficult": difficult})
    return records


def found(*rows: tuple) -> Detections:
    """Of (image, class, score, x0, y0, x1, y1)."""
    table = np.array(rows, dtype=float)
    return Detections(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2], table[:, 3:])


def curves(records: list[dict], detections: Detections, classes: int, threshold: float) -> list[tuple]:
    """Recall and precision of each class at any threshold of the overlap."""
    objects = list_objects(records)
    gts = np.bincount(objects.category[~objects.is_difficult], minlength=classes)
    matches = match_classes(objects, detections, classes)
    return [precision_recall(*m.judge(threshold, objects.is_difficult), n) for m, n in zip(matches, gts, strict=True)]


# github.com/rafaelpadilla/Object-Detection-Metrics: groundtruths/ and detections/, image, (score,) left, top, width,
# height. The figures are those of tests/test_eval_pascal.py in the same author's review_object_detection_metrics.
PADILLA_OBJECTS = [
    (0, 25, 16, 38, 56), (0, 129, 123, 41, 62), (1, 123, 11, 43, 55), (1, 38, 132, 59, 45), (2, 16, 14, 35, 48),
    (2, 123, 30, 49, 44), (2, 99, 139, 47, 47), (3, 53, 42, 40, 52), (3, 154, 43, 31, 34), (4, 59, 31, 44, 51),
    (4, 48, 128, 34, 52), (5, 36, 89, 52, 76), (5, 62, 58, 44, 67), (6, 28, 31, 55, 63), (6, 58, 67, 50, 58),
]  # fmt: skip
PADILLA_FOUND = [
    (0, 0.88, 5, 67, 31, 48), (0, 0.70, 119, 111, 40, 67), (0, 0.80, 124, 9, 49, 67), (1, 0.71, 64, 111, 64, 58),
    (1, 0.54, 26, 140, 60, 47), (1, 0.74, 19, 18, 43, 35), (2, 0.18, 109, 15, 77, 39), (2, 0.67, 86, 63, 46, 45),
    (2, 0.38, 160, 62, 36, 53), (2, 0.91, 105, 131, 47, 47), (2, 0.44, 18, 148, 40, 44), (3, 0.35, 83, 28, 28, 26),
    (3, 0.78, 28, 68, 42, 67), (3, 0.45, 87, 89, 25, 39), (3, 0.14, 10, 155, 60, 26), (4, 0.62, 50, 38, 28, 46),
    (4, 0.44, 95, 11, 53, 28), (4, 0.95, 29, 131, 72, 29), (4, 0.23, 29, 163, 72, 29), (5, 0.45, 43, 48, 74, 38),
    (5, 0.84, 17, 155, 29, 35), (5, 0.43, 95, 110, 25, 42), (6, 0.48, 16, 20, 101, 88), (6, 0.95, 33, 116, 37, 49),
]  # fmt: skip


@pytest.mark.parametrize(
    ("threshold", "eleven", "area"),
    [(0.1, 0.3333333333, 0.3371980676), (0.3, 0.2683982683, 0.2456866804), (0.5, 0.0303030303, 0.0222222222),
     (0.75, 0, 0)],
)  # fmt: skip
def test_padilla(threshold: float, eleven: float, area: float):
    records = truth(7, *((image, 0, x, y, x + w + 1, y + h + 1, 0) for image, x, y, w, h in PADILLA_OBJECTS))
    detections = found(*((image, 0, score, x, y, x + w + 1, y + h + 1) for image, score, x, y, w, h in PADILLA_FOUND))
    (curve,) = curves(records, detections, 1, threshold)
    assert eleven_point_ap(*curve) == approx(eleven, abs=1e-10)
    assert area_ap(*curve) == approx(area, abs=1e-10)


@pytest.mark.parametrize("difficult", [[], [(0, 0, 1, 1, 2, 2, 1)]])
def test_chainercv_one_box(difficult: list[tuple]):
    """github.com/chainer/chainercv: tests/evaluations_tests/test_eval_detection_voc.py, a difficult box or none.

    Stated are recall (0, 0, 1) and precision (0, 0, 1/3) at IoU 0.5, and nothing right at 0.97.
    """
    records = truth(1, (0, 0, 0, 0, 1, 0.9, 0), *difficult)
    detections = found((0, 0, 0.8, 0, 0, 1, 1), (0, 0, 0.9, 0, 0, 2, 2), (0, 0, 1, 0.3, 0.3, 0.5, 0.5))
    ((recall, precision),) = curves(records, detections, 1, 0.5)
    assert (recall.tolist(), precision.tolist()) == ([1], [approx(1 / 3)])
    ((recall, _),) = curves(records, detections, 1, 0.97)
    assert not len(recall)


def test_chainercv_several_boxes():
    """The same file: two classes on two images at IoU 0.4."""
    records = truth(2, (0, 0, 0, 0, 1, 1, 0), (0, 0, 1, 0, 4, 4, 0), (1, 1, 2, 2, 3, 3, 0))
    detections = found(
        (0, 0, 1, 0, 4, 1, 5), (0, 0, 0.9, 0, 0, 1, 1), (1, 0, 0.7, 0, 0, 2, 2),
        (1, 1, 0.6, 2, 2, 3, 3), (1, 1, 0.8, 5, 5, 7, 7),
    )  # fmt: skip
    at = curves(records, detections, 2, 0.4)
    assert [area_ap(*curve) for curve in at] == approx([0.25, 0.5])
    assert [eleven_point_ap(*curve) for curve in at] == approx([0.5 / 11 * 6, 0.5])


def test_tensorflow_object_detection():
    """github.com/tensorflow/models: research/object_detection/utils/object_detection_evaluation_test.py, Pascal."""
    records = truth(
        3, (0, 0, 0, 0, 1, 1, 0), (0, 2, 0, 0, 2, 2, 0), (0, 0, 0, 0, 3, 3, 0), (1, 0, 10, 10, 11, 11, 0),
        (1, 0, 500, 500, 510, 510, 1), (1, 2, 10, 10, 12, 12, 0), (2, 1, 0, 0, 1, 1, 0),
    )  # fmt: skip
    detections = found(
        (1, 0, 0.7, 10, 10, 11, 11), (1, 0, 0.8, 100, 100, 120, 120), (1, 2, 0.9, 100, 100, 220, 220)
    )  # fmt: skip
    evaluation = evaluate_voc(records, detections, ["cat", "dog", "elephant"])
    assert [row["AP50"] for row in evaluation.per_class.values()] == approx([0.16666666, 0, 0])
    assert evaluation.metrics["AP50"] == approx(0.05555555)


@pytest.mark.parametrize("images", [1, 2])
def test_mmdetection(images: int):
    """github.com/open-mmlab/mmdetection: tests/test_metrics/test_mean_ap.py, inclusive pixels; y1 is the score too."""
    objects = [(0, 0, 0, 10, 20, 0), (1, 0, 10, 10, 19, 0), (1, 10, 10, 20, 20, 0), (0, 5, 5, 10, 20, 1),
               (1, 6, 10, 10, 19, 1)]  # fmt: skip
    boxes = [(0, 0, 10, 10), (10, 10, 20, 20), (32, 32, 38, 42)]
    records = truth(
        images, *((i, c, x0, y0, x1 + 1, y1 + 1, d) for i in range(images) for c, x0, y0, x1, y1, d in objects)
    )
    detections = found(
        *((i, c, y1, x0, y0, x1 + 1, y1 + 1) for i in range(images) for c in (0, 1) for x0, y0, x1, y1 in boxes)
    )
    assert 0.291 < evaluate_voc(records, detections, ["a", "b"]).metrics["AP50"] < 0.293
