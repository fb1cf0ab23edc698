"""Which images a split of a folder in VOC's layout has, and where their pictures lie.

Besides VOC's own lists, one a split, there are those of the tools that people annotate with: CVAT's undivided
`default.txt`; VoTT's lists of one class a split, `cat_train.txt`, which together have all its images; those of Darknet
and YOLO, a path of a picture a line, perhaps of another machine; none at all, as LabelMe and labelImg leave it, or
make-sense, whose annotations lie beside the pictures; and Roboflow's folders.
"""

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import UserError
from detection.voc_annotations import annotation_files, annotation_folder, is_flat, is_parted

logger = logging.getLogger(__name__)

LABELLED = re.compile(r"(.*\S)\s+(?:-1|0|1)")  # a line of VOC's lists of one class
SPLITS = ("train", "val", "trainval", "test")
# In any case; the first found wins.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FLAT_FOLDERS = {"train": "train", "val": "valid", "test": "test"}  # of a split, where there are no lists
UNDIVIDED = "default"  # the one list that CVAT writes
OFFICIAL_FOLDERS = {"voc07": "VOC2007", "voc12": "VOC2012"}


def present_splits(dirname: Path) -> list[str]:
    """The splits of a VOC-layout folder; `train` and `val` where its images are not divided."""
    if is_parted(dirname):
        return [split for split in FLAT_FOLDERS if annotation_files(split_file(dirname, split))]
    present = [split for split in SPLITS if split_file(dirname, split).is_file()]
    present = present or [split for split in SPLITS if _class_lists(dirname, split)]
    return present or (["train", "val"] if _undivided(dirname) else [])


def is_voc_folder(root: Path) -> bool:
    """Whether a root is itself a folder in VOC's layout, or in that of an annotation tool: its splits can be told."""
    return (root / "ImageSets" / "Main").is_dir() or bool(present_splits(root))


def split_file(dirname: Path, split: str) -> Path:
    """The list of a split, or the folder that stands for it."""
    if is_parted(dirname):
        return dirname / FLAT_FOLDERS.get(split, split)
    path, beside = dirname / "ImageSets" / "Main" / f"{split}.txt", dirname / f"{split}.txt"
    has_annotations = is_flat(dirname) or (dirname / "Annotations").is_dir()
    return beside if has_annotations and beside.is_file() and not path.is_file() else path


def _class_lists(dirname: Path, split: str) -> list[Path]:
    """VoTT's lists of a split, one a class, each with all images; none where there are lists of whole splits."""
    if any(split_file(dirname, each).is_file() for each in SPLITS):
        return []
    return sorted((dirname / "ImageSets" / "Main").glob(f"*_{split}.txt"))


def _undivided(dirname: Path) -> list[str]:
    """The ids of a folder whose images are not divided: those of CVAT's list, or without any list all annotations."""
    if (path := split_file(dirname, UNDIVIDED)).is_file():
        return _ids_of(dirname, path)
    if dirname.name in OFFICIAL_FOLDERS.values() or any((dirname / "ImageSets" / "Main").glob("*.txt")):
        return []
    folder = annotation_folder(dirname)
    found = annotation_files(folder, "*.xml" if is_flat(dirname) else "**/*.xml")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def read_lines(path: Path) -> list[str]:
    """The lines of a text, without blanks around them and those that are empty.

    Raises:
        UserError: it cannot be read, or is not in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    return [line for line in map(str.strip, text.splitlines()) if line]


def repeated(lines: Sequence[str]) -> str | None:
    """A line that comes twice, if there is one."""
    if len(set(lines)) == len(lines):
        return None
    return Counter(lines).most_common(1)[0][0]


def read_ids(dirname: Path, split: str) -> list[str]:
    """The image ids of a split, in the order of its list; one may lie in a subfolder: `folder/id`.

    A label behind an id, as in VOC's lists of one class (`000001 -1`), is left out; a path of a picture means the id in
    it that is annotated. Where the images are not divided, every fifth is `val` and the others are `train`.

    Raises:
        UserError: the list is missing or empty, an id leads outside or comes twice, or a path has no annotation.
    """
    path = split_file(dirname, split)
    if is_parted(dirname):
        if ids := sorted(f"{path.name}/{annotation.stem}" for annotation in annotation_files(path)):
            return ids
        raise UserError(f"{path}: no annotation in it; expected <id>.xml beside each image, as in train/")
    if lists := _class_lists(dirname, split):
        return list(dict.fromkeys(image_id for each in lists for image_id in _ids_of(dirname, each)))
    if not path.is_file() and split in ("train", "val") and present_splits(dirname) == ["train", "val"]:
        ids = _undivided(dirname)
        if len(ids) < 2:
            raise UserError(f"{dirname}: one image, expected two or more, to train on and to test on")
        _tell_of_division(dirname)
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


@functools.cache  # once a process
def _tell_of_division(dirname: Path) -> None:
    logger.warning("%s is not divided: every fifth image is for validation, the others for training", dirname)


def tails(path: str) -> Iterator[str]:
    """The ends of a path from any machine, longest first: without its root, then without each folder in turn."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return ("/".join(parts[start:]) for start in range(len(parts)))


def _ids_of(dirname: Path, path: Path) -> list[str]:
    annotations = annotation_folder(dirname)
    ids = [_id_of(annotations, path, line) for line in read_lines(path)]
    if not ids:
        raise UserError(f"{path}: empty; expected one image id a line")
    if outside := next((i for i in ids if "\\" in i or i.startswith("/") or ".." in i.split("/")), None):
        raise UserError(
            f"{path}: image id {outside!r} is a path; expected a file name below JPEGImages/, without extension"
        )
    if twice := repeated(ids):
        raise UserError(f"{path}: image id {twice!r} is listed twice; leave one of the lines")
    return ids


def _id_of(annotations: Path, path: Path, line: str) -> str:
    """The id that a line means. One may itself end like a label or a file: the annotations know."""

    def is_annotated(name: str) -> bool:
        return (annotations / f"{name}.xml").is_file()

    if (match := LABELLED.fullmatch(line)) and not is_annotated(line):
        line = match[1]
    stem, dot, suffix = line.rpartition(".")
    if dot + suffix.lower() not in IMAGE_SUFFIXES or is_annotated(line):
        return line
    found = next(filter(is_annotated, tails(stem)), None)
    if found is None and re.search(r"[/\\]", line):
        raise UserError(
            f"{path}: {line!r} is the path of a picture without an annotation in {annotations}; expected image ids, or "
            "pictures with <id>.xml there; where the labels are in YOLO's form: make import-dataset FROM=folder OUT=new"
        )
    return stem if found is None else found


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
