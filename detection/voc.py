"""Folders in Pascal VOC's layout: read, checked, cached, and registered in Detectron2's catalogs.

A VOC-layout folder holds `Annotations/<id>.xml`, `JPEGImages/<id>.jpg` and `ImageSets/Main/<split>.txt`. A data root is
either a folder with the official `VOC2007/` and `VOC2012/` in it, or itself one such folder with classes of its own.
Roboflow's form of it, `train/`, `valid/` and `test/` with annotations beside the images, is read as well: its ids begin
with the name of the folder.
"""

import difflib
import gc
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from common.errors import UserError
from detection.voc_annotations import Annotations, annotation_folder, is_flat, parts, read_annotations

logger = logging.getLogger(__name__)

VOC_CLASSES: tuple[str, ...] = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 classes of VOC, in its alphabetical order; `category_id` is the index."""

LABELLED = re.compile(r"(.*\S)\s+(?:-1|0|1)")  # a line of VOC's lists of one class
SPLITS = ("train", "val", "trainval", "test")
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
)  # in any case; the first found wins
FLAT_FOLDERS = {"train": "train", "val": "valid", "test": "test"}  # of a split, where there are no lists
UNDIVIDED = "default"  # the one list that CVAT writes
OFFICIAL_FOLDERS = {"voc07": "VOC2007", "voc12": "VOC2012"}


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Spares the collector searching a hundred thousand new containers, none of them in a cycle, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_garbage_collection_paused()
def load_voc_instances(dirname: Path, split: str, class_names: Sequence[str]) -> list[dict]:
    """Reads one split of a VOC-layout folder into Detectron2's standard dataset dicts.

    The annotations are parsed once and cached, see `read_annotations`.

    Args:
        dirname: folder with `Annotations/`, `ImageSets/Main/` and `JPEGImages/`.
        split: name of the list of image ids, `ImageSets/Main/<split>.txt`.
        class_names: the classes; `category_id` is the index into them.

    Returns:
        One dict an image, in the order of the list: `file_name`, `image_id` (str), `height`, `width` (pixels) and
        `annotations`, dicts of `bbox` (x0, y0, x1, y1 as floats in pixels counted from 0: VOC counts from 1 and
        includes the last pixel, so the upper left corner moves by one), `bbox_mode` (`BoxMode.XYXY_ABS`),
        `category_id`, and `difficult` and `truncated`, each 0 or 1. A box leaving its image by up to one pixel is
        clipped.

    Raises:
        UserError: the list, an image or an annotation is missing or wrong; the message names the file.
    """
    ids = read_ids(dirname, split)
    file_names = _find_images(dirname, split, ids)
    annotations = read_annotations(dirname, split, ids)
    images, objects = annotations.images, annotations.objects

    bboxes = objects["bbox"].tolist()
    category_ids = _category_ids(dirname, annotations, class_names)
    flags = objects["difficult"].tolist(), objects["truncated"].tolist()
    instances = [
        {
            "bbox": bbox,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": category_id,
            "difficult": difficult,
            "truncated": truncated,
        }
        for bbox, category_id, difficult, truncated in zip(bboxes, category_ids, *flags, strict=True)
    ]
    sizes = images["height"].tolist(), images["width"].tolist()
    return [
        {"file_name": file_name, "image_id": image_id, "height": height, "width": width, "annotations": instances[part]}
        for file_name, image_id, height, width, part in zip(file_names, ids, *sizes, parts(images), strict=True)
    ]


@_garbage_collection_paused()
def read_labels(root: Path) -> tuple[str, ...]:
    """Finds the class names of a VOC-layout folder.

    They are the lines of `labels.txt` where that exists (blank lines and those starting with `#` do not count);
    otherwise VOC's twenty when the annotations of the folder's splits name no others; otherwise the names found there,
    sorted.

    Raises:
        UserError: `labels.txt` is empty or names a class twice, an annotation is wrong, or there is no object at all.
    """
    path = root / "labels.txt"
    if path.is_file():
        lines = [line for line in _read_lines(path) if not line.startswith("#")]
        if not lines:
            raise UserError(
                f"{path}: no class name in it; write one a line, or delete the file to use the annotations'"
            )
        if repeated := _repeated(lines):
            raise UserError(f"{path}: class {repeated!r} is named twice; leave one of the lines")
        return tuple(lines)
    splits = present_splits(root)
    found = {name for split in splits for name in read_annotations(root, split, read_ids(root, split)).names.tolist()}
    if not found:
        raise UserError(
            f"{root}: the annotations of its splits ({', '.join(splits) or 'none'}) hold no object to take class names "
            f"from; name the classes in {path}, one a line"
        )
    return VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))


def register_voc(root: Path) -> None:
    """Registers the datasets of a data root in Detectron2's catalogs, in place of those of a former root.

    An official root gives `voc07_train`, `voc07_val`, `voc07_trainval`, `voc07_test` and the same four of `voc12`, with
    VOC's classes; a root that is itself a VOC-layout folder gives `voc_train`, `voc_val`, `voc_trainval` and
    `voc_test`, with the classes of `read_labels`. A split is read, and its absence noticed, when its dataset is asked
    for. The metadata are `thing_classes`, `dirname`, `split` and `evaluator_type` ("voc").

    Raises:
        UserError: `root` is neither, or the classes of a folder cannot be told.
    """
    if _is_official(root):
        folders = {prefix: root / folder for prefix, folder in OFFICIAL_FOLDERS.items()}
        class_names = VOC_CLASSES
    else:
        folders = {"voc": root}
        class_names = read_labels(root)

    for prefix in ("voc", *OFFICIAL_FOLDERS):
        for split in SPLITS:
            name = f"{prefix}_{split}"
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
    for prefix, dirname in folders.items():
        for split in SPLITS:
            name = f"{prefix}_{split}"
            DatasetCatalog.register(name, partial(load_voc_instances, dirname, split, class_names))
            MetadataCatalog.get(name).set(
                thing_classes=list(class_names), dirname=str(dirname), split=split, evaluator_type="voc"
            )


def default_splits(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names the datasets to train on and to test on for a data root.

    An official root gives VOC07+12: trainval of both years, and the test set of 2007. For a VOC-layout folder it is
    `trainval` (or else `train`) against `test`; without a test list, `train` against `val`.

    Raises:
        UserError: a folder or a list that this needs is missing.
    """
    if _is_official(root):
        for folder in OFFICIAL_FOLDERS.values():
            if not (root / folder).is_dir():
                raise UserError(
                    f"{root}: holds no {folder}/, but VOC07+12 needs {' and '.join(OFFICIAL_FOLDERS.values())}; "
                    f"see `make check-datasets DATA={root}`"
                )
        return ("voc07_trainval", "voc12_trainval"), ("voc07_test",)
    present = present_splits(root)
    # Never trainval against val, which it contains.
    for train, test in (("trainval", "test"), ("train", "test"), ("train", "val")):
        if train in present and test in present:
            return (f"voc_{train}",), (f"voc_{test}",)
    if is_flat(root):
        raise UserError(f"{root}: annotations in train/ only; expected them in test/ or valid/ too, to test on")
    raise UserError(
        f"{root / 'ImageSets' / 'Main'}: lists of {', '.join(present) or 'no split'} found; expected trainval.txt (or "
        "train.txt) with test.txt, or train.txt with val.txt, one image id a line"
    )


def present_splits(dirname: Path) -> list[str]:
    """The splits of a VOC-layout folder that have a list; `train` and `val` where there is but CVAT's undivided one."""
    if is_flat(dirname):
        return [split for split in FLAT_FOLDERS if any(_split_file(dirname, split).glob("*.xml"))]
    present = [split for split in SPLITS if _split_file(dirname, split).is_file()]
    return present or (["train", "val"] if _split_file(dirname, UNDIVIDED).is_file() else [])


def _is_official(root: Path) -> bool:
    if any((root / folder).is_dir() for folder in OFFICIAL_FOLDERS.values()):
        return True
    if is_flat(root) or ((root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir()):
        return False
    found = "no VOC data in it" if root.is_dir() else "no such folder"
    raise UserError(
        f"{root}: {found}; expected VOC2007/ and VOC2012/, or Annotations/, ImageSets/Main/ and JPEGImages/; "
        f"see `make check-datasets DATA={root}`"
    )


def _split_file(dirname: Path, split: str) -> Path:
    """The list of a split, or the folder that stands for it."""
    if is_flat(dirname):
        return dirname / FLAT_FOLDERS.get(split, split)
    return dirname / "ImageSets" / "Main" / f"{split}.txt"


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    return [line for line in map(str.strip, text.splitlines()) if line]


def _repeated(lines: Sequence[str]) -> str | None:
    if len(set(lines)) == len(lines):
        return None
    return Counter(lines).most_common(1)[0][0]


def read_ids(dirname: Path, split: str) -> list[str]:
    """The image ids of a split, in the order of its list; one may lie in a subfolder: `folder/id`.

    A label behind an id, as in VOC's lists of one class (`000001 -1`), is left out. Where the folder has no list but
    CVAT's undivided one, every fifth image of that is `val` and the others are `train`.

    Raises:
        UserError: the list is missing or empty, or an id is a path or comes twice.
    """
    path = _split_file(dirname, split)
    if is_flat(dirname):
        if ids := sorted(f"{path.name}/{annotation.stem}" for annotation in path.glob("*.xml")):
            return ids
        raise UserError(f"{path}: no annotation in it; expected <id>.xml beside each image, as in train/")
    undivided = _split_file(dirname, UNDIVIDED)
    if split in ("train", "val") and undivided.is_file() and not any(_split_file(dirname, s).is_file() for s in SPLITS):
        ids = _ids_of(dirname, undivided)
        if len(ids) < 2:
            raise UserError(f"{undivided}: one image, expected two or more, to train on and to test on")
        logger.warning("%s is the only list: every fifth image is for validation, the others for training", undivided)
        every = min(5, len(ids))
        return [ids[n] for n in range(len(ids)) if (n % every == every - 1) == (split == "val")]
    for part in (dirname, *reversed(path.parents[:2]), path):
        if not part.exists():
            root = dirname.parent if dirname.name in OFFICIAL_FOLDERS.values() else dirname
            raise UserError(
                f"{path}: {'no such file' if part == path else f'{part} is missing'}; expected the image ids of this "
                f"split, one a line; see `make check-datasets DATA={root}`"
            )
    return _ids_of(dirname, path)


def _ids_of(dirname: Path, path: Path) -> list[str]:
    ids = _read_lines(path)
    if not ids:
        raise UserError(f"{path}: empty; expected one image id a line")
    for place, line in enumerate(ids):
        # An id may end like that itself: the annotations know.
        if (match := LABELLED.fullmatch(line)) and not (dirname / "Annotations" / f"{line}.xml").is_file():
            ids[place] = match[1]
    if outside := next((i for i in ids if "\\" in i or i.startswith("/") or ".." in i.split("/")), None):
        raise UserError(
            f"{path}: image id {outside!r} is a path; expected a file name below JPEGImages/, without extension"
        )
    if repeated := _repeated(ids):
        raise UserError(f"{path}: image id {repeated!r} is listed twice; leave one of the lines")
    return ids


def image_folder(dirname: Path) -> Path:
    """Where the images lie by id: `JPEGImages/`, or the folder itself where they lie beside the annotations."""
    return dirname if is_flat(dirname) else dirname / "JPEGImages"


def find_pictures(folder: Path, ids: Sequence[str]) -> list[str | None]:
    """Gives each id its image file below `folder`, or None, from one listing: asking for 16,551 one by one is slow.

    Raises:
        UserError: the folder cannot be listed.
    """
    names: dict[str, str] = {}
    for part in sorted({image_id.rpartition("/")[0] for image_id in ids}):
        try:
            with os.scandir(folder / part) as entries:
                for entry in entries:
                    stem, dot, suffix = entry.name.rpartition(".")
                    names[(f"{part}/" if part else "") + stem + dot + suffix.lower()] = entry.path
        except OSError as error:
            raise UserError(f"{folder / part}: {error.strerror}; expected the folder of the images") from error
    return [
        next((names[image_id + suffix] for suffix in IMAGE_SUFFIXES if image_id + suffix in names), None)
        for image_id in ids
    ]


def _find_images(dirname: Path, split: str, ids: Sequence[str]) -> list[str]:
    folder = image_folder(dirname)
    found = []
    for image_id, path in zip(ids, find_pictures(folder, ids), strict=True):
        if path is None:
            raise UserError(
                f"{folder / image_id}.jpg: no such image, but {_split_file(dirname, split)} lists {image_id!r}; "
                f"add the image ({', '.join(IMAGE_SUFFIXES)}) or remove the line (an id is a file name without its "
                "extension)"
            )
        found.append(path)
    return found


def _category_ids(dirname: Path, annotations: Annotations, class_names: Sequence[str]) -> list[int]:
    index = {name: number for number, name in enumerate(class_names)}
    names, labels = annotations.names.tolist(), annotations.objects["label"]
    for label, name in enumerate(names):
        if name not in index:
            first_object = np.flatnonzero(labels == label)[0]
            image = np.searchsorted(np.cumsum(annotations.images["num_objects"]), first_object, side="right")
            close = difflib.get_close_matches(name, class_names, n=1)
            raise UserError(
                f"{annotation_folder(dirname) / annotations.ids[image]}.xml: unknown class {name!r}"
                f"{f', did you mean {close[0]!r}?' if close else ';'} expected one of {', '.join(class_names)}"
            )
    return np.array([index[name] for name in names], dtype=int)[labels].tolist()
