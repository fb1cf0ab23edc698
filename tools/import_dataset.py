"""Converts a data set in COCO or YOLO format to a folder in VOC layout: `make import-dataset FROM=... OUT=folder`.

    python -m tools.import_dataset instances_train.json instances_val.json --images photos --out folder
    python -m tools.import_dataset folder_of_yolo another --out folder

COCO: one JSON file a split, or a folder whose `train/`, `valid/` and `test/` hold one each. YOLO: a folder with
`data.yaml`, or with `classes.txt` (`obj.names`), whose images have a text file of their name beside them or in
`labels/` in the place of `images/`. The splits come from the lists or folders that `data.yaml` (`obj.data`) names, from
a `train.txt` with one image path per line, or from the words train, val (valid) and test in the names of files and
folders. Without any of these all images go into one list, CVAT's `default.txt`, which is split in two when it is read.
Pictures are hard-linked, or else copied; nothing is overwritten.
"""

import contextlib
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.results import unique_names
from detection.foreign_datasets import COCO_FORM, SPLIT_WORDS, Box, Picture, is_yolo, read_coco, read_yolo, split_of
from detection.voc_annotations import annotation_xml
from detection.voc_lists import UNDIVIDED


def clip(picture: Picture, remarks: Counter[str]) -> list[tuple[str, Box]]:
    """The objects of a picture, clipped to it; counts the boxes that are cut off and those of which nothing remains."""
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
    try:
        _fill(part, pictures, names, remarks)
        part.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another OUT=, or make room") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(part: Path, pictures: Sequence[Picture], names: Sequence[str], remarks: Counter[str]) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (part / folder).mkdir(parents=True)
    lists: dict[str, list[str]] = {}
    # A list has an id a line, without blanks around it.
    ids = unique_names([each.path.with_stem(" ".join(each.path.stem.split()) or "_") for each in pictures])
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


def _named(text: str) -> list[Path]:
    """The paths in a text: several come in one from make."""
    if not Path(text).exists():
        with contextlib.suppress(ValueError):  # an apostrophe is no quote
            return [Path(name) for name in shlex.split(text)]
    return [Path(text)]


def _coco_files(source: Path) -> dict[Path, str]:
    """The JSON files that a source is or holds, each with the split that its name tells; none for a YOLO folder.

    Roboflow's files all have the same name, so their folder tells the split.
    """
    if source.is_file():
        split = split_of(Path(source.stem))
        of_folder = SPLIT_WORDS.get(source.absolute().parent.name.lower(), UNDIVIDED)
        return {source: of_folder if split == UNDIVIDED else split}
    found = [] if is_yolo(source) else sorted([*source.glob("*.json"), *source.glob("*/*.json")])
    return {path: split_of(path.relative_to(source).with_suffix("")) for path in found}


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Reads, writes, and tells what was made and what was left out.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: see `read_coco`, `read_yolo` and `write_voc`.
    """
    parser = ArgumentParser(prog="tools.import_dataset", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", help="COCO's JSON files, or folders of COCO's or YOLO's form")
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
    for source in sources:
        files = _coco_files(source)
        read = [read_coco(path, split, args.images, remarks) for path, split in files.items()]
        for more, classes in read or [read_yolo(source, remarks)]:
            pictures += more
            names += classes
    if not pictures:
        raise UserError(f"{sources[0]}: names no picture; expected {COCO_FORM}")
    splits = Counter(picture.split for picture in pictures)
    if splits.keys() - {UNDIVIDED}:  # a list of the others would not be read
        remarks["pictures outside of train, val and test left out"] = splits.pop(UNDIVIDED, 0)
        pictures = [picture for picture in pictures if picture.split in splits]
    write_voc(pictures, names, args.out, remarks)
    print(
        f"{args.out}: {len(pictures):,} pictures ({', '.join(f'{name} {n:,}' for name, n in splits.items())}), "
        f"{len(set(names)):,} classes ({', '.join(dict.fromkeys(names))})"
    )
    for remark, count in (+remarks).items():
        print(f"{count:,} {remark}")
    print(f"See it with make check-datasets DATA={args.out}")


if __name__ == "__main__":
    main()
