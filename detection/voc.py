"""Folders in Pascal VOC's layout: read, checked, cached, and registered in Detectron2's catalogs.

A VOC-layout folder holds `Annotations/<id>.xml`, `JPEGImages/<id>.jpg` and `ImageSets/Main/<split>.txt`. A data root is
either a folder with the official `VOC2007/` and `VOC2012/` in it, or itself one such folder with classes of its own.
"""

import difflib
import gc
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from common.errors import UserError
from tools.run_folder import write_atomically

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

SPLITS = ("train", "val", "trainval", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")  # the first one found wins
OFFICIAL_FOLDERS = {"voc07": "VOC2007", "voc12": "VOC2012"}
TOLERANCE = 1.0  # pixels by which a box may leave its image: tools disagree on counting from 0 or from 1

# Rows of a cache file; another row type makes a cache unreadable, so it is built anew.
IMAGE = np.dtype([("file_size", "i8"), ("mtime_ns", "i8"), ("height", "i8"), ("width", "i8"), ("num_objects", "i8")])
OBJECT = np.dtype([("bbox", "f8", 4), ("label", "i8"), ("difficult", "u1"), ("truncated", "u1")])


class _Annotations(NamedTuple):
    """The annotations of a split, N images with M objects, as arrays."""

    ids: np.ndarray  # (N,) str
    images: np.ndarray  # (N,) IMAGE
    objects: np.ndarray  # (M,) OBJECT, in the order of the images
    names: np.ndarray  # (K,) str, the class names found; a label is an index into them


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

    The annotations are parsed once and cached, in `dirname/.voc_cache/` or, where that cannot be written, in the user's
    cache folder. An annotation file whose size or time of modification has changed is parsed again.

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
    ids = _read_ids(dirname, split)
    file_names = _find_images(dirname, split, ids)
    annotations = _read_annotations(dirname, split, ids)
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
        for file_name, image_id, height, width, part in zip(file_names, ids, *sizes, _parts(images), strict=True)
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
    splits = [split for split in SPLITS if _split_file(root, split).is_file()]
    found = {name for split in splits for name in _read_annotations(root, split, _read_ids(root, split)).names.tolist()}
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


def annotation_xml(file_name: str, height: int, width: int, objects: Sequence[tuple[str, Sequence[float]]]) -> str:
    """The annotation of one image in VOC's XML, with whole pixels as VOC has them: what this module reads.

    Args:
        file_name: name of the image in `JPEGImages/`.
        height: of the image, in pixels.
        width: of the image, in pixels.
        objects: name of the class, and box (x0, y0, x1, y1 in pixels counted from 0, inside the image). VOC counts
            from 1 and includes the last pixel; a box less than a pixel wide becomes one of a pixel.
    """
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(root, folder="JPEGImages", filename=file_name)
    add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    add(root, segmented=0)
    for name, (x0, y0, x1, y1) in objects:
        left, top = min(round(x0) + 1, width), min(round(y0) + 1, height)
        node = ElementTree.SubElement(root, "object")
        add(node, name=name, pose="Unspecified", truncated=0, difficult=0)
        box = {"xmin": left, "ymin": top, "xmax": max(round(x1), left), "ymax": max(round(y1), top)}
        add(ElementTree.SubElement(node, "bndbox"), **box)
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


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
    present = [split for split in SPLITS if _split_file(root, split).is_file()]
    # Never trainval against val, which it contains.
    for train, test in (("trainval", "test"), ("train", "test"), ("train", "val")):
        if train in present and test in present:
            return (f"voc_{train}",), (f"voc_{test}",)
    raise UserError(
        f"{root / 'ImageSets' / 'Main'}: lists of {', '.join(present) or 'no split'} found; expected trainval.txt (or "
        "train.txt) with test.txt, or train.txt with val.txt, one image id a line"
    )


def _is_official(root: Path) -> bool:
    if any((root / folder).is_dir() for folder in OFFICIAL_FOLDERS.values()):
        return True
    if (root / "Annotations").is_dir() and (root / "ImageSets" / "Main").is_dir():
        return False
    found = "no VOC data in it" if root.is_dir() else "no such folder"
    raise UserError(
        f"{root}: {found}; expected VOC2007/ and VOC2012/, or Annotations/, ImageSets/Main/ and JPEGImages/; "
        f"see `make check-datasets DATA={root}`"
    )


def _split_file(dirname: Path, split: str) -> Path:
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


def _read_ids(dirname: Path, split: str) -> list[str]:
    path = _split_file(dirname, split)
    for part in (dirname, *reversed(path.parents[:2]), path):
        if not part.exists():
            root = dirname.parent if dirname.name in OFFICIAL_FOLDERS.values() else dirname
            raise UserError(
                f"{path}: {'no such file' if part == path else f'{part} is missing'}; expected the image ids of this "
                f"split, one a line; see `make check-datasets DATA={root}`"
            )
    ids = _read_lines(path)
    if not ids:
        raise UserError(f"{path}: empty; expected one image id a line")
    if outside := next((image_id for image_id in ids if "/" in image_id or "\\" in image_id), None):
        raise UserError(f"{path}: image id {outside!r} is a path; expected a file name without folder and extension")
    if repeated := _repeated(ids):
        raise UserError(f"{path}: image id {repeated!r} is listed twice; leave one of the lines")
    return ids


def _find_images(dirname: Path, split: str, ids: Sequence[str]) -> list[str]:
    """Gives each id its image file, from one listing of the folder: asking for 16,551 files one by one is slow."""
    folder = dirname / "JPEGImages"
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries}
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; expected the folder of the images") from error
    prefix = f"{folder}{os.sep}"
    found = []
    for image_id in ids:
        for suffix in IMAGE_SUFFIXES:
            if image_id + suffix in names:
                found.append(prefix + image_id + suffix)
                break
        else:
            raise UserError(
                f"{folder / image_id}.jpg: no such image, but {_split_file(dirname, split)} lists {image_id!r}; "
                "add the image (.jpg, .jpeg or .png) or remove the line (an id is a file name without its extension)"
            )
    return found


def _read_annotations(dirname: Path, split: str, ids: Sequence[str]) -> _Annotations:
    """Reads the annotations of `ids`, in this order: from the cache what has not changed, the rest from its file."""
    folder = dirname / "Annotations"
    states = _file_states(folder, ids)
    cached = _load_cache(dirname, split)
    if cached and cached.ids.tolist() == ids and cached.images[["file_size", "mtime_ns"]].tolist() == states:
        return cached

    known = _rows(cached) if cached else {}
    rows = [
        known.get((image_id, *state)) or _parse_annotation(folder / f"{image_id}.xml")
        for image_id, state in zip(ids, states, strict=True)
    ]
    names = sorted({name for _, _, objects in rows for _, name, *_ in objects})
    labels = {name: label for label, name in enumerate(names)}
    annotations = _Annotations(
        np.array(ids, dtype=str),
        np.array(
            [
                (*state, height, width, len(objects))
                for state, (height, width, objects) in zip(states, rows, strict=True)
            ],
            dtype=IMAGE,
        ),
        np.array(
            [(bbox, labels[name], *flags) for _, _, objects in rows for bbox, name, *flags in objects], dtype=OBJECT
        ),
        np.array(names, dtype=str),
    )
    _save_cache(dirname, split, annotations)
    return annotations


def _file_states(folder: Path, ids: Sequence[str]) -> list[tuple[int, int]]:
    """Size and time of modification of each id's annotation file: what tells that a file has changed."""
    prefix = f"{folder}{os.sep}"
    states = []
    for image_id in ids:
        try:
            stat = os.stat(f"{prefix}{image_id}.xml")  # noqa: PTH116 - a Path for each of 16,551 files doubles the time
        except OSError as error:
            raise UserError(
                f"{folder / image_id}.xml: {error.strerror}, but the split lists {image_id!r}; add the annotation "
                "(an image without objects has one too, with its size) or remove the line"
            ) from error
        states.append((stat.st_size, stat.st_mtime_ns))
    return states


def _parse_annotation(path: Path) -> tuple[int, int, list[tuple]]:
    """Returns height, width and the objects (bbox, name, difficult, truncated) of an annotation file."""
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two: an encoding it cannot read
        raise UserError(f"{path}: not well-formed XML ({error}); mend the file or fetch it again") from error
    size = root.find("size")
    try:
        height, width = float(size.find("height").text), float(size.find("width").text)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: <size> with <width> and <height> is missing or holds no numbers") from error
    if not (height >= 1 and width >= 1 and height.is_integer() and width.is_integer()):
        raise UserError(f"{path}: the image size is {width:g} x {height:g}; expected two whole numbers above 0")
    return int(height), int(width), [_parse_object(path, obj, height, width) for obj in root.findall("object")]


def _parse_object(path: Path, obj: ElementTree.Element, height: float, width: float) -> tuple:
    name = (obj.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{path}: an <object> has no <name>; expected the name of its class")
    box = obj.find("bndbox")
    try:
        x0, y0 = float(box.find("xmin").text) - 1, float(box.find("ymin").text) - 1
        x1, y1 = float(box.find("xmax").text), float(box.find("ymax").text)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: object {name!r} has no <bndbox> with four numbers <xmin>, <ymin>, <xmax> and <ymax>"
        ) from error
    bbox = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
    overhang = -min(x0, y0, width - x1, height - y1)
    if not (bbox[0] < bbox[2] and bbox[1] < bbox[3] and overhang <= TOLERANCE):  # so written, NaN is refused too
        raise UserError(
            f"{path}: the box of object {name!r}, xmin {x0 + 1:g} ymin {y0 + 1:g} xmax {x1:g} ymax {y1:g}, is empty or "
            f"leaves its image of {width:g} x {height:g} pixels by more than {TOLERANCE:g}; mend the numbers"
        )
    return bbox, name, _parse_flag(path, obj, "difficult"), _parse_flag(path, obj, "truncated")


def _parse_flag(path: Path, obj: ElementTree.Element, tag: str) -> int:
    text = (obj.findtext(tag) or "0").strip()
    if text not in ("0", "1"):
        raise UserError(f"{path}: an <object> has <{tag}> {text!r}; expected 0 or 1")
    return int(text)


def _category_ids(dirname: Path, annotations: _Annotations, class_names: Sequence[str]) -> list[int]:
    index = {name: number for number, name in enumerate(class_names)}
    names, labels = annotations.names.tolist(), annotations.objects["label"]
    for label, name in enumerate(names):
        if name not in index:
            first_object = np.flatnonzero(labels == label)[0]
            image = np.searchsorted(np.cumsum(annotations.images["num_objects"]), first_object, side="right")
            close = difflib.get_close_matches(name, class_names, n=1)
            raise UserError(
                f"{dirname / 'Annotations' / annotations.ids[image]}.xml: unknown class {name!r}"
                f"{f', did you mean {close[0]!r}?' if close else ';'} expected one of {', '.join(class_names)}"
            )
    return np.array([index[name] for name in names], dtype=int)[labels].tolist()


def _parts(images: np.ndarray) -> list[slice]:
    """Where each image's objects lie among all objects."""
    ends = np.cumsum(images["num_objects"])
    return list(map(slice, (ends - images["num_objects"]).tolist(), ends.tolist()))


def _rows(annotations: _Annotations) -> dict[tuple, tuple]:
    """Undoes the packing into arrays: (id, size, time) -> what `_parse_annotation` returned."""
    images, objects = annotations.images, annotations.objects
    instances = list(
        zip(
            map(tuple, objects["bbox"].tolist()),
            annotations.names[objects["label"]].tolist(),
            objects["difficult"].tolist(),
            objects["truncated"].tolist(),
            strict=True,
        )
    )
    return {
        (image_id, *state): (*size, instances[part])
        for image_id, state, size, part in zip(
            annotations.ids.tolist(),
            images[["file_size", "mtime_ns"]].tolist(),
            images[["height", "width"]].tolist(),
            _parts(images),
            strict=True,
        )
    }


def _cache_files(dirname: Path, split: str) -> Iterator[Path]:
    """Where a split may be cached: beside the data, or for data that cannot be written to, with the user's caches."""
    yield dirname / ".voc_cache" / f"{split}.npz"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield caches / "voc_annotations" / hashlib.sha256(os.fsencode(dirname.resolve())).hexdigest()[:16] / f"{split}.npz"


def _load_cache(dirname: Path, split: str) -> _Annotations | None:
    for path in filter(Path.is_file, _cache_files(dirname, split)):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                annotations = _Annotations(**arrays)
            ids, images, objects, names = annotations
            if (
                (images.dtype, objects.dtype) == (IMAGE, OBJECT)
                and len(ids) == len(images)
                and images["num_objects"].sum() == len(objects)
                and (objects["label"] < len(names)).all()
            ):
                return annotations
            logger.info("%s: a cache of another form, built anew", path)
        except Exception as error:  # whatever is wrong with it, the annotations themselves are there
            logger.info("%s: not a readable cache (%s), built anew", path, error)
    return None


def _save_cache(dirname: Path, split: str, annotations: _Annotations) -> None:
    for path in _cache_files(dirname, split):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: np.savez(file, **annotations._asdict()))
            return
        except OSError as error:
            logger.info("%s: cannot be written (%s)", path, error.strerror)
    logger.warning("The annotations of %s are not cached, and parsed again each time", dirname)
