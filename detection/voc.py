"""Folders in Pascal VOC's layout: read, checked, cached, and registered in Detectron2's catalogs.

A VOC-layout folder holds `Annotations/<id>.xml`, `JPEGImages/<id>.jpg` and `ImageSets/Main/<split>.txt`. A data root is
either a folder with the official `VOC2007/` and `VOC2012/` in it, or itself one such folder with classes of its own.
Roboflow's form of it, `train/`, `valid/` and `test/` with annotations beside the images, is read as well: its ids begin
with the name of the folder.
"""

import difflib
import gc
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.structures import BoxMode

from common.errors import UserError
from detection.voc_annotations import Annotations, annotation_folder, is_parted, parts, read_annotations
from detection.voc_lists import (
    FLAT_FOLDERS,
    IMAGE_SUFFIXES,
    OFFICIAL_FOLDERS,
    SPLITS,
    find_pictures,
    image_folder,
    is_voc_folder,
    present_splits,
    read_ids,
    read_lines,
    repeated,
    split_file,
)

logger = logging.getLogger(__name__)


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
        lines = [line for line in read_lines(path) if not line.startswith("#")]
        if not lines:
            raise UserError(
                f"{path}: no class name in it; write one a line, or delete the file to use the annotations'"
            )
        if twice := repeated(lines):
            raise UserError(f"{path}: class {twice!r} is named twice; leave one of the lines")
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


def default_train(root: Path) -> tuple[str, ...]:
    """Names the datasets to train on for a data root.

    An official root gives trainval of both years, VOC07+12. A VOC-layout folder gives `trainval` where it has a test
    list, else `train`: never trainval to test on val, which it contains.

    Raises:
        UserError: a folder or a list that this needs is missing.
    """
    if _is_official(root):
        _refuse_missing(root, OFFICIAL_FOLDERS.values())
        return "voc07_trainval", "voc12_trainval"
    present = present_splits(root)
    if {"trainval", "test"} <= set(present):
        return ("voc_trainval",)
    if "train" in present:
        return ("voc_train",)
    raise _without_pair(root, present)


def records_of(names: Iterable[str]) -> list[dict]:
    """The dataset dicts of several registered datasets, in their order."""
    return [record for name in names for record in DatasetCatalog.get(name)]


def default_test(root: Path) -> tuple[str, ...]:
    """Names the datasets to test on for a data root.

    An official root gives the test set of 2007, a VOC-layout folder `test`, or else the `val` that goes with `train`.

    Raises:
        UserError: a folder or a list that this needs is missing.
    """
    if _is_official(root):
        _refuse_missing(root, [OFFICIAL_FOLDERS["voc07"]])
        return ("voc07_test",)
    present = present_splits(root)
    if "test" in present:
        return ("voc_test",)
    if {"train", "val"} <= set(present):
        return ("voc_val",)
    raise _without_pair(root, present)


def _refuse_missing(root: Path, folders: Collection[str]) -> None:
    for folder in folders:
        if not (root / folder).is_dir():
            (other,) = set(OFFICIAL_FOLDERS.values()) - {folder}
            raise UserError(
                f"{root}: holds no {folder}/, expected it beside {other}/; see `make check-datasets DATA={root}`, or "
                f"take {other} alone with DATA={root / other}"
            )


def _without_pair(root: Path, present: Sequence[str]) -> UserError:
    if is_parted(root):
        folders = ", ".join(f"{FLAT_FOLDERS[split]}/" for split in present)
        return UserError(
            f"{root}: annotations in {folders} only; expected them in test/ or valid/ to test on, in train/ to train on"
        )
    return UserError(
        f"{root / 'ImageSets' / 'Main'}: lists of {', '.join(present) or 'no split'} found; expected trainval.txt (or "
        "train.txt) with test.txt, or train.txt with val.txt, one image id a line"
    )


def _is_official(root: Path) -> bool:
    if any((root / folder).is_dir() for folder in OFFICIAL_FOLDERS.values()):
        return True
    if is_voc_folder(root):
        return False
    found = "no VOC data in it" if root.is_dir() else "no such folder"
    raise UserError(
        f"{root}: {found}; expected VOC2007/ and VOC2012/, or Annotations/, ImageSets/Main/ and JPEGImages/ "
        f"(make import-dataset makes them of COCO's or YOLO's form); see `make check-datasets DATA={root}`"
    )


def _find_images(dirname: Path, split: str, ids: Sequence[str]) -> list[str]:
    folder = image_folder(dirname)
    found = []
    for image_id, path in zip(ids, find_pictures(folder, ids), strict=True):
        if path is None:
            raise UserError(
                f"{folder / image_id}.jpg: no such image, but {split_file(dirname, split)} lists {image_id!r}; "
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
