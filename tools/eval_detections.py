"""Scores any detector's boxes: `python -m tools.eval_detections DETECTIONS --split voc07_test`.

DETECTIONS is a JSON list in the form of COCO results, pixels counted from 0:
`{"image_id": "000001", "category": "dog", "bbox": [x, y, width, height], "score": 0.9}`.
In place of `category` an entry may have `category_id`, counted from 1 in the order of the classes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from common.contents import read_json
from common.data_root import resolve_data_root
from common.errors import UserError, exits_on_user_error
from detection.bootstrap import interval, resample_ap
from detection.evaluation import evaluate_voc
from detection.matching import Detections
from detection.voc import OFFICIAL_FOLDERS, SPLITS, default_splits, register_voc

FORM = '{"image_id": "000001", "category": "dog", "bbox": [x, y, width, height], "score": 0.9}'


def read_detections(path: Path, image_ids: Sequence[str], class_names: Sequence[str]) -> Detections:
    """Reads a file of detections and checks every entry.

    Args:
        path: JSON file in the form that the module describes.
        image_ids: ids of the images, in the order of the dataset.
        class_names: names in the order of `category_id`.

    Raises:
        UserError: the file cannot be read, is no list, or has a wrong entry, named by its position counted from 0.
    """
    entries = read_json(path, f"a JSON list of {FORM}")
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds {_show(entries)}, expected a JSON list of {FORM}")

    images = {image_id: position for position, image_id in enumerate(image_ids)}
    categories = {name: position for position, name in enumerate(class_names)}
    rows = []
    for index, entry in enumerate(entries):
        try:
            rows.append(_parse(entry, images, categories))
        except ValueError as error:
            raise UserError(f"{path}: entry {index} (counted from 0): {error}") from error
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    box = np.concatenate([table[:, 3:5], table[:, 3:5] + table[:, 5:7]], axis=1)
    return Detections(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], box)


def _parse(entry: object, images: dict[str, int], categories: dict[str, int]) -> tuple[float, ...]:
    """Image, category, score, x, y, width and height of one entry; ValueError tells what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {_show(entry)}, expected {FORM}")
    for key in ("image_id", "bbox", "score"):
        if key not in entry:
            raise ValueError(f"has no {key!r}, expected {FORM}")
    image_id, bbox, score = entry["image_id"], entry["bbox"], entry["score"]
    if not isinstance(image_id, str) or image_id not in images:
        raise ValueError(
            f'image_id {_show(image_id)} is not in the split, expected a string such as "{next(iter(images))}"'
        )
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise ValueError(f"bbox {_show(bbox)}, expected four finite numbers [x, y, width, height]")
    if bbox[2] < 0 or bbox[3] < 0:
        raise ValueError(f"bbox {_show(bbox)} has a negative size, expected [x, y, width, height], not two corners")
    if not _is_number(score):
        raise ValueError(f"score {_show(score)}, expected a finite number")
    return images[image_id], _category(entry, categories), score, *bbox


def _category(entry: dict, categories: dict[str, int]) -> int:
    if "category" in entry:
        name = entry["category"]
        if not isinstance(name, str) or name not in categories:
            raise ValueError(f"category {_show(name)} is unknown, expected one of {', '.join(categories)}")
        return categories[name]
    if "category_id" not in entry:
        raise ValueError(f"has no 'category' and no 'category_id', expected {FORM}")
    number = entry["category_id"]
    if type(number) is not int or not 1 <= number <= len(categories):
        raise ValueError(f"category_id {_show(number)} is unknown, expected 1 to {len(categories)}")
    return number - 1


def _is_number(value: object) -> bool:
    # A bool is an int too.
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )  # nan compares false


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Scores a file of detections, prints the table and writes the files of `Evaluation.write`.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: data, detections or the output folder are missing or wrong.
    """
    parser = argparse.ArgumentParser(prog="tools.eval_detections", description=__doc__.split("\n")[0])
    parser.add_argument("detections", type=Path, help="JSON list of detections in COCO's result form")
    parser.add_argument("--split", help="dataset they were made on (default: voc07_test, or the root's own test split)")
    parser.add_argument("--data", help="data root (default: datasets/, or else the sample)")
    parser.add_argument("--interval", action="store_true", help="also 95 %% intervals, by a bootstrap over the images")
    parser.add_argument("--out", type=Path, help="folder for the results (default: that of the detections)")
    args = parser.parse_args(argv)

    needed = [folder for prefix, folder in OFFICIAL_FOLDERS.items() if (args.split or prefix).startswith(prefix)]
    root, is_sample = resolve_data_root(args.data, needed)
    register_voc(root)
    split = args.split or default_splits(root)[1][0]
    known = sorted(
        {f"{prefix}_{name}" for prefix in ("voc", *OFFICIAL_FOLDERS) for name in SPLITS} & set(DatasetCatalog)
    )
    if split not in known:
        raise UserError(f"{root}: has no split {split!r}, expected one of {', '.join(known)}")
    records, class_names = DatasetCatalog.get(split), MetadataCatalog.get(split).thing_classes

    detections = read_detections(args.detections, [record["image_id"] for record in records], class_names)
    evaluation = evaluate_voc(records, detections, class_names)
    if args.interval:
        resampled = resample_ap(records, detections, len(class_names))
        evaluation = replace(evaluation, intervals={metric: interval(values) for metric, values in resampled.items()})
    print(f"{len(detections.score)} detections on {split}, {len(records)} images of {root}/", end="")
    print(" (the drawn sample)" if is_sample else "")
    print(evaluation.format_table())
    out = args.out or args.detections.parent
    try:
        evaluation.write(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder with OUT=") from error
    print(f"written: {out}/evaluation.json, .csv and .md, with curves and confusion matrix")


if __name__ == "__main__":
    main()
