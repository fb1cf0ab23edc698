"""Random scenes for the evaluation, with everything in them that its rules tell apart."""

from collections.abc import Sequence

import numpy as np

from detection.matching import Detections

CLASSES = ["cat", "dog", "hen", "cow", "owl", "ant"]
NO_GT, ONLY_DIFFICULT, NO_DETECTIONS = 3, 4, 5  # what is special about the last three


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


def area(box: Sequence[float]) -> float:
    """Area of a box, XYXY."""
    return (box[2] - box[0]) * (box[3] - box[1])


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, XYXY; 0 where both are empty."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    union = area(a) + area(b) - shared
    return shared / union if union else 0.0
