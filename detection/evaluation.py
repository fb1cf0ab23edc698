"""Average precision on data in Pascal VOC layout: exact, vectorised, the same for one process and for many.

Matching follows the Python devkit of py-faster-rcnn, which Detectron2 uses too. Within a class the detections are taken
in descending order of score (equal scores in the order given). Each looks at the one ground-truth box of its image with
the highest intersection over union, difficult or not, claimed or not. If the overlap is greater than the threshold
(strictly; the Matlab devkit accepts equality), a difficult box makes the detection ignored, a box that an earlier
detection has claimed makes it a false positive, any other box makes it a true positive; else it is a false positive.

The devkit measures inclusive pixels counted from 1, hence its `xmax - xmin + 1`. Boxes here are continuous and counted
from 0, `[xmin - 1, ymin - 1, xmax, ymax]`, so that the plain `xmax - xmin` is the same number.

A class without ground truth to find has no recall: its figures are nan, and the means leave it out.

Sources: Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2 (11 points);
development kit of VOC2010, section 3.4.1 (area under the curve).
"""

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from matplotlib.figure import Figure

from common.run_folder import failures_as_warnings, write_atomically

logger = logging.getLogger(__name__)

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
MOST_PANELS = 40  # of the PR curves: a panel takes a twentieth of a second
METRICS = ("AP50_11point", "AP50", "AP75", "AP")
LEGEND = """

AP50_11point is the 11-point AP at IoU 0.5; AP50, AP75 and AP (mean over IoU 0.50:0.95) are areas under the curve.
Difficult objects are ignored; classes without objects are left out of the means."""


@dataclass(frozen=True)
class Detections:
    """Detections on a whole dataset, one a row.

    Attributes:
        image: (N,) integers, positions in the list of dataset dicts.
        category: (N,) integers, positions in the list of class names.
        score: (N,) floats, higher is more certain.
        box: (N, 4) floats, XYXY in pixels of the original image, continuous and counted from 0.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_voc` found. All figures are fractions in [0, 1], or nan.

    Attributes:
        metrics: means over the classes: `AP50_11point`, `AP50`, `AP75` and `AP`. All but the first are areas under the
            curve; `AP` is the mean over the IoU thresholds 0.50, 0.55, ..., 0.95.
        per_class: class name -> `gts` (difficult ones not counted), `dets` (all of them), `recall` (of all of them, at
            IoU 0.5), and the four metrics.
        curves: class name -> (recall, precision) at IoU 0.5, one point for each true positive, recall ascending.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]

    def format_table(self, style: str = "psql") -> str:
        """The table `class | gts | dets | recall | AP ...`, its last row the means, and below it what the columns mean.

        Args:
            style: one of tabulate's, such as "psql" for a terminal and "github" for Markdown.
        """
        table = self._table().astype(object)
        return table.where(table.notna(), None).to_markdown(tablefmt=style, floatfmt=".3f", missingval="-") + LEGEND

    def write(self, folder: Path) -> None:
        """Writes `evaluation.json`, `evaluation.csv`, `evaluation.md` and `pr_curves.png` into `folder`.

        The folder is made if missing; the JSON file holds null where a figure is nan.

        Raises:
            OSError: the folder cannot be made or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "evaluation.json", json.dumps(self._as_json(), indent=2) + "\n")
        _write_text(folder / "evaluation.csv", self._table().to_csv())
        _write_text(
            folder / "evaluation.md",
            f"# Evaluation\n\n{self.format_table('github')}\n\n![Precision against recall at IoU 0.5](pr_curves.png)\n",
        )
        with failures_as_warnings(folder / "pr_curves.png"):
            figure = self._plot_curves()
            write_atomically(folder / "pr_curves.png", lambda file: figure.savefig(file, format="png", dpi=120))

    def _as_json(self) -> dict:
        def figures(row: dict[str, float], keys: Sequence[str]) -> dict[str, float | None]:
            return {key: None if math.isnan(row[key]) else row[key] for key in keys}

        per_class_keys = ("gts", "dets", "recall", "AP50_11point", "AP50")
        per_class = {name: figures(row, per_class_keys) for name, row in self.per_class.items()}
        return figures(self.metrics, METRICS) | {"per_class": per_class}

    def _table(self) -> pd.DataFrame:
        table = pd.DataFrame.from_dict(self.per_class, orient="index").astype({"gts": "Int64", "dets": "Int64"})
        return pd.concat([table, pd.DataFrame(self.metrics, index=["mAP"])]).rename_axis("class")

    def _plot_curves(self) -> Figure:
        names, which = list(self.curves), ""
        if len(names) > MOST_PANELS:
            half = MOST_PANELS // 2
            with_objects = [name for name in names if not math.isnan(self.per_class[name]["AP50"])]
            ranked = sorted(with_objects, key=lambda name: self.per_class[name]["AP50"])
            which = f"\nthe worst and the best {half} of {len(names)} classes"
            names = [*ranked[:half], *ranked[half:][-half:]] or names[:MOST_PANELS]
        columns = min(len(names), 5)
        rows = math.ceil(len(names) / columns)
        figure = Figure(figsize=(max(2.4 * columns, 5), 2.2 * rows + 0.8), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for name, axes in zip(names, panels, strict=False):
            recall, precision = self.curves[name]
            if len(recall):
                # From recall 0 on, and down to 0 where the detections end: what is filled is the AP.
                envelope = _envelope(precision)
                edge = np.concatenate([[0], recall, recall[-1:]]), np.concatenate([envelope[:1], envelope, [0]])
                axes.fill_between(*edge, step="pre", color="tab:blue", alpha=0.15, linewidth=0)
                axes.step(*edge, where="pre", color="tab:blue", linewidth=1.2)
            ap = self.per_class[name]["AP50"]
            axes.set_title(f"{name}  {'no objects' if math.isnan(ap) else f'{ap:.3f}'}", fontsize=9, parse_math=False)
            axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
            axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.grid(color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(labelsize=7, length=0)
            axes.spines[:].set_color("0.8")
        for axes in panels:  # those left over
            axes.set_axis_off()
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
    _check(detections, len(ground_truth), len(class_names))
    annotations = [(image, box) for image, record in enumerate(ground_truth) for box in record["annotations"]]
    gt_image = np.array([image for image, _ in annotations], dtype=np.int64)
    gt_category = np.array([box["category_id"] for _, box in annotations], dtype=np.int64)
    gt_box = np.array([box["bbox"] for _, box in annotations], dtype=np.float64).reshape(-1, 4)
    gt_difficult = np.array([box.get("difficult", 0) for _, box in annotations], dtype=bool)

    order = np.lexsort((-np.asarray(detections.score, dtype=np.float64), detections.category))
    bounds = np.searchsorted(detections.category[order], np.arange(len(class_names) + 1))

    per_class, curves = {}, {}
    for category, name in enumerate(class_names):
        gt = gt_category == category
        det = order[bounds[category] : bounds[category + 1]]
        gts = int((~gt_difficult[gt]).sum())
        per_class[name] = {"gts": gts, "dets": len(det)} | dict.fromkeys(("recall", *METRICS), math.nan)
        curves[name] = np.empty(0), np.empty(0)
        if gts:
            iou, match = _best_matches(gt_image[gt], gt_box[gt], detections.image[det], detections.box[det])
            at_thresholds = [_precision_recall(iou > t, match, gt_difficult[gt]) for t in IOU_THRESHOLDS]
            areas = [area_ap(recall, precision) for recall, precision in at_thresholds]
            recall, precision = curves[name] = at_thresholds[0]
            per_class[name] |= {
                "recall": len(recall) / gts,
                "AP50_11point": eleven_point_ap(recall, precision),
                "AP50": areas[0],
                "AP75": areas[5],
                "AP": float(np.mean(areas)),
            }
    means = pd.DataFrame.from_dict(per_class, orient="index")[list(METRICS)].mean()
    return Evaluation({metric: float(means[metric]) for metric in METRICS}, per_class, curves)


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall or beyond (VOC2007).

    The recalls are the devkit's floating-point numbers: its 0.3, for one, is just above 3/10 and not reached by it.

    Args:
        recall: (N,) ascending.
        precision: (N,) precision at these recalls.
    """
    beyond = np.append(_envelope(precision), 0.0)
    return float(beyond[np.searchsorted(recall, np.arange(0.0, 1.1, 0.1))].mean())


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the highest precision at each recall or beyond (VOC2010 and later).

    Args:
        recall: (N,) ascending.
        precision: (N,) precision at these recalls.
    """
    return float((np.diff(recall, prepend=0.0) * _envelope(precision)).sum())


def _envelope(precision: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(precision[::-1])[::-1]


def _best_matches(
    gt_image: np.ndarray, gt_box: np.ndarray, det_image: np.ndarray, det_box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each detection of one class its highest IoU and the first ground-truth box that has it; 0, 0 without any.

    `gt_image` is ascending. All pairs of an image are laid out one after another, detection by detection.
    """
    start = np.searchsorted(gt_image, det_image)
    pairs = np.searchsorted(gt_image, det_image, side="right") - start
    iou, match = np.zeros(len(det_image)), np.zeros(len(det_image), dtype=np.int64)
    paired = np.flatnonzero(pairs)
    if len(paired):
        start, pairs = start[paired], pairs[paired]
        first = np.cumsum(pairs) - pairs
        gt = np.arange(pairs.sum()) + np.repeat(start - first, pairs)
        overlap = _pairwise_iou(np.repeat(det_box[paired], pairs, axis=0), gt_box[gt])
        iou[paired] = np.maximum.reduceat(overlap, first)
        is_best = overlap == np.repeat(iou[paired], pairs)
        match[paired] = np.minimum.reduceat(np.where(is_best, gt, len(gt_box)), first)
    return iou, match


def _pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of the boxes (N, 4) in the same rows, 0 where both are empty."""
    size = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = size.clip(min=0).prod(axis=1)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _precision_recall(over: np.ndarray, match: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at each true positive, from the best matches in descending order of score.

    Args:
        over: (N,) whether the overlap of the detection with its match is over the threshold.
        match: (N,) the match, a position in `difficult`.
        difficult: (G,) which boxes are difficult; at least one is not.
    """
    ignored = over & difficult[match]
    claims = np.flatnonzero(over & ~ignored)
    _, first_claims = np.unique(match[claims], return_index=True)
    true_positives = np.sort(claims[first_claims])
    found = np.arange(1, len(true_positives) + 1)
    counted = np.cumsum(~ignored)
    return found / (~difficult).sum(), found / counted[true_positives]


def _check(detections: Detections, images: int, categories: int) -> None:
    n = len(detections.score)
    shapes = [array.shape for array in (detections.image, detections.category, detections.score, detections.box)]
    if shapes != [(n,), (n,), (n,), (n, 4)]:
        raise ValueError(f"detections have shapes {shapes}, expected three of ({n},) and one of ({n}, 4)")
    for values, limit, name in ((detections.image, images, "image"), (detections.category, categories, "category")):
        if n and not 0 <= values.min() <= values.max() < limit:
            raise ValueError(f"detections name {name} {values.min()} to {values.max()}, expected 0 to {limit - 1}")


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
            `{"bbox": metrics}` with the four metrics of `Evaluation` as fractions in the main process, else empty.
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
        return OrderedDict(bbox=dict(evaluation.metrics))

    def write(self, folder: Path) -> None:
        """Writes what `evaluate` found last, in the main process.

        The files are those of `Evaluation.write` and `detections.json`, in COCO's result form with `category_id`
        counted from 1.
        """
        if comm.is_main_process():
            evaluation, detections, records = self._result
            evaluation.write(folder)
            _write_text(folder / "detections.json", _coco_results(detections, records))


def _coco_results(detections: Detections, records: Sequence[dict]) -> str:
    image_ids = np.array([record["image_id"] for record in records], dtype=object)
    corner, size = detections.box[:, :2], detections.box[:, 2:] - detections.box[:, :2]
    table = {
        "image_id": image_ids[detections.image],
        "category_id": detections.category + 1,
        "bbox": np.concatenate([corner, size], axis=1).tolist(),
        "score": detections.score,
    }
    # By pandas: the json module takes three times as long for half a million detections.
    return pd.DataFrame(table).to_json(orient="records", double_precision=15)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
