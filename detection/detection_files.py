"""Detections in the files of other programs, and VOC's form of a submission.

COCO    a JSON list of `FORM`, pixels counted from 0. In place of `category` an entry may have `category_id`, counted
        from 1 in the order of the classes. A number as `image_id` is the image whose name is that number: 1 is 000001,
        2008000008 is 2008_000008. Where COCO's file of annotations is given, numbers are those of its `images` and
        `categories`.
VOC     a folder of `comp4_det_test_<class>.txt`, one for each class, a detection a line: `VOC_LINE`, pixels counted
        from 1, the last one included.
YOLO    a folder of `<image>.txt`, none where nothing was found, a detection a line: `YOLO_LINE`, the class counted from
        0, the box's centre and size as shares of the image's.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.errors import UserError
from common.files import read_json, write_text
from detection.matching import Detections

FORM = '{"image_id": "000001", "category": "dog", "bbox": [x, y, width, height], "score": 0.9}'
VOC_LINE = "image score xmin ymin xmax ymax"
YOLO_LINE = "class x y width height score"

# Image, category, score, x0, y0, x1, y1; the box continuous and counted from 0.
Row = tuple[float, ...]
T = TypeVar("T", int, str)


def read_detections(
    path: Path, records: Sequence[dict], class_names: Sequence[str], annotations: Path | None = None
) -> Detections:
    """Reads detections in any of the three forms and checks every one.

    Args:
        path: a JSON file, or a folder.
        records: the images in the order of the dataset: `image_id`, and for YOLO's form `height` and `width`.
        class_names: names in the order of `category_id`.
        annotations: COCO's annotation file, which the numbers of images and categories refer to.

    Raises:
        UserError: a file cannot be read, or one of its entries is wrong; the message says which.
    """
    if not path.is_dir():
        rows = _read_coco(path, _ids(records), class_names, annotations)
    elif files := sorted(path.glob("comp[0-9]_det_*.txt")):
        rows = _read_voc(path, files, _ids(records), class_names)
    else:
        rows = _read_yolo(path, records, class_names)
    table = np.array(list(rows), dtype=np.float64).reshape(-1, 7)
    return Detections(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], table[:, 3:])


def write_submission(
    folder: Path, detections: Detections, image_ids: Sequence[str], class_names: Sequence[str], split: str
) -> None:
    """Writes VOC's form of a submission, `comp4_det_<split>_<class>.txt` for each class.

    Args:
        folder: where they go; it is made if missing.
        detections: on the images.
        image_ids: of the images, in the order of the dataset.
        class_names: names in the order of `category_id`.
        split: as VOC calls it, such as "test".

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = np.column_stack([detections.score, detections.box + np.array([1, 1, 0, 0])])
    for category, name in enumerate(class_names):
        lines = [
            " ".join([image_ids[detections.image[row]], *(f"{value:.9g}" for value in figures[row])]) + "\n"
            for row in np.flatnonzero(detections.category == category)
        ]
        write_text(folder / f"comp4_det_{split}_{name}.txt", "".join(lines))


def _ids(records: Sequence[dict]) -> dict[str, int]:
    return {record["image_id"]: position for position, record in enumerate(records)}


def _unambiguous(keys: Iterable[tuple[T, int]]) -> dict[T, int]:
    """Positions by key, without the keys that several positions share."""
    positions: dict[T, set[int]] = {}
    for key, position in keys:
        positions.setdefault(key, set()).add(position)
    return {key: found.pop() for key, found in positions.items() if len(found) == 1}


def _by_stem(ids: Mapping[str, int]) -> dict[str, int]:
    """By the names of the image files, without the folder that an id may have."""
    return _unambiguous((image_id.rpartition("/")[2], position) for image_id, position in ids.items())


def _read_coco(path: Path, ids: dict[str, int], class_names: Sequence[str], annotations: Path | None) -> Iterator[Row]:
    entries = read_json(path, f"a JSON list of {FORM}")
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds {_show(entries)}, expected a JSON list of {FORM}")
    categories = {name: position for position, name in enumerate(class_names)}
    if annotations is None:
        digits = ((image_id.replace("_", ""), position) for image_id, position in ids.items())
        numbers = _unambiguous((int(text), position) for text, position in digits if text.isdecimal())
        category_ids = {position + 1: position for position in categories.values()}
    else:
        stems, (images, names) = _by_stem(ids), _read_coco_numbers(annotations)
        numbers = {number: stems[stem] for number, stem in images.items() if stem in stems}
        category_ids = {number: categories[name] for number, name in names.items() if name in categories}
    for index, entry in enumerate(entries):
        try:
            yield _parse(entry, ids, numbers, categories, category_ids)
        except ValueError as error:
            raise UserError(f"{path}: entry {index} (counted from 0): {error}") from error


def _read_coco_numbers(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """By number the names of images, without folder and extension, and those of categories."""
    expected = "COCO's annotations: images with id and file_name, categories with id and name"
    content = read_json(path, expected)
    try:
        images = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        return images, {category["id"]: category["name"] for category in content["categories"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}; expected {expected}") from error


def _parse(
    entry: object,
    ids: dict[str, int],
    numbers: dict[int, int],
    categories: dict[str, int],
    category_ids: dict[int, int],
) -> Row:
    """One entry of COCO results; ValueError tells what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {_show(entry)}, expected {FORM}")
    for key in ("image_id", "bbox", "score"):
        if key not in entry:
            raise ValueError(f"has no {key!r}, expected {FORM}")
    image_id, bbox, score = entry["image_id"], entry["bbox"], entry["score"]
    image = ids.get(image_id) if isinstance(image_id, str) else numbers.get(image_id) if type(image_id) is int else None
    if image is None:
        hint = "" if isinstance(image_id, str) else "; ANNOTATIONS=coco.json tells which images numbers stand for"
        raise ValueError(
            f'image_id {_show(image_id)} is not in the split, expected one such as "{next(iter(ids))}"{hint}'
        )
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise ValueError(f"bbox {_show(bbox)}, expected four finite numbers [x, y, width, height]")
    x, y, width, height = bbox
    if width < 0 or height < 0:
        raise ValueError(f"bbox {_show(bbox)} has a negative size, expected [x, y, width, height], not two corners")
    if not _is_number(score):
        raise ValueError(f"score {_show(score)}, expected a finite number")
    return image, _category(entry, categories, category_ids), score, x, y, x + width, y + height


def _category(entry: dict, categories: dict[str, int], category_ids: dict[int, int]) -> int:
    if "category" in entry:
        name = entry["category"]
        if not isinstance(name, str) or name not in categories:
            raise ValueError(f"category {_show(name)} is unknown, expected one of {', '.join(categories)}")
        return categories[name]
    if "category_id" not in entry:
        raise ValueError(f"has no 'category' and no 'category_id', expected {FORM}")
    number = entry["category_id"]
    if type(number) is not int or number not in category_ids:
        known = f"{min(category_ids)} to {max(category_ids)}" if category_ids else "names of the data as categories"
        raise ValueError(f"category_id {_show(number)} is unknown, expected {known}")
    return category_ids[number]


def _read_voc(folder: Path, files: Sequence[Path], ids: dict[str, int], class_names: Sequence[str]) -> Iterator[Row]:
    of_class: dict[str, Path] = {}
    for path in files:
        name = path.stem.split("_", 3)[-1]  # behind competition, "det" and split
        reason = "no class of the data" if name not in class_names else "a second file of its class"
        if name not in class_names or name in of_class:
            raise UserError(f"{path}: {reason}; expected one for each of {', '.join(class_names)}")
        of_class[name] = path
    for category, name in enumerate(class_names):
        if name not in of_class:
            raise UserError(
                f"{folder}: no file of the class {name!r}; expected one for each class, empty where nothing is found"
            )

        def parse(words: list[str], category: int = category) -> Row:
            if words[0] not in ids:
                raise ValueError(f"image {words[0]!r} is not in the split")
            score, x0, y0, x1, y1 = map(_to_number, words[1:])
            return ids[words[0]], category, score, x0 - 1, y0 - 1, x1, y1

        yield from _read_lines(of_class[name], VOC_LINE, parse)


def _read_yolo(folder: Path, records: Sequence[dict], class_names: Sequence[str]) -> Iterator[Row]:
    files, stems = sorted(folder.glob("*.txt")), _by_stem(_ids(records))
    if not files:
        raise UserError(f"{folder}: no .txt in it; expected VOC's comp4_det_test_<class>.txt or YOLO's <image>.txt")
    for path in files:
        if path.stem not in stems:
            raise UserError(f"{path}: no image of the split has this name; expected {next(iter(stems))}.txt, say")
        record = records[stems[path.stem]]
        if "width" not in record:
            raise UserError(f"{path}: has shares of an image whose size is unknown without annotations; give pixels")

        def parse(words: list[str], image: int = stems[path.stem], record: dict = record) -> Row:
            category = int(words[0])
            if not 0 <= category < len(class_names):
                raise ValueError(f"class {category} is unknown, expected 0 to {len(class_names) - 1}")
            x, y, width, height, score = map(_to_number, words[1:])
            x0, x1 = ((x + side * width / 2) * record["width"] for side in (-1, 1))
            y0, y1 = ((y + side * height / 2) * record["height"] for side in (-1, 1))
            return image, category, score, x0, y0, x1, y1

        yield from _read_lines(path, YOLO_LINE, parse)


def _read_lines(path: Path, form: str, parse: Callable[[list[str]], Row]) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected lines of {form}") from error
    for number, words in enumerate(map(str.split, lines), start=1):
        if not words:
            continue
        try:
            if len(words) != len(form.split()):
                raise ValueError(f"{len(words)} words")
            row = parse(words)
            if row[5] < row[3] or row[6] < row[4]:
                raise ValueError("a box of negative size")
        except ValueError as error:
            raise UserError(f"{path}: line {number}: {error}; expected {form}") from error
        yield row


def _to_number(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is no finite number")
    return value


def _is_number(value: object) -> bool:
    # A bool is an int too. nan compares false, and isfinite would overflow with a large int.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
