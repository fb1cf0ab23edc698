"""Two detectors on the same photographs: what each finds, where they agree and where they differ."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from detectron2.structures import BoxMode
from torchvision.ops import box_iou

from common.prediction import Prediction
from detection.matching import Detections

SAME_PLACE_IOU = 0.5


def to_objects(prediction: Prediction) -> list[dict]:
    """Objects as dicts of `class` (its name), `score` and `bbox` (x, y, width, height), best first."""
    boxes = BoxMode.convert(np.asarray(prediction.boxes), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    rows = zip(prediction.names, prediction.scores.tolist(), boxes.tolist(), strict=True)
    return [{"class": name, "score": score, "bbox": box} for name, score, box in rows]


def corners(objects: Sequence[dict]) -> torch.Tensor:
    """The boxes of objects as XYXY, float64, shape (N, 4)."""
    boxes = torch.tensor([found["bbox"] for found in objects], dtype=torch.float64).reshape(-1, 4)
    return BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)


def to_detections(found: Sequence[Sequence[dict]], class_names: Sequence[str]) -> Detections:
    """The objects found in each image of a dataset, in the form that the evaluation reads."""
    category = {name: number for number, name in enumerate(class_names)}
    objects = [box for image in found for box in image]
    return Detections(
        np.repeat(np.arange(len(found)), [len(image) for image in found]),
        np.array([category[box["class"]] for box in objects], dtype=np.int64),
        np.array([box["score"] for box in objects], dtype=np.float64),
        corners(objects).numpy(),
    )


def agreements(names: Sequence[str]) -> list[str]:
    """How two detectors of these names may agree on an object."""
    return ["both", "other class", *(f"only {name}" for name in names)]


def compare(found: Mapping[str, Sequence[dict]]) -> list[dict]:
    """Pairs what two detectors found in one photograph.

    Objects of one class with an IoU of 0.5 or more are paired, best overlap first, each at most once. Those left over
    are then paired in the same way with objects of other classes.

    Args:
        found: name of the detector -> objects as `to_objects` gives them, for two detectors.

    Returns:
        Dicts of `agreement` (one of `agreements`), `iou` and, under each detector's name, its object; None where there
        is none. Sorted by agreement, then as found.
    """
    first, second = found.values()
    iou = box_iou(corners(first), corners(second)).numpy()
    is_same_class = np.array([[a["class"] == b["class"] for b in second] for a in first], dtype=bool).reshape(iou.shape)
    kinds = agreements(list(found))
    free = set(range(len(first))), set(range(len(second)))
    rows: list[tuple[str, float | None, dict | None, dict | None]] = []
    for agreement, allowed in zip(kinds, (is_same_class, ~is_same_class), strict=False):
        places = map(tuple, np.argwhere(allowed & (iou >= SAME_PLACE_IOU)).tolist())
        pairs = []
        for i, j in sorted(places, key=lambda place: -iou[place]):
            if i in free[0] and j in free[1]:
                free[0].remove(i)
                free[1].remove(j)
                pairs.append((i, j))
        rows += [(agreement, float(iou[i, j]), first[i], second[j]) for i, j in sorted(pairs)]
    rows += [(kinds[2], None, first[i], None) for i in sorted(free[0])]
    rows += [(kinds[3], None, None, second[j]) for j in sorted(free[1])]
    return [dict(zip(("agreement", "iou", *found), row, strict=True)) for row in rows]


def photographs_table(photographs: Sequence[dict], names: Sequence[str]) -> pd.DataFrame:
    """One photograph a row: how many objects each detector found, how they agree, and the milliseconds.

    Args:
        photographs: dicts of `file_name`, `milliseconds` (by name of the detector) and `objects` (of `compare`).
        names: names of the detectors.

    Returns:
        The table; its last row has the sums, and the medians of the times.
    """
    rows = []
    for photograph in photographs:
        pairs = photograph["objects"]
        count = Counter(pair["agreement"] for pair in pairs)
        row = {"photograph": photograph["file_name"]}
        row |= {name: sum(pair[name] is not None for pair in pairs) for name in names}
        row |= {agreement: count[agreement] for agreement in agreements(names)}
        rows.append(row | {f"{name} ms": photograph["milliseconds"][name] for name in names})
    table = pd.DataFrame(rows)
    times, counts = [f"{name} ms" for name in names], [*names, *agreements(names)]
    total = {"photograph": "sum, median ms", **table[counts].sum(), **table[times].median()}
    return pd.concat([table, pd.DataFrame([total])], ignore_index=True)


def objects_table(photographs: Sequence[dict], names: Sequence[str]) -> pd.DataFrame:
    """One object a row: the photograph, the agreement, the IoU, and class, score and box of each detector.

    Args:
        photographs: as for `photographs_table`.
        names: names of the detectors.
    """
    keys = ("class", "score", "x", "y", "width", "height")
    columns = ["photograph", "agreement", "iou", *(f"{name} {key}" for name in names for key in keys)]
    rows = []
    for photograph in photographs:
        for pair in photograph["objects"]:
            row = [photograph["file_name"], pair["agreement"], pair["iou"]]
            for name in names:
                found = pair[name]
                row += [found["class"], found["score"], *found["bbox"]] if found else [None] * len(keys)
            rows.append(row)
    return pd.DataFrame(rows, columns=columns)
