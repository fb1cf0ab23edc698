"""Runs Faster R-CNN and YOLOv3 on the same photographs: where they agree, where not, and how long each takes.

For each photograph one picture with what both find side by side; for all of them `objects.csv` with one object a row,
`photographs.csv` with one photograph a row, and `comparison.json` with everything. Without photographs it takes those
of a test split, whose ground truth is known, tells which is ahead and how far that may be chance, and also sorts the
errors of both by their kind: `errors.csv`, `errors.json` and `errors.png`.
"""

import argparse
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from tqdm import tqdm

from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.files import write_figure, write_json, write_table
from common.images import find_images, write_picture
from common.prediction import parse_score
from common.results import LeftOut, reserve_results, unique_names
from common.run_folder import machine
from detection.bootstrap import interval, resample_ap
from detection.classes import in_words_of, pair_classes
from detection.comparison import compare, corners, objects_table, photographs_table, to_detections, to_objects
from detection.config import LEAF, NAMES, RECIPES
from detection.data_checks import check_datasets
from detection.drawing import Picture, beside, class_colors
from detection.error_analysis import KINDS, ErrorAnalysis, analyse_errors, plot_errors
from detection.experiment import newest_detector, use_test_data
from detection.modeling import start_by_model
from detection.predict import Detector
from detection.voc import records_of

CHOICE_SEED = 0
MAX_PICTURES = 20  # of a split; every photograph that is named gets one
MAX_ROWS = 60  # of a printed table; the files hold them all
CSV: dict[str, Any] = {"index": False, "float_format": "%.4f"}


def load_detectors(
    frcnn: str | Path | None, yolov3: str | Path | None, output: Path, recipe: str | None
) -> list[Detector]:
    """Loads both detectors; where no weights are given, those of the newest run.

    Args:
        frcnn: weights of Faster R-CNN, "coco", or None.
        yolov3: weights of YOLOv3, "coco", or None. Either may be the other network's too: any two detectors compare.
        output: folder of all runs.
        recipe: recipe of the newest runs; None is any.

    Raises:
        UserError: a detector is not trained yet, or its weights do not load.
    """
    paths = [
        frcnn or newest_detector(output, "faster_rcnn", recipe),
        yolov3 or newest_detector(output, "yolov3", recipe),
    ]
    words = zip(paths, dict.fromkeys(NAMES.values()), ("train-frcnn", "train-yolov3"), ("FRCNN", "YOLOV3"), strict=True)
    if missing := [rest for path, *rest in words if path is None]:
        lacking, targets, variables = zip(*missing, strict=True)
        raise UserError(
            f"{output}: no trained {' and no '.join(lacking)} in it; expected a run of each: run make "
            f"{' '.join(targets)}, or give {' '.join(f'{variable}=weights' for variable in variables)}"
        )
    detectors = [Detector(path, model) for path, model in zip(paths, LEAF, strict=True) if path is not None]
    if detectors[0].name == detectors[1].name:
        for number, detector in enumerate(detectors, start=1):
            detector.name += f" {number}"
    return detectors


def read_split(
    detectors: Sequence[Detector], data: str | None, split: str | None, limit: int
) -> tuple[str, list[dict], list[str]]:
    """Annotated photographs: at most `limit`, always the same, by default of the split the detectors are tested on.

    Returns:
        The name of the split, Detectron2's dataset dicts, and the names of the classes of the data.

    Raises:
        UserError: data or split are not there, or a detector knows none of the classes.
    """
    roots = [detector.cfg.DATASETS.ROOT for detector in detectors]
    if data is None and not all(roots):
        raise UserError("DATA is not given; expected the data to compare on, since a third-party detector names none")
    if data is None and roots[0] != roots[1]:
        raise UserError(
            f"{detectors[0].weights} was trained on {roots[0]}, {detectors[1].weights} on {roots[1]}; "
            "expected the same data: name the one to compare on with DATA=, or photographs with IMAGES="
        )
    cfg = detectors[0].cfg.clone()
    if split is not None:
        cfg.DATASETS.TEST = (split,)
    use_test_data(cfg, data, [] if split is None else ["DATASETS.TEST"])
    check_datasets(cfg, ["TEST"])
    classes = list(MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes)
    for detector in detectors:
        if not pair_classes(detector.class_names, classes):
            raise UserError(
                f"{detector.weights}: knows none of the classes of {cfg.DATASETS.ROOT} ({', '.join(classes[:3])}, "
                "...); expected weights trained on such data"
            )
    records = records_of(cfg.DATASETS.TEST)
    chosen = np.sort(np.random.default_rng(CHOICE_SEED).permutation(len(records))[:limit])
    objects = [annotation for number in chosen for annotation in records[number]["annotations"]]
    if all(annotation["difficult"] for annotation in objects):
        raise UserError(
            f"LIMIT={limit}: those of the {len(records)} photographs of {', '.join(cfg.DATASETS.TEST)} show no object "
            "that is not difficult; expected one at least: give a higher LIMIT"
        )
    return ", ".join(cfg.DATASETS.TEST), [records[number] for number in chosen], classes


def detect(detector: Detector, image: torch.Tensor) -> tuple[list[dict], float]:
    """What a detector finds in one photograph, as `comparison.to_objects` has it, and the milliseconds that it takes.

    The time runs from the resized image to the boxes.
    """
    sample = detector.prepare(image)
    start = time.perf_counter()
    (prediction,) = detector.run([sample])
    return to_objects(prediction), 1000 * (time.perf_counter() - start)


def picture(
    image: torch.Tensor, found: dict[str, list[dict]], milliseconds: dict[str, float], colors: dict[str, np.ndarray]
) -> np.ndarray:
    """The picture of one photograph, one panel a detector.

    Args:
        image: uint8, (3, H, W), RGB.
        found: title of the panel -> objects of `comparison.to_objects`, best first. True objects have no score.
        milliseconds: title of the panel -> time, where it took any.
        colors: name of the class -> RGB from 0 to 1.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    panels, captions = [], []
    for name, objects in found.items():
        panel = Picture(image)
        scores = [box["score"] for box in objects if "score" in box] or None
        panel.draw_objects([box["class"] for box in objects], corners(objects), colors, scores)
        took = f", {milliseconds[name]:.0f} ms" if name in milliseconds else ""
        panels.append(panel.pixels)
        captions.append(f"{name}: {len(objects)} object{'s' * (len(objects) != 1)}{took}")
    return beside(panels, captions)


def errors_table(analyses: dict[str, ErrorAnalysis]) -> pd.DataFrame:
    """One kind of error a row: for each detector how many there are, and what they cost in AP50."""
    columns: dict[str, Collection[str | float]] = {"error": KINDS}
    for name, analysis in analyses.items():
        columns[name] = analysis.count.values()
        columns[f"{name} cost"] = analysis.cost.values()
    return pd.DataFrame(columns)


def compare_ap50(ap50: dict[str, float], resampled: dict[str, np.ndarray]) -> tuple[dict, str]:
    """How two detectors compare on the same photographs.

    Args:
        ap50: name of the detector -> its AP50.
        resampled: name of the detector -> its AP50 on the same resamples of the photographs.

    Returns:
        For each detector `ap50` and its 95 % `interval`, for their `difference` (first less second) the same; and a
        sentence.
    """
    first, second = ap50
    figures: dict[str, dict] = {name: {"ap50": ap50[name], "interval": interval(resampled[name])} for name in ap50}
    difference = ap50[first] - ap50[second]
    low, high = interval(resampled[first] - resampled[second])
    figures["difference"] = {"ap50": difference, "interval": (low, high)}
    ahead, behind = (first, second) if difference >= 0 else (second, first)
    spread = f"{100 * abs(difference):.1f} ± {50 * (high - low):.1f} points of AP50"
    chance = "; that may be chance" if low <= 0 <= high else ""
    return figures, f"{ahead} is ahead of {behind} by {spread} (95 % interval over resampled photographs){chance}"


def _print_objects(photographs: Sequence[dict], names: Sequence[str]) -> None:
    def cell(found: dict | None) -> str:
        return f"{found['class']} {found['score']:.2f}" if found else ""

    rows = [
        (Path(photograph["file_name"]).name, pair["agreement"], *(cell(pair[name]) for name in names), pair["iou"])
        for photograph in photographs
        for pair in photograph["objects"]
    ]
    _print_table(pd.DataFrame(rows, columns=["photograph", "agreement", *names, "IoU"]), ".2f")


def _print_table(table: pd.DataFrame, floatfmt: str, last_rows: int = 0) -> None:
    left_out = len(table) - MAX_ROWS
    if left_out > 0:
        table = pd.concat([table[: MAX_ROWS - last_rows], table[len(table) - last_rows :]])
    table = table.astype(object).where(table.notna(), None)
    print(table.to_markdown(index=False, tablefmt="psql", floatfmt=floatfmt, missingval=""))
    if left_out > 0:
        print(f"{left_out} more rows are in the files")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: a value is out of its range, or contradicts another.
    """
    parser = ArgumentParser(prog="tools.compare_detectors", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="files, folders or patterns; default: an annotated test split")
    parser.add_argument("--frcnn", help="weights, or coco; default those of the newest run of Faster R-CNN")
    parser.add_argument("--yolov3", help="weights, or coco; default those of the newest run of YOLOv3")
    parser.add_argument("--start", "--weights", help="coco, for both, or weights, for the detector that they are of")
    parser.add_argument("--recipe", choices=RECIPES, help="of the newest runs; default any")
    parser.add_argument("--score", type=parse_score, default=0.5, help="objects compared have at least this score")
    parser.add_argument("--data", help="data root of the split; default that of the runs")
    parser.add_argument("--split", help="such as voc07_test; default that on which the runs are tested")
    parser.add_argument("--limit", type=int, default=100, help="photographs of the split")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default output/comparison, of a split output/errors"
    )
    args = parser.parse_args(argv)
    if args.limit < 1:
        raise UserError(f"LIMIT={args.limit}: expected 1 or more")
    if args.images and (args.split or args.data):
        raise UserError("IMAGES and SPLIT or DATA: expected either photographs or an annotated split; leave one out")
    return args


def name_alike(detectors: Sequence[Detector], class_names: Sequence[str]) -> list[str]:
    """Gives a class one name in all detectors, that of `class_names`: a sofa is a couch.

    Returns:
        `class_names`, and behind them what else a detector knows.
    """
    for detector in detectors:
        detector.class_names = in_words_of(class_names, detector.class_names)
    return list(dict.fromkeys([*class_names, *(name for each in detectors for name in each.class_names)]))


def compare_photographs(
    detectors: Sequence[Detector],
    records: Sequence[dict],
    class_names: Sequence[str],
    score: float,
    folder: Path,
    pictures: Sequence[str],
    left_out: LeftOut,
) -> tuple[list[dict], dict[str, list[list[dict]]]]:
    """Runs both detectors on every photograph and writes pictures: of annotated ones at most 20, where they differ.

    Args:
        detectors: both.
        records: dataset dicts of the photographs; those of a split have `annotations`.
        class_names: of all that is annotated or found.
        score: what is compared and drawn has at least this one.
        folder: of the results.
        pictures: the file of each picture in it.
        left_out: called for each photograph that cannot be read.

    Returns:
        A dict a photograph: `file_name`, `milliseconds` by detector, `objects` as `compare` pairs them, and `picture`
        where there is one; and by detector all objects that it found in each photograph.

    Raises:
        UserError: no photograph can be read, or one of a split cannot: its figures would then be of another split.
    """
    colors = class_colors(class_names)
    photographs: list[dict] = []
    found_by: dict[str, list[list[dict]]] = {detector.name: [] for detector in detectors}
    drawn = 0
    for number, record in enumerate(records):
        left_out.progress.update()
        try:
            image = detectors[0].read(record)
        except UserError as error:
            if "annotations" in record:
                raise
            left_out(error)
            continue
        if not photographs:
            for detector in detectors:
                detect(detector, image)  # the first pass through a network is slow
        shown, milliseconds = {}, {}
        for detector in detectors:
            objects, milliseconds[detector.name] = detect(detector, image)
            found_by[detector.name].append(objects)
            shown[detector.name] = [found for found in objects if found["score"] >= score]
        pairs = compare(shown)
        photograph: dict = {"file_name": record["file_name"], "milliseconds": milliseconds, "objects": pairs}
        photographs.append(photograph)
        if "annotations" in record:
            shown = {"annotated": _annotated(record, class_names), **shown}
            if drawn == MAX_PICTURES or all(pair["agreement"] == "both" for pair in pairs):
                continue
        drawn += 1
        photograph["picture"] = pictures[number]
        write_picture(folder / pictures[number], picture(image, shown, milliseconds, colors))
    left_out.raise_if_all()
    return photographs, found_by


def compare_errors(
    records: Sequence[dict], found_by: dict[str, list[list[dict]]], class_names: Sequence[str], split: str, folder: Path
) -> dict:
    """Sorts the errors of both detectors on an annotated split by their kind, prints and writes them.

    Args:
        records: dataset dicts of the split.
        found_by: by detector all objects that it found in each photograph.
        class_names: of all that is annotated or found.
        split: its name.
        folder: of the results.

    Returns:
        Which is ahead, see `compare_ap50`.
    """
    detections = {name: to_detections(found, class_names) for name, found in found_by.items()}
    analyses = {name: analyse_errors(records, found, class_names) for name, found in detections.items()}
    resampled = {name: resample_ap(records, found, len(class_names))["AP50"] for name, found in detections.items()}
    figures, ahead = compare_ap50({name: analysis.ap50 for name, analysis in analyses.items()}, resampled)
    print(f"Errors on {split} ({len(records)} photographs), all detections whatever their score; the cost is the")
    print("rise of AP50 if errors of this kind alone were mended, so that costs do not add up:")
    _print_table(errors_table(analyses), ".3f")
    print("AP50 " + ", ".join(f"{name} {analysis.ap50:.3f}" for name, analysis in analyses.items()))
    print(ahead)
    write_table(folder / "errors.csv", errors_table(analyses), **CSV)
    errors = {"split": split, "photographs": len(records)} | {name: asdict(a) for name, a in analyses.items()}
    write_json(folder / "errors.json", errors)
    write_figure(folder / "errors.png", plot_errors(analyses))
    return figures


def _annotated(record: dict, class_names: Sequence[str]) -> list[dict]:
    objects = []
    for annotation in record["annotations"]:
        bbox = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
        objects.append({"class": class_names[annotation["category_id"]], "bbox": bbox})
    return objects


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Compares, prints the tables and writes all files.

    Args:
        argv: the command line without the program's name; None takes that of the process.
    """
    args = parse_args(argv)
    records = [{"file_name": str(path)} for path in find_images(args.images)]
    started = start_by_model(args.start)
    frcnn, yolov3 = args.frcnn or started.get("faster_rcnn"), args.yolov3 or started.get("yolov3")
    detectors = load_detectors(frcnn, yolov3, args.output, args.recipe)
    weights = {detector.name: detector.weights for detector in detectors}
    for name, source in weights.items():
        print(f"{name}: {source}")
    split, class_names = None, detectors[0].class_names
    if not records:
        split, records, class_names = read_split(detectors, args.data, args.split, args.limit)
    class_names = name_alike(detectors, class_names)

    folder = args.out or args.output / ("comparison" if split is None else "errors")
    paths = [Path(record["file_name"]) for record in records]
    pictures = [f"pictures/{name}.png" for name in unique_names(paths)]
    of_split = ["errors.csv", "errors.json", "errors.png"] if split is not None else []
    reserve_results(folder, ["photographs.csv", "objects.csv", "comparison.json", *of_split, *pictures], paths)

    with tqdm(total=len(records), unit="image", disable=None) as progress:
        left_out = LeftOut(len(records), progress)
        photographs, found_by = compare_photographs(
            detectors, records, class_names, args.score, folder, pictures, left_out
        )
    table = photographs_table(photographs, list(weights))
    if split is None:
        _print_objects(photographs, list(weights))
        _print_table(table.assign(photograph=[Path(name).name for name in table["photograph"]]), ".0f", last_rows=1)
    else:
        _print_table(table.tail(1), ".0f")
    write_table(folder / "photographs.csv", table, **CSV)
    write_table(folder / "objects.csv", objects_table(photographs, list(weights)), **CSV)
    comparison: dict = {"weights": weights, "split": split, "score": args.score, "machine": machine()}
    if split is not None:
        comparison["ap50"] = compare_errors(records, found_by, class_names, split, folder)
    write_json(folder / "comparison.json", comparison | {"photographs": photographs})
    drawn = sum("picture" in photograph for photograph in photographs)
    print(f"{drawn} pictures, tables and comparison.json are in {folder}")
    left_out.raise_if_any()


if __name__ == "__main__":
    main()
