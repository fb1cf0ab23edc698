"""Data sets of COCO's and of YOLO's form, as pictures with their objects.

COCO: a JSON file a split. YOLO: a folder with `data.yaml`, or with `classes.txt` (`obj.names`), whose images have a
text file of their name beside them or in `labels/` in the place of `images/`.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from common.errors import UserError
from common.files import read_json
from common.images import SUFFIXES, is_of_a_program, read_size
from detection.voc_lists import UNDIVIDED, read_lines, tails

UNLABELLED = "pictures without a file of labels, taken to have no object"  # a remark
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NAME_FILES = ("classes.txt", "obj.names", "labels.txt")
COCO_FORM = 'a data set in COCO\'s form, {"images": [...], "annotations": [...], "categories": [...]}'
YOLO_FORM = "class x y width height, shares of the image's size from 0 to 1"

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, continuous and counted from 0


class Picture(NamedTuple):
    """A picture of the data set to be made.

    Attributes:
        path: where it lies.
        split: `train`, `val`, `test`, or `UNDIVIDED`.
        height: in pixels, as the annotations take it.
        width: likewise.
        objects: class and box of each, which may leave the picture.
    """

    path: Path
    split: str
    height: int
    width: int
    objects: list[tuple[str, Box]]


def read_coco(path: Path, split: str, images: Path | None, remarks: Counter[str]) -> tuple[list[Picture], list[str]]:
    """Reads a JSON file of COCO's form.

    Args:
        path: the file.
        split: that its pictures are of.
        images: folder of the pictures; None: that of the file, or `images/` in it or beside it.
        remarks: counts what is left out or changed, in place.

    Returns:
        The pictures, and the names of the classes, in the order of their ids.

    Raises:
        UserError: it is no such file, it contradicts itself, or a picture is missing.
    """
    content = read_json(path, COCO_FORM)
    try:
        categories = {entry["id"]: str(entry["name"]).strip() for entry in content["categories"]}
        parents = {entry.get("supercategory") for entry in content["categories"]}
        by_image: dict[object, list[dict]] = {entry["id"]: [] for entry in content["images"]}
        for annotation in content["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        folders = [images] if images else [path.parent, path.parent / "images", path.parent.parent / "images"]
        pictures = []
        for entry in content["images"]:
            picture = _find_picture(path, entry["file_name"], folders)
            height, width = int(entry["height"]), int(entry["width"])
            if sorted((height, width)) != sorted(read_size(picture)):
                raise UserError(f"{picture}: is not of {width} x {height} pixels, as {path} says; put back what it was")
            objects = [
                (categories[annotation["category_id"]], box)
                for annotation in by_image[entry["id"]]
                if (box := _coco_box(annotation, remarks)) is not None
            ]
            pictures.append(Picture(picture, split, height, width, objects))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: {reason}; expected {COCO_FORM}") from error
    used = {name for picture in pictures for name, _ in picture.objects}
    # Roboflow's first category is the parent of the others, and has no objects.
    return pictures, [name for _, name in sorted(categories.items()) if name in used or name not in parents]


def _find_picture(source: Path, name: str, folders: Sequence[Path]) -> Path:
    """The picture that a data set names, by its path or, without its folders, by its name."""
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{source}: names the picture {name!r}, which is a path outside; expected one below IMAGES")
    places = [folder / part for folder in folders for part in (relative, relative.name)]
    if found := next((place for place in places if place.is_file()), None):
        return found
    raise UserError(f"{places[0]}: no such picture, but {source} names it; give the folder of all with IMAGES=")


def _coco_box(annotation: dict, remarks: Counter[str]) -> Box | None:
    """The box of an annotation, or of the outline that it has instead; None where it is left out."""
    if annotation.get("iscrowd"):
        remarks["crowds left out"] += 1
        return None
    if (annotation.get("attributes") or {}).get("rotation"):
        remarks["rotated boxes left out"] += 1
        return None
    if annotation.get("bbox"):
        x, y, width, height = map(float, annotation["bbox"])
        return x, y, x + width, y + height
    outlines = annotation.get("segmentation")
    if not outlines or isinstance(outlines, dict):
        remarks["annotations without a box left out"] += 1
        return None
    remarks["outlines that became the box around them"] += 1
    return _around([float(value) for outline in outlines for value in outline])


def _around(points: Sequence[float]) -> Box:
    return min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2])


def read_yolo(root: Path, remarks: Counter[str]) -> tuple[list[Picture], list[str]]:
    """Reads a folder of YOLO's form.

    Args:
        root: the folder.
        remarks: counts what is left out or changed, in place.

    Returns:
        The pictures, and the names of the classes, in the order of their numbers.

    Raises:
        UserError: the classes have no names, there is no picture, or a line is wrong.
    """
    names = _yolo_names(root)
    has_keypoints = "kpt_shape" in _yolo_settings(root)[1]
    paths = _yolo_pictures(root)
    if not paths:
        raise UserError(f"{root}: holds no picture; expected {', '.join(sorted(SUFFIXES))} files below it")
    labels_of = {path: next(filter(Path.is_file, _label_files(path, root)), None) for path in paths}
    if not any(labels_of.values()):
        raise UserError(
            f"{root}: none of the {len(paths)} pictures has a file of labels; expected NAME.txt beside NAME.jpg, or in "
            "labels/ where the picture is in images/"
        )
    pictures, splits = [], _yolo_splits(root, paths)
    for path, labels in tqdm(labels_of.items(), "pictures", disable=None, leave=False):
        height, width = read_size(path)
        objects = []
        if labels is None:
            remarks[UNLABELLED] += 1
        else:
            objects = list(_yolo_objects(labels, names, height, width, has_keypoints, remarks))
        pictures.append(Picture(path, splits[path], height, width, objects))
    return pictures, names


def is_yolo(root: Path) -> bool:
    """Whether a folder names YOLO's classes and holds labels of a picture; JSON files in it are notes then."""
    with contextlib.suppress(UserError):
        _yolo_names(root)
        return any(place.is_file() for path in _yolo_pictures(root) for place in _label_files(path, root))
    return False


def _yolo_pictures(root: Path) -> list[Path]:
    paths = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    folders_of = {path: path.relative_to(root).parts[:-1] for path in paths if not path.name.startswith("._")}  # macOS
    return sorted(path for path, folders in folders_of.items() if not any(map(is_of_a_program, folders)))


def _yolo_settings(root: Path) -> tuple[Path, dict[str, Any]]:
    """What `data.yaml`, or Darknet's `obj.data`, says, with its path; nothing where there is neither."""
    others = (path for path in sorted(root.glob("*.y*ml")) if not path.name.startswith("."))
    if path := next(iter([*sorted(root.glob("data.y*ml")), *others]), None):
        try:
            settings = yaml.load(path.read_text("utf-8-sig"), yaml.BaseLoader)  # names such as no stay what they are
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
            settings = None
        if not isinstance(settings, dict):
            raise UserError(f"{path}: is no YAML of keys and values; expected names: [cat, dog]")
        return path, settings
    path = next(iter(sorted(root.glob("*.data"))), root)
    pairs = [line.partition("=") for line in read_lines(path)] if path.is_file() else []
    return path, {key.strip(): value.strip() for key, _, value in pairs}


def _yolo_names(root: Path) -> list[str]:
    path, settings = _yolo_settings(root)
    names = settings.get("names", "")
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return [name.strip() for name in names]
    places = [root / end for end in tails(names)] if isinstance(names, str) else []  # of Darknet, a file
    places += [folder / name for folder in (root, root / "labels") for name in NAME_FILES]
    if found := next(filter(Path.is_file, places), None):
        return read_lines(found)
    raise UserError(f"{path}: no names of the classes; expected names: [cat, dog] in data.yaml, or classes.txt")


def _yolo_splits(root: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """The split of each picture, as `data.yaml`, `obj.data` or lists beside them say, or else the names of folders.

    A list has a path of a picture a line, a folder means all pictures in it; either may be a path of another machine.
    """
    source, settings = _yolo_settings(root)
    given = {word: settings[word] for word in SPLIT_WORDS if settings.get(word)}
    if not given:
        labels = {path.with_suffix(".txt") for path in paths}  # a list is none of these
        lists = {word: root / f"{word}.txt" for word in SPLIT_WORDS}
        given = {word: path.name for word, path in lists.items() if path.is_file() and path not in labels}
    names = [(word, name) for word, each in given.items() for name in ([each] if isinstance(each, str) else each)]
    known = dict.fromkeys(paths)
    splits: dict[Path, str] = {}
    for word, name in names:
        is_list, whole = name.endswith(".txt"), next(tails(name), "")
        # Of a folder's path a part alone, such as images, could be that of another split.
        ends = (end for end in tails(f"{settings.get('path', '')}/{name}") if is_list or end.endswith(whole))
        place = next((root / end for end in ends if (root / end).exists()), None)
        if place is None and is_list:
            raise UserError(f"{source}: names the list {name}, which is not below {root}; put it there")
        if place is not None and place.is_file():
            members = [_listed(place, line, root, known) for line in read_lines(place)]
        else:
            members = [path for path in paths if place in path.parents]
        for path in members:
            if splits.setdefault(path, SPLIT_WORDS[word]) != SPLIT_WORDS[word]:
                raise UserError(f"{source}: {path} is for {splits[path]} and for {word}; expected it in one of them")
    if any(name.endswith(".txt") for _, name in names):
        return dict.fromkeys(paths, UNDIVIDED) | splits
    return {path: split_of(path.relative_to(root).parent) for path in paths} | splits


def _listed(path: Path, line: str, root: Path, known: Collection[Path]) -> Path:
    found = next((root / end for end in tails(line) if root / end in known), None)
    if found is None:
        raise UserError(f"{path}: {line[:200]!r}: no such picture below {root}; put it there, or remove the line")
    return found


def _label_files(picture: Path, root: Path) -> Iterator[Path]:
    """Where the labels of a picture may lie: in `labels/` in the place of the last `images/`, or beside it."""
    parts = list(picture.relative_to(root).with_suffix(".txt").parts)
    if places := [place for place, part in enumerate(parts[:-1]) if part.lower() == "images"]:
        for folder in ("labels", "Labels", "LABELS"):
            yield root.joinpath(*parts[: places[-1]], folder, *parts[places[-1] + 1 :])
    yield picture.with_suffix(".txt")


def _yolo_objects(
    path: Path, names: Sequence[str], height: int, width: int, has_keypoints: bool, remarks: Counter[str]
) -> Iterator[tuple[str, Box]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
            if len(values) == 4 or has_keypoints:
                x, y, w, h = values[:4]
                box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
                remarks["objects whose keypoints are left out"] += len(values) > 4
            elif len(values) >= 6 and len(values) % 2 == 0:
                remarks["outlines that became the box around them"] += 1
                box = _around(values)
            else:
                raise ValueError
            if not (0 <= label < len(names) and all(-1 <= value <= 2 for value in box)):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}; expected {YOLO_FORM}, the class from 0 to {len(names) - 1}"
            ) from None
        yield names[label], (box[0] * width, box[1] * height, box[2] * width, box[3] * height)


def split_of(path: Path) -> str:
    """The split that a path names, its last part first: `instances_train2017`, `valid/images`, no `Test shoot`.

    A part does so with its first or last word, where it has nothing but words, digits and `_`, `-` or `.` between them.
    """
    for part in reversed(path.parts):
        words = re.findall("[a-z]+", part.lower()) if re.fullmatch(r"[\w.-]+", part) else []
        if found := next((SPLIT_WORDS[word] for word in (*words[-1:], *words[:1]) if word in SPLIT_WORDS), None):
            return found
    return UNDIVIDED
