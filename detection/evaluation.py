"""Average precision on data in Pascal VOC layout: exact, vectorised, the same for one process and for many.

Matching (`detection.matching`) follows the Python devkit of py-faster-rcnn, which Detectron2 uses too. The Matlab
devkit accepts an overlap that equals the threshold.

The devkit measures inclusive pixels counted from 1, hence its `xmax - xmin + 1`. Boxes here are continuous and counted
from 0, `[xmin - 1, ymin - 1, xmax, ymax]`, so that the plain `xmax - xmin` is the same number.

A class without ground truth to find has no recall: its figures are nan, and the means leave it out.
"""

import contextlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from matplotlib.figure import Figure

from common.errors import UserError
from common.exported import is_exported, read_card
from common.files import write_figure, write_json, write_table, write_text
from common.run_folder import failures_as_warnings, read_sessions
from detection.average_precision import (
    ASPECTS,
    IOU_THRESHOLDS,
    SIZES,
    area_ap,
    eleven_point_ap,
    evaluate_groups,
    highest_beyond,
    precision_recall,
)
from detection.class_panels import class_panels
from detection.confusion import (
    ALL,
    ConfidenceCurve,
    Confusion,
    confidence_curve,
    confidence_table,
    confuse,
    plot_confidence,
    plot_confusion,
)
from detection.matching import Detections, box_area, box_aspect, list_objects, match_classes
from detection.starts import folder_of

logger = logging.getLogger(__name__)

WRITTEN = (
    *("evaluation.json", "evaluation.csv", "evaluation.md", "pr_curves.png"),
    *("f1_curves.csv", "f1_curves.png", "confusion.csv", "confusion.png"),
)
METRICS = ("AP50_11point", "AP50", "AP75", "AP")
BEST = ("F1", "threshold")
FALLBACK_THRESHOLD = 0.5  # of the confusion matrix where nothing is found
LEGEND = """\
AP50_11point is the 11-point AP at IoU 0.5; AP50, AP75 and AP (mean over IoU 0.50:0.95) are areas under the curve.
Difficult objects are ignored; classes without objects are left out of the means. F1 is the best at IoU 0.5, reached by
the detections whose score is at least the threshold; in the last row, of all classes together. Small, medium and large
are COCO's areas: up to 32 x 32 pixels, up to 96 x 96, and beyond. Of tall and wide objects one side is at least 1.5
times the other."""
PICTURES = """![Precision against recall at IoU 0.5](pr_curves.png)

![Precision, recall and F1 against the score](f1_curves.png)

![Which class is taken for which](confusion.png)"""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_voc` found. All figures are fractions in [0, 1], or nan.

    Attributes:
        metrics: means over the classes: `AP50_11point`, `AP50`, `AP75` and `AP`. All but the first are areas under the
            curve; `AP` is the mean over the IoU thresholds 0.50, 0.55, ..., 0.95.
        per_class: class name -> `gts` (difficult ones not counted), `dets` (all of them), `recall` (of all of them, at
            IoU 0.5), the four metrics, and the best `F1` with the `threshold` of the score that gives it.
        curves: class name -> (recall, precision) at IoU 0.5, one point for each true positive, recall ascending.
        confidence: class name, then `ALL` -> precision, recall and F1 against the score.
        sizes: "small", "medium" and "large" -> the figures of `evaluate_groups`.
        aspects: "tall", "square" and "wide" -> the same figures.
        confusion: which class was taken for which, at the threshold with the best F1 of all classes.
        intervals: of some of the metrics the 95 % interval, as `detection.bootstrap` finds it; it may be left out.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    confidence: dict[str, ConfidenceCurve]
    sizes: dict[str, dict[str, float]]
    aspects: dict[str, dict[str, float]]
    confusion: Confusion
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def format_table(self, style: str = "psql") -> str:
        """The table `class | gts | dets | recall | AP ...`, its last row the means, and that of sizes and aspects.

        Args:
            style: one of tabulate's, such as "psql" for a terminal and "github" for Markdown.
        """
        groups = pd.DataFrame.from_dict(self.sizes | self.aspects, orient="index").astype({"gts": "Int64"})
        texts = [
            table.astype(object).where(table.notna(), None).to_markdown(tablefmt=style, floatfmt=".3f", missingval="-")
            for table in (self._table(), groups.rename_axis("objects"))
        ]
        spread = [f"{key}: 95 % interval {low:.3f} to {high:.3f}" for key, (low, high) in self.intervals.items()]
        return "\n\n".join([texts[0], LEGEND, *spread, texts[1]])

    def write(self, folder: Path) -> None:
        """Writes the figures and pictures, `WRITTEN`, into `folder`, which is made if missing.

        `evaluation.json` (null where a figure is nan), `evaluation.csv` and `.md`, `pr_curves.png`, and as a table and
        a picture each `confusion` and `f1_curves`.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "evaluation.json", self._as_json())
        write_table(folder / "evaluation.csv", self._table())
        write_text(folder / "evaluation.md", f"# Evaluation\n\n{self.format_table('github')}\n\n{PICTURES}\n")
        class_names = list(self.per_class)
        table = confidence_table(self.confidence)
        write_table(folder / "f1_curves.csv", table, index=False, float_format="%.4f")
        write_table(folder / "confusion.csv", self.confusion.table(class_names))
        plots: dict[str, Callable[[], Figure]] = {
            "pr_curves": self._plot_curves,
            "f1_curves": partial(plot_confidence, table, self.confidence),
            "confusion": partial(plot_confusion, self.confusion, class_names),
        }
        for name, plot in plots.items():
            with failures_as_warnings(folder / f"{name}.png"):
                write_figure(folder / f"{name}.png", plot(), dpi=120)

    @property
    def best(self) -> dict[str, float]:
        """The best `F1` of all classes together, and the `threshold` of the score that gives it."""
        return dict(zip(BEST, self.confidence[ALL].best, strict=True))

    def _as_json(self) -> dict:
        def figures(row: dict[str, float], keys: Sequence[str]) -> dict[str, float | None]:
            return {key: None if math.isnan(row[key]) else row[key] for key in keys}

        per_class_keys = ("gts", "dets", "recall", "AP50_11point", "AP50", *BEST)
        per_class = {name: figures(row, per_class_keys) for name, row in self.per_class.items()}
        confusion = self.confusion.as_json(list(self.per_class))
        groups = {
            key: {name: figures(row, list(row)) for name, row in rows.items()}
            for key, rows in (("sizes", self.sizes), ("aspects", self.aspects))
        }
        intervals = {key: [None if math.isnan(end) else end for end in ends] for key, ends in self.intervals.items()}
        parts: dict[str, dict] = {"intervals": intervals} if intervals else {}
        parts |= groups | {"confusion": confusion, "per_class": per_class}
        return figures(self.metrics | self.best, (*METRICS, *BEST)) | parts

    def _table(self) -> pd.DataFrame:
        table = pd.DataFrame.from_dict(self.per_class, orient="index").astype({"gts": "Int64", "dets": "Int64"})
        return pd.concat([table, pd.DataFrame(self.metrics | self.best, index=["mAP"])]).rename_axis("class")

    def _plot_curves(self) -> Figure:
        figure, panels, which = class_panels({name: row["AP50"] for name, row in self.per_class.items()})
        for name, axes in panels:
            recall, precision = self.curves[name]
            if len(recall):
                # From recall 0 on, and down to 0 where the detections end: what is filled is the AP.
                envelope = highest_beyond(precision)
                edge = np.concatenate([[0], recall, recall[-1:]]), np.concatenate([envelope[:1], envelope, [0]])
                axes.fill_between(*edge, step="pre", color="tab:blue", alpha=0.15, linewidth=0)
                axes.step(*edge, where="pre", color="tab:blue", linewidth=1.2)
            axes.set_xlim(0, 1.02)
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        figure.suptitle(
            f"Precision against recall at IoU 0.5, mean area {self.metrics['AP50']:.3f}{which}", fontsize=11
        )
        figure.supxlabel("recall", fontsize=9)
        figure.supylabel("precision", fontsize=9)
        return figure


def evaluate_voc(ground_truth: Sequence[dict], detections: Detections, class_names: Sequence[str]) -> Evaluation:
    """Scores detections as the VOC devkit does, with both definitions of average precision and at ten IoU thresholds.

    Args:
        ground_truth: Detectron2 dataset dicts, of which `annotations` is read: `bbox` (XYXY in pixels, continuous,
            counted from 0), `category_id` and, where present, `difficult`.
        detections: detections on these images, in any order; among equal scores the first given comes first.
        class_names: names in the order of `category_id`.

    Raises:
        ValueError: the arrays of `detections` differ in length, or name an image or a class that does not exist.
    """
    detections.check(len(ground_truth), len(class_names))
    objects = list_objects(ground_truth)
    matches = match_classes(objects, detections, len(class_names))
    gts = np.bincount(objects.category[~objects.is_difficult], minlength=len(class_names))

    is_true = np.zeros(len(detections.score), dtype=bool)
    does_count = np.ones(len(detections.score), dtype=bool)
    per_class, curves, confidence = {}, {}, {}
    for name, match, asked in zip(class_names, matches, gts.tolist(), strict=True):
        at_thresholds = [match.judge(threshold, objects.is_difficult) for threshold in IOU_THRESHOLDS]
        true, counts = at_thresholds[0]
        is_true[match.detection[true]], does_count[match.detection] = True, counts
        confidence[name] = confidence_curve(detections.score[match.detection], is_true[match.detection], counts, asked)
        best = zip(BEST, confidence[name].best, strict=True)
        per_class[name] = (
            {"gts": asked, "dets": len(counts)} | dict.fromkeys(("recall", *METRICS), math.nan) | dict(best)
        )
        curves[name] = np.empty(0), np.empty(0)
        if asked:
            points = [precision_recall(true, counts, asked) for true, counts in at_thresholds]
            areas = [area_ap(recall, precision) for recall, precision in points]
            recall, precision = curves[name] = points[0]
            per_class[name] |= {
                "recall": len(recall) / asked,
                "AP50_11point": eleven_point_ap(recall, precision),
                "AP50": areas[0],
                "AP75": areas[5],
                "AP": float(np.mean(areas)),
            }
    means = pd.DataFrame.from_dict(per_class, orient="index")[list(METRICS)].mean()
    metrics = {metric: float(means[metric]) for metric in METRICS}
    confidence[ALL] = confidence_curve(detections.score, is_true, does_count, int(gts.sum()))
    threshold = confidence[ALL].best[1]
    confusion = confuse(objects, detections, matches, FALLBACK_THRESHOLD if math.isnan(threshold) else threshold)
    sizes = evaluate_groups(SIZES, box_area, objects, detections, matches)
    aspects = evaluate_groups(ASPECTS, box_aspect, objects, detections, matches)
    return Evaluation(metrics, per_class, curves, confidence, sizes, aspects, confusion)


def read_threshold(weights: str) -> float:
    """The threshold with the best F1 of all classes, in an exported file or an evaluation.

    For `model_best.pth` the evaluation during training, beside it, takes precedence over that of `make eval-*`, in
    `evaluation/` of the results folder.

    Args:
        weights: `MODEL.WEIGHTS` of a whole detector.

    Raises:
        UserError: there is none that has a threshold.
    """
    results = folder_of(weights) / "evaluation"
    evaluated = (read_sessions(results) or [{}])[-1].get("weights", weights)  # it may be another one of the run
    places = [results / "evaluation.json"] if Path(evaluated).name == Path(weights).name else []
    if is_exported(weights):
        places.insert(0, Path(weights))
    elif Path(weights).name == "model_best.pth":
        places.insert(0, Path(weights).with_name("evaluation.json"))
    for path in places:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = read_card(path) if is_exported(path) else json.loads(path.read_text())
            return float(content["threshold"])
    there = [path for path in places if path.is_file()]
    missing = f"{places[0]}: no such file" if places else f"{results}: is of {evaluated}"
    found = f"{there[-1]}: holds no threshold" if there else missing
    raise UserError(
        f"{found}; expected that of the evaluation of these weights, which training and make eval-* write: give a "
        "number as the score"
    )


class VOCEvaluator(DatasetEvaluator):
    """Gathers the detections of a model, from all processes, and scores them with `evaluate_voc`.

    An image that several processes have seen counts once. Scores and boxes are kept as exact as the model gives them.
    """

    def __init__(self, dataset_name: str) -> None:
        """Prepares the evaluation on a registered dataset.

        Args:
            dataset_name: name in `DatasetCatalog` and `MetadataCatalog`; the latter gives `thing_classes`.
        """
        self._dataset_name = dataset_name
        self.reset()

    def reset(self) -> None:
        """Forgets all detections."""
        self._by_image: dict[str, np.ndarray] = {}  # image_id -> rows of x0, y0, x1, y1, score, category

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes in the detections on a batch.

        Args:
            inputs: dataset dicts, of which `image_id` is read.
            outputs: for each, `instances` with `pred_boxes` in the original image, `scores` and `pred_classes`.
        """
        found = [output["instances"] for output in outputs]
        tables = [
            torch.cat([each.pred_boxes.tensor.double(), each.scores[:, None], each.pred_classes[:, None]], dim=1)
            for each in found
        ]
        # One copy a batch, since each waits for a GPU.
        rows = torch.cat(tables).cpu().split([len(each) for each in found])
        for record, part in zip(inputs, rows, strict=True):
            self._by_image[record["image_id"]] = part.numpy()

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Scores what all processes have gathered; every process must call it.

        Returns:
            In the main process `bbox`, the four metrics of `Evaluation` as fractions, and `per_class`, the 11-point AP
            at IoU 0.5 of each class that has objects; else empty.
        """
        gathered = comm.gather(self._by_image, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        by_image = {image_id: rows for part in gathered for image_id, rows in part.items()}
        records = DatasetCatalog.get(self._dataset_name)
        # In the order of the dataset, so that equal scores rank the same however the images were shared out.
        rows = [by_image.get(record["image_id"], np.empty((0, 6))) for record in records]
        image = np.repeat(np.arange(len(records)), [len(part) for part in rows])
        table = np.concatenate([np.empty((0, 6)), *rows])
        detections = Detections(image, table[:, 5].astype(np.int64), table[:, 4], table[:, :4])

        evaluation = evaluate_voc(records, detections, MetadataCatalog.get(self._dataset_name).thing_classes)
        logger.info("Evaluation on %s:\n%s", self._dataset_name, evaluation.format_table())
        self._result = evaluation, detections, records
        per_class = {name: row["AP50_11point"] for name, row in evaluation.per_class.items() if row["gts"]}
        return OrderedDict(bbox=dict(evaluation.metrics), per_class=per_class)

    def write(self, folder: Path) -> None:
        """Writes what `evaluate` found last, in the main process.

        The files are those of `Evaluation.write` and `detections.json`, in COCO's result form with `category_id`
        counted from 1.
        """
        if comm.is_main_process():
            evaluation, detections, records = self._result
            evaluation.write(folder)
            write_text(folder / "detections.json", _coco_results(detections, records))


def _coco_results(detections: Detections, records: Sequence[dict]) -> str:
    image_ids = np.array([record["image_id"] for record in records], dtype=object)
    table = {
        "image_id": image_ids[detections.image],
        "category_id": detections.category + 1,
        "bbox": BoxMode.convert(detections.box, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist(),
        "score": detections.score,
    }
    # By pandas: the json module takes three times as long for half a million detections.
    return pd.DataFrame(table).to_json(orient="records", double_precision=15)
