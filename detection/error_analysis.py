"""What a detector does wrong, and what each kind of error costs: the analysis of TIDE on Pascal VOC's terms.

A detection that the evaluation counts as false is of the first of these kinds whose condition it fulfils; "found place"
is an intersection over union above 0.5, "near" one of at least 0.1:

    localisation  near an object of its class, its place not found
    class         the place of an object of another class
    duplicate     the place of an object of its class, which a detection of higher score has found
    both          near an object of another class, its place not found
    background    near no object

and an object is `missed` if no detection has found it, nor would have with its class or its place put right.

The cost of a kind is the rise of AP50 when an oracle mends that kind alone. A detection with a wrong class or place
takes that of its object, unless the object is found already or a better scored detection of the same kind takes it;
such a detection, and every one of the other kinds, is removed; missed objects are no longer asked for. Costs do not add
up to 1 - AP50, as precision and recall are not additive, but mending all kinds at once gives AP50 = 1.

Matching is that of `detection.matching`, average precision that of `detection.evaluation`. Difficult objects are
objects here: a detection moved to one is ignored from then on, and none is ever missed.

Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020. The order of the
kinds, which the paper leaves open, is that of its authors' program.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from detection.evaluation import evaluate_voc
from detection.matching import Detections, list_objects, match_classes, nearest_objects

KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")
FOUND_IOU = 0.5
NEAR_IOU = 0.1


@dataclass(frozen=True)
class ErrorKinds:
    """The outcome of every detection and object. Objects are numbered through all images, in the order given.

    Attributes:
        kind: (N,) strings, of `KINDS` without "missed", or "correct" or "ignored".
        target: (N,) integers, the object that the detection is held against; meaningless for "background".
        is_missed: (G,) booleans.
    """

    kind: np.ndarray
    target: np.ndarray
    is_missed: np.ndarray


@dataclass(frozen=True)
class ErrorAnalysis:
    """What `analyse_errors` found.

    Attributes:
        ap50: mean area under the precision-recall curves at IoU 0.5, from 0 to 1; nan without objects.
        count: kind -> number of detections, for "missed" of objects.
        cost: kind -> rise of `ap50` when this kind alone is mended.
    """

    ap50: float
    count: dict[str, int]
    cost: dict[str, float]


def analyse_errors(ground_truth: Sequence[dict], detections: Detections, class_names: Sequence[str]) -> ErrorAnalysis:
    """Counts the errors of each of `KINDS` and finds what they cost.

    Args:
        ground_truth: Detectron2 dataset dicts with `annotations`, as for `evaluate_voc`.
        detections: detections on these images.
        class_names: names in the order of `category_id`.

    Raises:
        ValueError: `detections` name an image or a class that does not exist.
    """
    errors = sort_errors(ground_truth, detections)
    per_class = evaluate_voc(ground_truth, detections, class_names).per_class
    asked = [name for name in class_names if per_class[name]["gts"]]
    ap50 = _mean_ap50(per_class, asked)

    count, cost = {}, {}
    for kind in KINDS:
        count[kind] = int((errors.is_missed if kind == "missed" else errors.kind == kind).sum())
        mended = evaluate_voc(*mend(ground_truth, detections, errors, [kind]), class_names).per_class
        cost[kind] = _mean_ap50(mended, asked) - ap50
    return ErrorAnalysis(ap50, count, cost)


def sort_errors(ground_truth: Sequence[dict], detections: Detections) -> ErrorKinds:
    """Gives each detection its kind and tells which objects are missed.

    Args:
        ground_truth: Detectron2 dataset dicts with `annotations`.
        detections: detections on these images.
    """
    objects = list_objects(ground_truth)
    kind = np.full(len(detections.score), "background", dtype="U12")
    target = np.zeros(len(detections.score), dtype=np.int64)
    classes = 1 + max(detections.category.max(initial=-1), objects.category.max(initial=-1))
    for category, match in enumerate(match_classes(objects, detections, classes)):
        rows = match.detection
        hits, counts = match.judge(FOUND_IOU, objects.is_difficult)
        is_hit = np.zeros(len(rows), dtype=bool)
        is_hit[hits] = True
        others = np.flatnonzero(objects.category != category)
        nearest, other_iou = nearest_objects(
            objects.image[others], objects.box[others], detections.image[rows], detections.box[rows]
        )
        has_found = match.iou > FOUND_IOU
        conditions = {
            "ignored": ~counts,
            "correct": is_hit,
            "localisation": ~has_found & (match.iou >= NEAR_IOU),
            "class": other_iou > FOUND_IOU,
            "duplicate": has_found,
            "both": other_iou >= NEAR_IOU,
        }
        kind[rows] = np.select(list(conditions.values()), list(conditions), default="background")
        other = others[nearest] if len(others) else nearest
        target[rows] = np.where(np.isin(kind[rows], ("class", "both")), other, match.object)
    is_missed = ~objects.is_difficult
    is_missed[target[np.isin(kind, ("correct", "class", "localisation"))]] = False
    return ErrorKinds(kind, target, is_missed)


def mend(
    ground_truth: Sequence[dict], detections: Detections, errors: ErrorKinds, kinds: Collection[str]
) -> tuple[list[dict], Detections]:
    """The ground truth and the detections after an oracle has mended all errors of these kinds.

    Ignored detections are left out.
    """
    annotations = [annotation for record in ground_truth for annotation in record["annotations"]]
    category, box = np.array(detections.category), np.array(detections.box, dtype=np.float64)
    keep = ~np.isin(errors.kind, [*kinds, "ignored"])

    taken = np.array([annotation.get("difficult", 0) for annotation in annotations], dtype=bool)
    taken[errors.target[errors.kind == "correct"]] = True
    movable = np.flatnonzero(np.isin(errors.kind, [kind for kind in ("class", "localisation") if kind in kinds]))
    for row in movable[np.argsort(-detections.score[movable], kind="stable")]:
        target = errors.target[row]
        if not taken[target]:
            taken[target] = keep[row] = True
            category[row], box[row] = annotations[target]["category_id"], annotations[target]["bbox"]

    if "missed" in kinds:
        is_missed = iter(errors.is_missed)
        ground_truth = [
            {**record, "annotations": [a for a in record["annotations"] if not next(is_missed)]}
            for record in ground_truth
        ]
    kept = Detections(detections.image[keep], category[keep], detections.score[keep], box[keep])
    return list(ground_truth), kept


def plot_errors(analyses: Mapping[str, ErrorAnalysis]) -> Figure:
    """One stacked bar a detector: AP50, then what each kind of error costs.

    Args:
        analyses: name of the detector -> its analysis.
    """
    figure = Figure(figsize=(9, 1.6 + 0.8 * len(analyses)), layout="constrained")
    axes = figure.subplots()
    names = list(analyses)
    left = np.zeros(len(names))
    colors = dict(zip(KINDS, colormaps["Set2"](range(len(KINDS))), strict=True))
    for part, color in {"AP50": "0.75", **colors}.items():
        widths = np.array([a.ap50 if part == "AP50" else a.cost[part] for a in analyses.values()])
        bars = axes.barh(names, widths, left=left, color=color, edgecolor="white", label=part)
        axes.bar_label(bars, [f"{w:.3f}" if w >= 0.03 else "" for w in widths], label_type="center", fontsize=8)
        left += widths
    axes.invert_yaxis()
    axes.set(xlim=(0, max(1, left.max())), xlabel="AP50, and its rise when one kind of error alone is mended")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    figure.legend(loc="outside upper center", ncols=len(KINDS) + 1, fontsize=8, frameon=False)
    return figure


def _mean_ap50(per_class: dict[str, dict[str, float]], asked: Sequence[str]) -> float:
    """Mean over the classes `asked`; one that has lost all its objects is perfect unless something is detected."""
    areas = [
        per_class[name]["AP50"] if per_class[name]["gts"] else float(per_class[name]["dets"] == 0) for name in asked
    ]
    return float(np.mean(areas)) if areas else math.nan
