"""The annotations of Pascal VOC: XML files read, checked and cached, and written.

A cache holds the annotations of a split as arrays, so that 16,551 files are parsed once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from common.errors import UserError
from common.files import MAX_PIXELS, wrong_download
from detection.voc_cache import Arrays, file_states, load_cache, save_cache

TOLERANCE = 1.0  # pixels by which a box may leave its image: tools disagree on counting from 0 or from 1

# What annotation tools write for <difficult> and <truncated> besides numbers.
FLAGS = {"": 0, "unspecified": 0, "false": 0, "true": 1}

# Rows of a cache file; another row type makes a cache unreadable, so it is built anew.
IMAGE = np.dtype([("file_size", "i8"), ("mtime_ns", "i8"), ("height", "i8"), ("width", "i8"), ("num_objects", "i8")])
OBJECT = np.dtype([("bbox", "f8", 4), ("label", "i8"), ("difficult", "u1"), ("truncated", "u1")])


class Annotations(NamedTuple):
    """The annotations of a split, N images with M objects, as arrays."""

    ids: np.ndarray  # (N,) str
    images: np.ndarray  # (N,) IMAGE
    objects: np.ndarray  # (M,) OBJECT, in the order of the images
    names: np.ndarray  # (K,) str, the class names found; a label is an index into them


def annotation_files(folder: Path, pattern: str = "*.xml") -> list[Path]:
    """The annotations in a folder, sorted, without the `._NAME.xml` files that macOS adds."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("._"))


def is_parted(dirname: Path) -> bool:
    """Whether a folder is as Roboflow exports VOC: `train/` holds images with their annotations beside them."""
    return not (dirname / "Annotations").is_dir() and bool(annotation_files(dirname / "train"))


def is_flat(dirname: Path) -> bool:
    """Whether annotations lie beside the images: in the folders of splits, or, as labelImg writes them, in one."""
    return is_parted(dirname) or (not (dirname / "Annotations").is_dir() and bool(annotation_files(dirname)))


def annotation_folder(dirname: Path) -> Path:
    """Where the annotations lie by id: `Annotations/`, or the folder itself where they lie beside the images."""
    return dirname if is_flat(dirname) else dirname / "Annotations"


def read_annotations(dirname: Path, split: str, ids: Sequence[str]) -> Annotations:
    """Reads the annotations of `ids`, in this order: from the cache what has not changed, the rest from its file.

    A file whose size or time of modification has changed is parsed again; see `save_cache` for where the cache is.

    Raises:
        UserError: an annotation is missing or wrong; the message names the file.
    """
    folder = annotation_folder(dirname)
    states = _states(folder, ids)
    arrays = load_cache(dirname, split, _is_valid)
    cached = Annotations(**arrays) if arrays else None
    if cached and cached.ids.tolist() == ids and cached.images[["file_size", "mtime_ns"]].tolist() == states:
        return cached

    known = _rows(cached) if cached else {}
    rows = [
        known.get((image_id, *state)) or _parse_annotation(folder / f"{image_id}.xml")
        for image_id, state in zip(ids, states, strict=True)
    ]
    names = sorted({name for _, _, objects in rows for _, name, *_ in objects})
    labels = {name: label for label, name in enumerate(names)}
    annotations = Annotations(
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
    save_cache(dirname, split, annotations._asdict())
    return annotations


def _states(folder: Path, ids: Sequence[str]) -> list[tuple[int, int]]:
    """Size and time of modification of each id's annotation file."""
    found = file_states([f"{folder}{os.sep}{image_id}.xml" for image_id in ids])
    states = []
    for image_id, state in zip(ids, found, strict=True):
        if isinstance(state, OSError):
            raise UserError(
                f"{folder / image_id}.xml: {state.strerror}, but the split lists {image_id!r}; add the annotation "
                "(an image without objects has one too, with its size) or remove the line"
            ) from state
        states.append(state)
    return states


def _parse_annotation(path: Path) -> tuple[int, int, list[tuple]]:
    """Returns height, width and the objects (bbox, name, difficult, truncated) of an annotation file."""
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two: an encoding it cannot read
        reason = wrong_download(path) or f"not well-formed XML ({error}); mend the file or fetch it again"
        raise UserError(f"{path}: {reason}") from error
    for element in root.iter():
        element.tag = element.tag.lower()  # labelImg once wrote <Difficult>
    size = root.find("size")
    try:
        height, width = _number(size, "height"), _number(size, "width")
    except ValueError as error:
        reason = wrong_download(path) or "<size> with <width> and <height> is missing or holds no numbers"
        raise UserError(f"{path}: {reason}") from error
    if not (height >= 1 and width >= 1 and height.is_integer() and width.is_integer() and height * width <= MAX_PIXELS):
        raise UserError(
            f"{path}: the image size is {width:g} x {height:g}; expected two whole numbers above 0, at most "
            f"{MAX_PIXELS:,} pixels"
        )
    objects = root.findall("object")
    elsewhere = sum(1 for _ in root.iter("object")) - len(objects)
    boxes = sum(1 for _ in root.iter("bndbox")) - len(root.findall("object/part/bndbox")) - len(objects)
    if elsewhere or boxes > 0:
        raise UserError(
            f"{path}: {max(elsewhere, boxes)} objects or boxes lie elsewhere than VOC has them and would be "
            "lost; expected each <object> directly in <annotation>, with one <bndbox>"
        )
    return int(height), int(width), [_parse_object(path, obj, height, width) for obj in objects]


def _number(parent: ElementTree.Element | None, name: str) -> float:
    """The number in an element's child; a ValueError where there is none."""
    return float("" if parent is None else parent.findtext(name, ""))


def _parse_object(path: Path, obj: ElementTree.Element, height: float, width: float) -> tuple:
    name = (obj.findtext("name") or "").strip()
    if not name:
        raise UserError(f"{path}: an <object> has no <name>; expected the name of its class")
    box = obj.find("bndbox")
    try:
        x0, y0 = _number(box, "xmin") - 1, _number(box, "ymin") - 1
        x1, y1 = _number(box, "xmax"), _number(box, "ymax")
    except ValueError as error:
        raise UserError(
            f"{path}: object {name!r} has no <bndbox> with four numbers <xmin>, <ymin>, <xmax> and <ymax>"
        ) from error
    if max(x1, y1) <= 1 < max(width, height) and min(x0, y0) < 0:
        raise UserError(
            f"{path}: the box of object {name!r}, xmin {x0 + 1:g} ymin {y0 + 1:g} xmax {x1:g} ymax {y1:g}, seems to be "
            f"in shares of its image; expected pixels: multiply by the image size of {width:g} x {height:g}"
        )
    bbox = max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height)
    overhang = -min(x0, y0, width - x1, height - y1)
    if not (bbox[0] < bbox[2] and bbox[1] < bbox[3] and overhang <= TOLERANCE):  # so written, NaN is refused too
        raise UserError(
            f"{path}: the box of object {name!r}, xmin {x0 + 1:g} ymin {y0 + 1:g} xmax {x1:g} ymax {y1:g}, is empty or "
            f"leaves its image of {width:g} x {height:g} pixels by more than {TOLERANCE:g}; mend the numbers"
        )
    return bbox, name, _parse_flag(path, obj, "difficult"), _parse_flag(path, obj, "truncated")


def _parse_flag(path: Path, obj: ElementTree.Element, tag: str) -> int:
    text = (obj.findtext(tag) or "").strip()
    try:
        share = float(FLAGS.get(text.lower(), text))
    except ValueError:
        share = -1.0
    # Some exporters write how much of an object is cut off.
    if not (share in (0, 1) or (tag == "truncated" and 0 <= share <= 1)):
        raise UserError(f"{path}: an <object> has <{tag}> {text!r}; expected 0 or 1")
    return int(share > 0)


def parts(images: np.ndarray) -> list[slice]:
    """Where each image's objects lie among all objects."""
    ends = np.cumsum(images["num_objects"])
    return list(map(slice, (ends - images["num_objects"]).tolist(), ends.tolist()))


def _rows(annotations: Annotations) -> dict[tuple, tuple]:
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
            parts(images),
            strict=True,
        )
    }


def _is_valid(arrays: Arrays) -> bool:
    """Whether a cache is one of annotations of this form."""
    ids, images, objects, names = Annotations(**arrays)
    return (
        (images.dtype, objects.dtype) == (IMAGE, OBJECT)
        and len(ids) == len(images)
        and images["num_objects"].sum() == len(objects)
        and bool((objects["label"] < len(names)).all())
    )


def annotation_xml(file_name: str, height: int, width: int, objects: Sequence[tuple[str, Sequence[float]]]) -> str:
    """The annotation of one image in VOC's XML: what this module reads.

    Args:
        file_name: name of the image in `JPEGImages/`.
        height: of the image, in pixels.
        width: of the image, in pixels.
        objects: name of the class, and box (x0, y0, x1, y1 in pixels counted from 0, inside the image). VOC counts
            from 1 and includes the last pixel; a box less than a pixel wide becomes one of a pixel. Hundredths of a
            pixel are kept, as VOC2012 has some too.
    """
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **texts: object) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = str(text)

    add(root, folder="JPEGImages", filename=file_name)
    add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    add(root, segmented=0)
    for name, (x0, y0, x1, y1) in objects:
        left, top = min(x0 + 1, width), min(y0 + 1, height)
        node = ElementTree.SubElement(root, "object")
        add(node, name=name, pose="Unspecified", truncated=0, difficult=0)
        box = {"xmin": left, "ymin": top, "xmax": max(x1, left), "ymax": max(y1, top)}
        add(ElementTree.SubElement(node, "bndbox"), **{key: f"{round(side, 2):.9g}" for key, side in box.items()})
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root, encoding="unicode") + "\n"
