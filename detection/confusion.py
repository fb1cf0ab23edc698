"""How a detector behaves above a score: precision, recall and F1 against it, and which class it takes for which.

    precision = TP / (TP + FP),  recall = TP / objects,  F1 = 2 TP / (TP + FP + objects)

with true and false positives as `detection.matching` tells them apart at IoU 0.5, among the detections that have at
least the score. Difficult objects, and what is detected on them, count nowhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from detection.matching import Detections, Matches, Objects, first_claims, nearest_objects

IOU = 0.5
# In brackets, since a class may have any name.
BACKGROUND = "(background)"
ALL = "(all classes)"
STEPS = 101  # scores of the tables and pictures
MAX_NAMED = 60  # classes that have their names at the picture of the confusion matrix
MAX_COUNTED = 30  # and their numbers in it


@dataclass(frozen=True)
class ConfidenceCurve:
    """Precision, recall and F1 of the detections with at least a score.

    Attributes:
        score: (M,) floats, descending, the scores that occur; the first is infinite, which no detection has.
        precision: (M,) floats from 0 to 1; nan where nothing counts.
        recall: (M,) floats from 0 to 1, ascending.
        f1: (M,) floats from 0 to 1.
    """

    score: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> tuple[float, float]:
        """The highest F1 and the highest score that has it; without a true positive 0 and nan, without objects nan."""
        place = int(np.argmax(self.f1))
        return float(self.f1[place]), float(self.score[place]) if self.f1[place] > 0 else float("nan")

    def at(self, scores: np.ndarray) -> pd.DataFrame:
        """The figures at given scores, one a row."""
        place = np.searchsorted(-self.score, -scores, side="right") - 1
        figures = {"precision": self.precision, "recall": self.recall, "F1": self.f1}
        return pd.DataFrame({"score": scores, **{name: values[place] for name, values in figures.items()}})


@dataclass(frozen=True)
class Confusion:
    """Which class was taken for which.

    Attributes:
        score: detections of at least this one count.
        counts: (K + 1, K + 1) integers, a row for the class of the object, a column for the class detected; the last
            row holds detections without an object, the last column objects without a detection. So a row sums up to
            the objects of the class that are not difficult, a column to the detections of it that count.
    """

    score: float
    counts: np.ndarray

    def table(self, class_names: Sequence[str]) -> pd.DataFrame:
        """The counts under their names."""
        names = [*class_names, BACKGROUND]
        return pd.DataFrame(self.counts, pd.Index(names, name="object"), names)

    def as_json(self, class_names: Sequence[str]) -> dict:
        """The score, and of each class of objects the counts that are not 0."""
        rows = self.table(class_names).to_dict(orient="index")
        counts = {name: {other: count for other, count in row.items() if count} for name, row in rows.items()}
        return {"score": self.score, "counts": counts}


def confidence_curve(score: np.ndarray, is_true: np.ndarray, counts: np.ndarray, gts: int) -> ConfidenceCurve:
    """The curve of detections in any order.

    Args:
        score: (N,) floats.
        is_true: (N,) booleans.
        counts: (N,) booleans, false where neither right nor wrong.
        gts: objects to find.
    """
    order = np.argsort(-score, kind="stable")
    score = score[order]
    last_of_score = np.append(np.flatnonzero(np.diff(score)), len(score) - 1) if len(score) else np.empty(0, np.int64)
    found = np.append(0, np.cumsum(is_true[order])[last_of_score])
    counted = np.append(0, np.cumsum(counts[order])[last_of_score])
    with np.errstate(invalid="ignore"):
        return ConfidenceCurve(
            np.append(np.inf, score[last_of_score]),
            found / np.where(counted, counted, np.nan),
            found / (gts or np.nan),
            2 * found / (counted + (gts or np.nan)),
        )


def confuse(objects: Objects, detections: Detections, matches: Sequence[Matches], score: float) -> Confusion:
    """Counts which class was taken for which.

    True positives come first, since they have found their objects. Then each false positive, in descending order of
    score, looks at the object of any class in its image with the highest overlap. If that is greater than 0.5 and the
    object neither difficult nor taken, the detection takes the object for its own class; else it has found background.

    Args:
        objects: of the dataset.
        detections: on it.
        matches: of each class.
        score: detections of at least this one count.
    """
    classes = len(matches)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)  # by the class of the object and the class detected
    is_taken = objects.is_difficult.copy()
    false = []
    for category, match in enumerate(matches):
        hits, is_counted = match.judge(IOU, objects.is_difficult)
        is_counted &= detections.score[match.detection] >= score
        hits = hits[is_counted[hits]]
        matrix[category, category] = len(hits)
        is_taken[match.object[hits]] = True
        is_false = is_counted.copy()
        is_false[hits] = False
        false.append(match.detection[is_false])
    rows = np.concatenate([np.empty(0, np.int64), *false])
    rows = rows[np.argsort(-detections.score[rows], kind="stable")]
    nearest, iou = nearest_objects(objects.image, objects.box, detections.image[rows], detections.box[rows])
    seen = np.full(len(rows), classes)
    if len(is_taken):
        claims = np.flatnonzero((iou > IOU) & ~is_taken[nearest])
        claims = claims[first_claims(nearest[claims])]
        seen[claims] = objects.category[nearest[claims]]
        is_taken[nearest[claims]] = True
    np.add.at(matrix, (seen, detections.category[rows]), 1)
    np.add.at(matrix, (objects.category[~is_taken], classes), 1)
    return Confusion(score, matrix)


def confidence_table(curves: Mapping[str, ConfidenceCurve]) -> pd.DataFrame:
    """Precision, recall and F1 of each class at evenly spaced scores, from 0 to 1 unless there are others.

    Returns:
        Columns `class`, `score`, `precision`, `recall` and `F1`.
    """
    occurring = np.concatenate([[0.0, 1.0], *(curve.score[1:] for curve in curves.values())])
    scores = np.linspace(occurring.min(), occurring.max(), STEPS).round(10)  # 0.7, not a little more
    tables = [curve.at(scores).assign(**{"class": name}) for name, curve in curves.items()]
    return pd.concat(tables)[["class", "score", "precision", "recall", "F1"]]


def plot_confidence(table: pd.DataFrame, curves: Mapping[str, ConfidenceCurve]) -> Figure:
    """Precision, recall and F1 against the score, all classes together as a thick line, with the best F1 marked.

    Args:
        table: of `confidence_table`.
        curves: of which it is.
    """
    names = [name for name, curve in curves.items() if name != ALL and not np.isnan(curve.f1[0])]
    scores = table["score"].to_numpy().reshape(-1, STEPS)[0]
    few = len(names) <= 20
    colors = colormaps["tab20"](range(len(names))) if few else "0.75"
    figure = Figure(figsize=(12 + 2 * few, 4.4), layout="constrained")
    all_axes = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, figure_of in zip(all_axes, ("precision", "recall", "F1"), strict=True):
        values = table.pivot(index="class", columns="score", values=figure_of)
        lines = [np.column_stack([scores, values.loc[name]]) for name in names]
        axes.add_collection(LineCollection(lines, colors=colors, linewidths=1 if few else 0.5))
        axes.plot(scores, values.loc[ALL], color="black", linewidth=2.2)
        axes.set(title=figure_of, xlabel="score of at least", xlim=(scores[0], scores[-1]), ylim=(0, 1.02))
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[:].set_color("0.8")
    f1, threshold = curves[ALL].best
    all_axes[2].plot([threshold], [f1], "o", color="black")
    of_all = f"F1 {f1:.3f} at score {threshold:.3f}" if f1 > 0 else "nothing found"
    figure.suptitle(f"At IoU {IOU}, all classes: {of_all}", fontsize=11)
    if few:
        handles = [
            all_axes[0].plot([], [], color=color, label=name)[0] for name, color in zip(names, colors, strict=True)
        ]
        handles.append(all_axes[0].plot([], [], color="black", linewidth=2.2, label="all classes")[0])
        figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_confusion(confusion: Confusion, class_names: Sequence[str]) -> Figure:
    """The matrix, coloured by the share of each row, with its counts where there are not too many classes."""
    counts = confusion.counts
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.42 * len(counts) + 2, 5, 16))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(class_names) <= MAX_NAMED:
        names = [*class_names, BACKGROUND]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(class_names) <= MAX_COUNTED:
        for row, column in np.argwhere(counts):
            color = "white" if share[row, column] > 0.5 else "0.2"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="detected as", ylabel="object")
    axes.set_title(f"Objects and detections of a score of at least {confusion.score:.3f}, IoU over {IOU}", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.6)
    return figure
