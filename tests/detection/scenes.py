"""Random scenes with everything that the rules of the evaluation tell apart, and those rules in plain loops."""

import math
from collections.abc import Sequence

import numpy as np

from detection.matching import Detections

CLASSES = ["cat", "dog", "hen", "cow", "owl", "ant"]
NO_GT, ONLY_DIFFICULT, NO_DETECTIONS = 3, 4, 5  # what is special about the last three
ONE_BASED = np.array([1, 1, 0, 0])  # from continuous pixels counted from 0 to inclusive ones counted from 1
THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]


def scene(seed: int, images: int = 40, tied: bool = True) -> tuple[list[dict], Detections]:
    """Crowded scenes with difficult and repeated objects, images without objects and images without detections.

    All coordinates are quarters of a pixel, on which floating-point areas are exact in any convention.
    """
    rng = np.random.default_rng(seed)

    def boxes(n: int) -> np.ndarray:
        corner = rng.integers(0, 60, (n, 2))
        return np.concatenate([corner, corner + rng.integers(5, 40, (n, 2))], axis=1).astype(float)

    records, image, category, box = [], [], [], []
    for number in range(images):
        n = 0 if number % 7 == 0 else int(rng.integers(1, 8))
        gt = boxes(n)
        if n > 2:
            gt[1] = gt[0]  # the same box twice
        labels = rng.choice([0, 0, 1, 2, ONLY_DIFFICULT, NO_DETECTIONS], n)
        difficult = (rng.random(n) < 0.3) | (labels == ONLY_DIFFICULT)
        annotations = [
            {"bbox": b.tolist(), "category_id": int(c), "difficult": int(d)}
            for b, c, d in zip(gt, labels, difficult, strict=True)
        ]
        records.append({"image_id": f"{number:06d}", "annotations": annotations})
        if number % 5 == 0:
            continue
        near = np.repeat(gt, 3, axis=0) + rng.integers(-10, 11, (3 * n, 4)) / 4
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])  # some are empty
        far = boxes(6)
        hits = np.where(rng.random(3 * n) < 0.9, np.repeat(labels, 3), 2)
        labels = np.concatenate([np.where(hits == NO_DETECTIONS, 0, hits), rng.integers(0, NO_DETECTIONS, 6)])
        box.append(np.concatenate([near, far]))
        category.append(labels)
        image.append(np.full(len(labels), number))
    box = np.concatenate(box)
    score = rng.integers(0, 10, len(box)) / 10 if tied else rng.permutation(len(box)) / len(box)
    order = rng.permutation(len(box))
    return records, Detections(
        np.concatenate(image)[order], np.concatenate(category)[order].astype(np.int64), score[order], box[order]
    )


def objects(*boxes: tuple[float, ...], difficult: tuple[int, ...] = ()) -> list[dict]:
    """One image with objects of class 0."""
    annotations = [{"bbox": list(b), "category_id": 0, "difficult": int(i in difficult)} for i, b in enumerate(boxes)]
    return [{"image_id": "000001", "annotations": annotations}]


def detect(*rows: tuple[float, ...]) -> Detections:
    """Detections (score, x0, y0, x1, y1) of class 0 on image 0."""
    table = np.array(rows, dtype=float).reshape(-1, 5)
    zeros = np.zeros(len(table), dtype=np.int64)
    return Detections(zeros, zeros, table[:, 0], table[:, 1:])


def area(box: Sequence[float]) -> float:
    """Area of a box, XYXY."""
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, XYXY; 0 where both are empty."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0


def plain_devkit(records: list[dict], detections: Detections, category: int, threshold: float) -> dict[str, float]:
    """The devkit's rules in plain loops, on inclusive pixels counted from 1 as it has them."""
    objects = [
        [
            (a["bbox"][0] + 1, a["bbox"][1] + 1, a["bbox"][2], a["bbox"][3], a["difficult"])
            for a in record["annotations"]
            if a["category_id"] == category
        ]
        for record in records
    ]
    gts = sum(not difficult for boxes in objects for *_, difficult in boxes)
    rows = [row for row in range(len(detections.score)) if detections.category[row] == category]
    rows.sort(key=lambda row: -detections.score[row])  # Python's sort is stable
    claimed, true, false, points = set(), 0, 0, []
    for row in rows:
        image = int(detections.image[row])
        x0, y0, x1, y1 = detections.box[row] + ONE_BASED
        best, best_object = 0.0, None
        for number, (left, top, right, bottom, _) in enumerate(objects[image]):
            width = max(min(x1, right) - max(x0, left) + 1, 0)
            height = max(min(y1, bottom) - max(y0, top) + 1, 0)
            union = (x1 - x0 + 1) * (y1 - y0 + 1) + (right - left + 1) * (bottom - top + 1) - width * height
            if width * height / union > best:
                best, best_object = width * height / union, number
        if best > threshold:
            if objects[image][best_object][4]:
                pass
            elif (image, best_object) in claimed:
                false += 1
            else:
                claimed.add((image, best_object))
                true += 1
        else:
            false += 1
        points.append((true / gts if gts else math.nan, true / max(true + false, 1e-300)))
    if not gts:
        return {"gts": 0, "dets": len(rows), "recall": math.nan, "eleven": math.nan, "area": math.nan}
    eleven = sum(max((p for r, p in points if r >= 0.1 * i), default=0.0) for i in range(11)) / 11
    area, last = 0.0, 0.0
    for recall in sorted({r for r, _ in points}):
        area += (recall - last) * max(p for r, p in points if r >= recall)
        last = recall
    return {"gts": gts, "dets": len(rows), "recall": last, "eleven": eleven, "area": area}
