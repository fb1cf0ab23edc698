"""Tells what is there of the data sets under a root: complete, incomplete, broken or missing, and what mends it.

    python -m tools.check_datasets [voc2007 voc2012 cub] --data datasets [--deep]     # make check-datasets

The lists of a data set say which files it must have. Lists, names, annotations and image headers are read by the code
that training uses; images are decoded only if they seem to be cut off, or all of them with `--deep`. A root that is
itself a folder in VOC's layout, with any classes and lists, is checked in the same way, its objects are counted by
class and size, and a few of its images are drawn with their boxes. Of bird folders, one per class, the images are
checked and counted by class.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from tabulate import tabulate

from classification.cub import INDICES, is_folder_tree, read_cub, read_indices
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.images import Header, read_headers, write_picture
from detection.config import get_cfg
from detection.data_checks import check_datasets
from detection.dataset_mapper import DatasetMapper
from detection.foreign_datasets import is_yolo
from detection.voc import default_test, default_train, load_voc_instances, register_voc
from detection.voc_annotations import Annotations, annotation_folder, read_annotations
from detection.voc_lists import (
    IMAGE_SUFFIXES,
    find_pictures,
    image_folder,
    is_voc_folder,
    present_splits,
    read_ids,
    split_file,
)
from detection.voc_pictures import cached_headers, find_odd
from tools.visualize_batches import draw_batch

DRAWN, SIDE = 9, 320  # images of a split that are drawn, and their short side
OFFICIAL_SPLITS: dict[str, tuple[str, dict[str, int]]] = {
    "voc2007": ("VOC2007", {"trainval": 5011, "test": 4952}),
    "voc2012": ("VOC2012", {"trainval": 11540}),
    "cub": ("CUB_200_2011", {"train": 5994, "test": 5794}),
}
"""Folder of every official data set, and the number of images in each of its splits."""


@dataclass
class Report:
    """What was found of one split of a data set."""

    name: str
    official: int | None  # images in the official split; None for a split of no official data set
    expected: int = 0  # images in the list
    found: int = 0  # of these, with all their files
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    summary: str = ""  # what a complete split of one's own data holds
    picture: np.ndarray | None = None  # a few of its images with their boxes, uint8 (H, W, 3), RGB

    @property
    def state(self) -> str:
        """One of `complete`, `incomplete`, `broken`, and `missing` where not even the list is there."""
        if self.broken:
            return "broken"
        if self.missing:
            return "incomplete" if self.expected else "missing"
        return "complete"

    @property
    def remark(self) -> str:
        """The first file of each kind of trouble and the number of the others."""
        remarks = []
        for kind, files in (("missing", self.missing), ("broken", self.broken)):
            if files:
                remarks.append(f"{kind}: {files[0]}" + (f" and {len(files) - 1:,} more" if len(files) > 1 else ""))
        if self.expected and self.official and self.expected != self.official:
            remarks.append(f"not the official size, {self.official:,}")
        return "; ".join(remarks)


@exits_on_user_error
def main() -> None:
    """Command line: prints the table; the exit code is 2 unless everything is complete."""
    parser = ArgumentParser(description="Tells what is there of the data sets and what mends them.")
    parser.add_argument("names", nargs="*", type=data_set_name, help=f"{', '.join(OFFICIAL_SPLITS)}; default: all")
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="default: %(default)s")
    parser.add_argument("--deep", action="store_true", help="decode every image as well")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs; pictures go below it")
    arguments = parser.parse_args()

    root, deep = arguments.data, arguments.deep
    if root.is_file():
        raise UserError(f"{root}: is a file, expected the folder of the data: give DATA=folder")
    if is_voc_folder(root) or (root / "JPEGImages").is_dir() or (root / "Annotations").is_dir():
        lists = dict.fromkeys(present_splits(root))
        data_sets = [check_voc(root, lists or {"trainval": None}, deep)]
    elif is_yolo(root):
        raise UserError(
            f"{root}: is in YOLO's form, expected VOC's: make import-dataset FROM={shlex.quote(str(root))} OUT=folder"
        )
    elif is_folder_tree(root):
        data_sets = [check_bird_folders(root, deep)]
    else:
        data_sets = [check_official(root, name, deep) for name in arguments.names or OFFICIAL_SPLITS]

    download = "make datasets" + ("" if root == Path("datasets") else f" DATA={shlex.quote(str(root))}")
    rows = []
    for reports in data_sets:
        mend = download if is_downloadable(reports) else "put back what is named"
        for report in reports:
            found = f"{report.found:,} of {report.expected or report.official or 0:,}"
            rows.append([report.name, report.state, found, report.remark, "" if report.state == "complete" else mend])
    print(tabulate(rows, ["data set", "state", "images", "remark", "mend it with"], disable_numparse=True))
    for report in (report for reports in data_sets for report in reports):
        if report.summary and not report.official:
            print(f"\n{report.name}: {report.summary}")
        if report.picture is not None:
            path = arguments.output / "check" / f"{report.name.replace(' ', '-')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_picture(path, report.picture)
            print(f"some of them with their boxes: {path}")
    if any(report.state != "complete" for reports in data_sets for report in reports):
        sys.exit(2)
    if is_voc_folder(root):  # one's own: whether training takes its lists, classes and objects too
        register_voc(root)
        cfg = get_cfg()
        cfg.DATASETS.ROOT, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = str(root), default_train(root), default_test(root)
        check_datasets(cfg)
        if unlisted := unlisted_pictures(root):
            print(f"\nin no split or without annotation, and so not used: {len(unlisted):,}, {unlisted[0]} first")


def unlisted_pictures(folder: Path) -> list[str]:
    """The pictures of a folder in VOC's layout, relative to it, that none of its splits has."""
    images = image_folder(folder)
    listed = {f"{images / image_id}" for split in present_splits(folder) for image_id in read_ids(folder, split)}
    pictures = (path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    names = {str(path.relative_to(folder)) for path in pictures if str(path.with_suffix("")) not in listed}
    return sorted(name for name in names if not any(part.startswith(".") for part in Path(name).parts))


def draw_annotated(folder: Path, split: str, class_names: Sequence[str], title: str) -> np.ndarray | None:
    """Images of a split, evenly spaced among those with objects, with their boxes as training sees them.

    Returns:
        uint8 (H, W, 3), RGB; None where no image has an object.
    """
    records = [record for record in load_voc_instances(folder, split, class_names) if record["annotations"]]
    if not records:
        return None
    places = np.linspace(0, len(records) - 1, min(DRAWN, len(records))).round().astype(int)
    mapper = DatasetMapper(augmentations=[], min_sizes=[SIDE], max_size=2 * SIDE, with_annotations=True)
    return draw_batch([mapper(records[place]) for place in places], class_names, title)


def describe_objects(annotations: Annotations) -> str:
    """Objects by class and by size (COCO's: below 32 and 96 pixels square), and images without any."""
    objects, names = annotations.objects, annotations.names.tolist()
    counts = np.bincount(objects["label"], minlength=len(names)).tolist()
    sides = objects["bbox"][:, 2:] - objects["bbox"][:, :2]
    small, middle, large = np.bincount(np.digitize(sides.prod(axis=1), [32**2, 96**2]), minlength=3).tolist()
    empty = int((annotations.images["num_objects"] == 0).sum())
    classes = ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
    return (
        f"{len(objects):,} objects ({classes or 'none'}); {small:,} small, {middle:,} middle-sized, {large:,} large; "
        f"{empty:,} of {len(annotations.images):,} images without objects"
    )


def data_set_name(text: str) -> str:
    """Type of the command lines' argument that names an official data set.

    `choices` of argparse would do, but refuses an empty list of names in Python 3.11.
    """
    if text not in OFFICIAL_SPLITS:
        raise argparse.ArgumentTypeError(f"no data set {text!r}; expected {', '.join(OFFICIAL_SPLITS)}")
    return text


def check_official(root: Path, name: str, deep: bool = False) -> list[Report]:
    """Checks one of the official data sets, or a smaller one in its layout, below a root.

    Args:
        root: folder that holds `VOC2007/`, `VOC2012/` and `CUB_200_2011/`, or some of them.
        name: a key of `OFFICIAL_SPLITS`.
        deep: decode every image as well.
    """
    folder, splits = OFFICIAL_SPLITS[name]
    return (check_cub if name == "cub" else check_voc)(root / folder, splits, deep)


def is_downloadable(reports: Sequence[Report]) -> bool:
    """Whether a data set is the official one, or nothing yet, so that the official files may be put into its folder."""
    return all(report.official and report.expected in (0, report.official) for report in reports)


def check_voc(folder: Path, splits: dict[str, int] | dict[str, None], deep: bool = False) -> list[Report]:
    """Checks that every image of the lists has its picture and its annotation, and reads these as training does.

    Args:
        folder: folder with `Annotations/`, `ImageSets/Main/` and `JPEGImages/`.
        splits: the lists, each with its official length or None.
        deep: decode every image as well.
    """
    images, annotations = image_folder(folder), annotation_folder(folder)
    reports = []
    for split, official in splits.items():
        path = split_file(folder, split)
        report = Report(f"{folder.resolve().name} {split}", official)
        reports.append(report)
        try:
            ids = read_ids(folder, split)
        except UserError as error:
            name = str(path.relative_to(folder))
            if path.is_file() or split in present_splits(folder):
                report.broken.append(str(error).replace(str(path), name, 1))
            else:
                report.missing.append(name)
            continue
        try:
            pictures = find_pictures(images, ids)
        except UserError:
            pictures = [None] * len(ids)
        items = [
            (
                str(Path(picture or images / f"{image_id}.jpg").relative_to(folder)),
                str((annotations / f"{image_id}.xml").relative_to(folder)),
            )
            for image_id, picture in zip(ids, pictures, strict=True)
        ]
        read = partial(read_headers, decode=True) if deep else partial(cached_headers, folder, split)
        headers = _look_for(report, folder, items, read)
        if report.state == "complete":
            _check_annotations(report, folder, split, ids, [str(picture) for picture in pictures], headers)
    return reports


def _check_annotations(
    report: Report, folder: Path, split: str, ids: list[str], pictures: list[str], headers: list[Header | str]
) -> None:
    """Adds to the report the objects of a split, and the pictures that contradict their annotations."""
    try:
        annotations = read_annotations(folder, split, ids)
        sizes = annotations.images[["height", "width"]].tolist()
        odd, undecided = find_odd(pictures, sizes, headers)
        report.broken += [f"{Path(picture).relative_to(folder)}: {reason}" for picture, reason in odd.items()]
        report.found -= len(odd)
        report.summary = describe_objects(annotations)
        if not report.official and not odd:
            report.picture = draw_annotated(folder, split, annotations.names.tolist(), report.name)
    except UserError as error:  # of an annotation, or of a picture whose header is sound
        report.broken.append(str(error).removeprefix(f"{folder}{os.sep}"))
        report.found -= 1
        return
    if undecided:
        report.summary += (
            f"; EXIF turns or mirrors {len(undecided):,} images without a trace in their size, "
            f"{Path(undecided[0]).relative_to(folder)} first: train with EXIF=stored if their boxes were drawn on the "
            "pixels as they are stored"
        )


def check_bird_folders(root: Path, deep: bool = False) -> list[Report]:
    """Checks folders of photographs a class as the training reads them, and counts the photographs of each.

    Args:
        root: holds `train/` and `test/` (or `val/`), or a folder a class.
        deep: decode every image as well.
    """
    name = root.resolve().name
    try:
        cub = read_cub(root)
    except UserError as error:
        report = Report(name, None)
        report.broken.append(str(error))
        return [report]
    reports = []
    for split, birds in (("train", cub.train), ("test", cub.test)):
        report = Report(f"{name} {split}", None)
        items = [(str(bird.path.relative_to(root)),) for bird in birds]
        _look_for(report, root, items, partial(read_headers, decode=deep))
        counts = np.bincount([bird.label for bird in birds], minlength=len(cub.class_names)).tolist()
        classes = ", ".join(f"{name} {count:,}" for name, count in zip(cub.class_names, counts, strict=True))
        report.summary = f"{len(birds):,} images of {len(counts):,} classes ({classes})"
        reports.append(report)
    return reports


def check_cub(folder: Path, splits: dict[str, int], deep: bool = False) -> list[Report]:
    """Checks the index files of a CUB folder as training reads them, and that every image is there and not empty.

    Args:
        folder: folder with `images/`, `images.txt`, `image_class_labels.txt`, `train_test_split.txt`, `classes.txt`.
        splits: `train` and `test`, each with its official length.
        deep: decode every image as well.
    """
    missing = [name for name in INDICES if not (folder / name).is_file()]
    reports = [Report(f"{folder.name} {split}", official, missing=[*missing]) for split, official in splits.items()]
    if missing:
        return reports
    try:
        cub = read_indices(folder)
    except UserError as error:
        lines = (folder / "train_test_split.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        for report, part in zip(reports, "10", strict=True):
            report.broken.append(str(error).removeprefix(f"{folder}{os.sep}"))
            report.expected = sum(line.split()[1:] == [part] for line in lines)  # or it would seem nothing yet
        return reports
    for report, birds in zip(reports, (cub.train, cub.test), strict=True):
        items = [(str(bird.path.relative_to(folder)),) for bird in birds]
        _look_for(report, folder, items, partial(read_headers, decode=deep))
    return reports


def _file_sizes(folder: Path, subfolders: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes by path, from one listing a folder: asking for each file by its name is slow on a network disk."""
    sizes = {}
    for subfolder in subfolders:
        if (folder / subfolder).is_dir():
            with os.scandir(folder / subfolder) as entries:
                sizes.update(
                    {
                        str(PurePosixPath(subfolder, entry.name)): entry.stat().st_size
                        for entry in entries
                        if entry.is_file()
                    }
                )
    return sizes


def _look_for(
    report: Report,
    folder: Path,
    items: Sequence[tuple[str, ...]],
    read: Callable[[list[str]], list[Header | str]],
) -> list[Header | str]:
    """Enters into the report what is there of the images' files; the first file of each is the picture.

    Returns:
        What was read of each picture that is there.
    """
    sizes = _file_sizes(folder, sorted({str(PurePosixPath(file).parent) for files in items for file in files}))
    missing = [file for files in items for file in files if file not in sizes]
    broken = {file: "empty" for files in items for file in files if sizes.get(file) == 0}
    pictures = [files[0] for files in items if sizes.get(files[0])]
    headers = read([str(folder / picture) for picture in pictures])
    broken |= {picture: header for picture, header in zip(pictures, headers, strict=True) if isinstance(header, str)}
    unusable = {*missing, *broken}
    report.expected = len(items)
    report.found = sum(unusable.isdisjoint(files) for files in items)
    report.missing += missing
    report.broken += [f"{file}: {fault}" for file, fault in broken.items()]
    return headers


if __name__ == "__main__":
    main()
