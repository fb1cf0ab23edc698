"""Makes a folder in VOC's layout of a data set of COCO's or YOLO's form: `make import-dataset FROM=... OUT=folder`.

    python -m tools.import_dataset instances_train.json instances_val.json --images photos --out folder
    python -m tools.import_dataset folder_of_yolo --out folder

COCO: one JSON file a split, or a folder whose `train/`, `valid/` and `test/` hold one each. YOLO: a folder with
`data.yaml`, or with `classes.txt` (`obj.names`), whose images have a text file of their name beside them or in
`labels/` in the place of `images/`. A split is told by the lists or folders that `data.yaml` (`obj.data`) names, by a
`train.txt` with a path of a picture a line, or by the words train, val (valid) and test in the names of files and
folders; without any there is CVAT's undivided `default.txt`, of which the reader makes two. Pictures are linked, or
copied where that cannot be; nothing is overwritten.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from common.contents import read_json
from common.errors import UserError, exits_on_user_error
from common.images import SUFFIXES, read_size
from common.results import unique_names
from detection.voc_annotations import annotation_xml
from detection.voc_lists import UNDIVIDED, read_lines, tails

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
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{root}: holds no picture; expected {', '.join(sorted(SUFFIXES))} files below it")
    pictures, splits = [], _yolo_splits(root, paths)
    for path in tqdm(paths, "pictures", disable=None, leave=False):
        height, width = read_size(path)
        objects = []
        labels = next(filter(Path.is_file, _label_files(path, root)), None)
        if labels is None:
            remarks["pictures without a file of labels, taken to have no object"] += 1
        else:
            objects = list(_yolo_objects(labels, names, height, width, remarks))
        pictures.append(Picture(path, splits[path], height, width, objects))
    return pictures, names


def _yolo_settings(root: Path) -> tuple[Path, dict[str, Any]]:
    """What `data.yaml`, or Darknet's `obj.data`, says, with its path; nothing where there is neither."""
    if path := next(iter(sorted([*root.glob("data.y*ml"), *root.glob("*.y*ml")])), None):
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
    return {path: _split_of(path.relative_to(root).parent) for path in paths} | splits


def _listed(path: Path, line: str, root: Path, known: Collection[Path]) -> Path:
    found = next((root / end for end in tails(line) if root / end in known), None)
    if found is None:
        raise UserError(f"{path}: {line[:200]!r}: no such picture below {root}; put it there, or remove the line")
    return found


def _label_files(picture: Path, root: Path) -> Iterator[Path]:
    """Where the labels of a picture may lie: in `labels/` in the place of the last `images/`, or beside it."""
    parts = list(picture.relative_to(root).with_suffix(".txt").parts)
    if "images" in parts[:-1]:
        last = len(parts) - 1 - parts[::-1].index("images")
        yield root.joinpath(*parts[:last], "labels", *parts[last + 1 :])
    yield picture.with_suffix(".txt")


def _yolo_objects(
    path: Path, names: Sequence[str], height: int, width: int, remarks: Counter[str]
) -> Iterator[tuple[str, Box]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
            if not 0 <= label < len(names):
                raise ValueError
            if len(values) == 4:
                x, y, w, h = values
                box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
            elif len(values) >= 6 and len(values) % 2 == 0:
                remarks["outlines that became the box around them"] += 1
                box = _around(values)
            else:
                raise ValueError
            if not all(-1 <= value <= 2 for value in box):
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}: line {number} is {line[:60]!r}; expected {YOLO_FORM}, the class from 0 to {len(names) - 1}"
            ) from None
        yield names[label], (box[0] * width, box[1] * height, box[2] * width, box[3] * height)


def _split_of(path: Path) -> str:
    """The split that the words in a path name, the last of them: `instances_train2017`, `valid/images`."""
    words = re.findall("[a-z]+", str(path).lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), UNDIVIDED)


def clip(picture: Picture, remarks: Counter[str]) -> list[tuple[str, Box]]:
    """The objects of a picture inside it; what leaves it is cut off and counted, and so is what nothing remains of."""
    kept = []
    for name, box in picture.objects:
        inside = max(box[0], 0.0), max(box[1], 0.0), min(box[2], picture.width), min(box[3], picture.height)
        if not (inside[0] < inside[2] and inside[1] < inside[3]):  # so written, NaN is left out too
            remarks["boxes that are empty or outside left out"] += 1
            continue
        if max(abs(new - old) for new, old in zip(inside, box, strict=True)) > 0.5:  # less is a matter of rounding
            remarks["boxes cut off at the edge"] += 1
        kept.append((name, inside))
    return kept


def write_voc(pictures: Sequence[Picture], names: Sequence[str], out: Path, remarks: Counter[str]) -> None:
    """Writes the folder beside its place and renames it when it is whole.

    Args:
        pictures: of the data set.
        names: of the classes.
        out: the folder, which must not be there.
        remarks: counts what is left out or changed, in place.

    Raises:
        UserError: it is there, or a name cannot be written.
    """
    if out.exists():
        raise UserError(f"{out}: is there, and nothing is overwritten; expected a new folder: give another OUT=")
    if wrong := next((name for name in names if not name.isprintable() or name != name.strip() or not name), None):
        raise UserError(f"class {wrong!r}: expected a name without control characters and blanks around it")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (part / folder).mkdir(parents=True)
    lists: dict[str, list[str]] = {}
    ids = unique_names([picture.path for picture in pictures])
    for image_id, picture in zip(tqdm(ids, "writing", disable=None, leave=False), pictures, strict=True):
        target = part / "JPEGImages" / f"{image_id}{picture.path.suffix}"
        try:
            os.link(picture.path.resolve(), target)
        except OSError:  # another disk
            shutil.copyfile(picture.path, target)
        text = annotation_xml(target.name, picture.height, picture.width, clip(picture, remarks))
        (part / "Annotations" / f"{image_id}.xml").write_text(text, encoding="utf-8")
        lists.setdefault(picture.split, []).append(image_id)
    for split, members in lists.items():
        (part / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(members) + "\n", encoding="utf-8")
    if not any(name.startswith("#") for name in names):  # a line of labels.txt would be a remark then
        (part / "labels.txt").write_text("\n".join(dict.fromkeys(names)) + "\n", encoding="utf-8")
    part.replace(out)


def _named(text: str) -> list[Path]:
    """The paths in a text: several come in one from make."""
    if not Path(text).exists():
        with contextlib.suppress(ValueError):  # an apostrophe is no quote
            return [Path(name) for name in shlex.split(text)]
    return [Path(text)]


def _coco_files(sources: Sequence[Path]) -> dict[Path, str]:
    """The JSON files that are meant, named or in a folder, with the split of each, which their names tell."""
    files = {source: _split_of(Path(source.stem)) for source in sources if source.is_file()}
    for source in filter(Path.is_dir, sources):
        found = sorted([*source.glob("*.json"), *source.glob("*/*.json")])
        files |= {path: _split_of(path.relative_to(source).with_suffix("")) for path in found}
    return files


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Reads, writes, and tells what was made and what was left out.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: see `read_coco`, `read_yolo` and `write_voc`.
    """
    parser = argparse.ArgumentParser(prog="tools.import_dataset", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", help="COCO's JSON files, or a folder of COCO's or YOLO's form")
    parser.add_argument("--images", type=Path, help="folder of COCO's pictures")
    parser.add_argument("--out", type=Path, help="the folder to make")
    args = parser.parse_args(argv)
    sources = [source for text in args.sources for source in _named(text)]
    if not sources or args.out is None:
        raise UserError("FROM or OUT is not given; expected FROM=coco.json, or a folder of YOLO's form, and OUT=folder")
    if missing := next((source for source in sources if not source.exists()), None):
        raise UserError(f"{missing}: no such file or folder; expected FROM=coco.json, or a folder of YOLO's form")
    remarks: Counter[str] = Counter()
    pictures: list[Picture] = []
    names: list[str] = []
    if files := _coco_files(sources):
        for path, split in files.items():
            more, classes = read_coco(path, split, args.images, remarks)
            pictures += more
            names += classes
    else:
        pictures, names = read_yolo(sources[0], remarks)
    if not pictures:
        raise UserError(f"{sources[0]}: names no picture; expected {COCO_FORM}")
    if any(picture.split != UNDIVIDED for picture in pictures):  # a list of the others would not be read
        remarks["pictures outside of train, val and test left out"] += len(pictures)
        pictures = [picture for picture in pictures if picture.split != UNDIVIDED]
        remarks["pictures outside of train, val and test left out"] -= len(pictures)
    write_voc(pictures, names, args.out, remarks)
    splits = Counter(picture.split for picture in pictures)
    print(
        f"{args.out}: {len(pictures):,} pictures ({', '.join(f'{name} {n:,}' for name, n in splits.items())}), "
        f"{len(set(names)):,} classes ({', '.join(dict.fromkeys(names))})"
    )
    for remark, count in (+remarks).items():
        print(f"{count:,} {remark}")
    print(f"See it with make check-datasets DATA={args.out}")


if __name__ == "__main__":
    main()
