"""The check on small data sets written here, each with one damage whose report is known."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.drawing import class_colors
from detection.voc_annotations import read_annotations
from tests.conftest import ForkServer
from tools import check_datasets

ANNOTATION = "<annotation><size><width>40</width><height>30</height></size></annotation>"


def write_voc(folder: Path, splits: dict[str, list[str]]) -> None:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{id_}\n" for id_ in ids))
        for id_ in ids:
            Image.new("RGB", (40, 30), "teal").save(folder / "JPEGImages" / f"{id_}.jpg")
            (folder / "Annotations" / f"{id_}.xml").write_text(ANNOTATION)


def write_cub(folder: Path) -> None:
    files = [f"{species}/{number}.jpg" for species in ("001.Auk", "002.Wren") for number in range(3)]
    for file in files:
        (folder / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(folder / "images" / file)
    (folder / "classes.txt").write_text("1 001.Auk\n2 002.Wren\n")
    (folder / "images.txt").write_text("".join(f"{i} {file}\n" for i, file in enumerate(files, 1)))
    (folder / "image_class_labels.txt").write_text("".join(f"{i} {1 + (i > 3)}\n" for i in range(1, 7)))
    (folder / "train_test_split.txt").write_text("".join(f"{i} {int(i % 3 == 0)}\n" for i in range(1, 7)))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A root with all three data sets, whose official sizes are set to those that it has."""
    write_voc(tmp_path / "VOC2007", {"trainval": ["000001", "000002", "000003"], "test": ["000004", "000005"]})
    write_voc(tmp_path / "VOC2012", {"trainval": ["2008_000001"]})
    write_cub(tmp_path / "CUB_200_2011")
    official = {
        "voc2007": ("VOC2007", {"trainval": 3, "test": 2}),
        "voc2012": ("VOC2012", {"trainval": 1}),
        "cub": ("CUB_200_2011", {"train": 2, "test": 4}),
    }
    monkeypatch.setattr(check_datasets, "OFFICIAL_SPLITS", official)
    return tmp_path


def states(root: Path, name: str, deep: bool = False) -> list[tuple[str, int, int]]:
    return [(report.state, report.found, report.expected) for report in check_datasets.check_official(root, name, deep)]


@pytest.fixture
def run(fork_server: ForkServer) -> Callable[..., tuple[int, str]]:
    """Runs the command line in a process of its own; its exit code and what it printed."""
    return partial(fork_server, "tools.check_datasets")


def test_everything_complete(root):
    assert states(root, "voc2007", deep=True) == [("complete", 3, 3), ("complete", 2, 2)]
    assert states(root, "voc2012") == [("complete", 1, 1)]
    assert states(root, "cub", deep=True) == [("complete", 2, 2), ("complete", 4, 4)]


@pytest.mark.parametrize(
    ("damage", "expected", "remark"),
    [
        (lambda voc: (voc / "JPEGImages/000002.jpg").unlink(), ("incomplete", 2, 3), "missing: JPEGImages/000002.jpg"),
        (
            lambda voc: (voc / "Annotations/000003.xml").unlink(),
            ("incomplete", 2, 3),
            "missing: Annotations/000003.xml",
        ),
        (
            lambda voc: (voc / "JPEGImages/000001.jpg").write_bytes(b""),
            ("broken", 2, 3),
            "broken: JPEGImages/000001.jpg",
        ),
        (lambda voc: (voc / "ImageSets/Main/trainval.txt").unlink(), ("missing", 0, 0), "ImageSets/Main/trainval.txt"),
        (lambda voc: (voc / "ImageSets/Main/trainval.txt").write_text(""), ("broken", 0, 0), "trainval.txt: empty"),
        (
            lambda voc: [path.unlink() for path in (voc / "Annotations").iterdir()],
            ("incomplete", 0, 3),
            "missing: Annotations/000001.xml and 2 more",
        ),
    ],
)
def test_damages_of_voc(root, damage, expected, remark):
    damage(root / "VOC2007")
    report = check_datasets.check_official(root, "voc2007")[0]
    assert (report.state, report.found, report.expected) == expected
    assert remark in report.remark


@pytest.mark.parametrize(
    ("file", "text", "remark"),
    [
        ("train_test_split.txt", "1 0\n", "broken: train_test_split.txt: 1 images, but images.txt has 6"),
        (
            "image_class_labels.txt",
            "".join(f"{i} 3\n" for i in range(1, 7)),
            "image 1 has class 3, expected one of the 2",
        ),
        ("image_class_labels.txt", "".join(f"{i} 1\n" for i in range(1, 7)), "the index files are not of one edition"),
        ("images.txt", "nonsense\n", "images.txt: line 1 is 'nonsense'"),
        ("images/001.Auk/2.jpg", "", "images/001.Auk/2.jpg"),
    ],
)
def test_damages_of_cub(root, file, text, remark):
    (root / "CUB_200_2011" / file).write_text(text)
    report = check_datasets.check_official(root, "cub")[0]
    assert report.state == "broken"
    assert remark in report.remark


def test_a_data_set_of_birds_with_a_broken_index_is_not_mended_by_another(root, monkeypatch):
    monkeypatch.setitem(check_datasets.OFFICIAL_SPLITS, "cub", ("CUB_200_2011", {"train": 5994, "test": 5794}))
    (root / "CUB_200_2011/images.txt").write_text("nonsense\n")
    reports = check_datasets.check_official(root, "cub")
    assert [(report.state, report.expected) for report in reports] == [("broken", 2), ("broken", 4)]
    assert not check_datasets.is_downloadable(reports)


def test_index_files_of_birds_are_read_as_training_reads_them(root):
    """With the mark that editors of Windows put first; and counted by split where images are missing."""
    folder = root / "CUB_200_2011"
    (folder / "images.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "images.txt").read_bytes())
    assert states(root, "cub") == [("complete", 2, 2), ("complete", 4, 4)]
    (folder / "images/002.Wren/0.jpg").unlink()
    assert states(root, "cub") == [("complete", 2, 2), ("incomplete", 3, 4)]


def test_a_cut_photograph_is_found_by_its_end_or_by_a_deep_check(root):
    jpeg = root / "VOC2007" / "JPEGImages" / "000005.jpg"
    bitmap = jpeg.with_suffix(".bmp")
    Image.open(jpeg).save(bitmap)
    jpeg.write_bytes(jpeg.read_bytes()[:-10])  # behind its header
    assert states(root, "voc2007")[1] == ("broken", 1, 2)
    jpeg.unlink()
    bitmap.write_bytes(bitmap.read_bytes()[:-10])
    assert states(root, "voc2007")[1] == ("complete", 2, 2)
    assert states(root, "voc2007", deep=True)[1] == ("broken", 1, 2)


def test_only_an_official_data_set_or_nothing_is_mended_by_a_download(root, tmp_path):
    (root / "VOC2007/JPEGImages/000002.jpg").unlink()
    assert check_datasets.is_downloadable(check_datasets.check_official(root, "voc2007"))
    assert check_datasets.is_downloadable(check_datasets.check_official(tmp_path / "empty", "cub"))
    write_voc(root / "VOC2012", {"trainval": ["2008_000001", "2008_000002"]})
    report = check_datasets.check_official(root, "voc2012")
    assert not check_datasets.is_downloadable(report)
    assert report[0].state == "complete" and "not the official size, 1" in report[0].remark


def test_command_line(run, root):
    """The command knows the real official sizes, so this root holds smaller data sets."""
    code, printed = run("--data", str(root))
    assert code == 0
    assert printed.count("not the official size") == 5

    (root / "VOC2012/Annotations/2008_000001.xml").unlink()
    code, printed = run("voc2007", "voc2012", "--data", str(root))
    assert code == 2
    assert "put back what is named" in printed and "CUB" not in printed

    code, printed = run("--data", str(root / "no such"))
    assert code == 2
    assert f"make datasets DATA='{root / 'no such'}'" in printed
    assert "0 of 11,540" in printed


def test_a_folder_of_yolo_is_told_how_to_become_one_of_voc(run, tmp_path):
    """Whose train/images and train/labels would be taken for two kinds of birds."""
    for split in ("train", "valid"):
        (tmp_path / split / "labels").mkdir(parents=True)
        (tmp_path / split / "labels" / "a.txt").write_text("0 0.5 0.5 0.25 0.5\n")
        (tmp_path / split / "images").mkdir()
        Image.new("RGB", (64, 48)).save(tmp_path / split / "images" / "a.jpg")
    (tmp_path / "data.yaml").write_text("names: [cat]\n")
    code, printed = run("--data", str(tmp_path))
    assert code == 2 and printed.count("\n") == 1
    assert f"make import-dataset FROM={tmp_path} OUT=folder" in printed


OBJECT = (
    """<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>30</ymax></bndbox></object>"""
)
OF_A_CAT = ANNOTATION.replace("</size>", f"</size>{OBJECT.format('cat', 30)}")


def test_a_root_that_is_one_folder_in_voc_layout(run, tmp_path):
    write_voc(tmp_path, {"train": ["a", "b"], "val": ["c"]})
    for name in "ac":
        (tmp_path / f"Annotations/{name}.xml").write_text(OF_A_CAT)
    (tmp_path / "JPEGImages/.hidden.jpg").touch()
    code, printed = run("--data", str(tmp_path))
    assert code == 0
    assert "not used" not in printed
    assert [line.split()[1:] for line in printed.splitlines()[2:4]] == [
        ["train", "complete", "2", "of", "2"],
        ["val", "complete", "1", "of", "1"],
    ]
    for name in ("new.PNG", "a.jpeg"):  # the second is another picture of an image that has one
        Image.new("RGB", (40, 30), "teal").save(tmp_path / "JPEGImages" / name)
    code, printed = run("--data", str(tmp_path))
    assert code == 0
    assert "in no split or without annotation, and so not used: 1, JPEGImages/new.PNG first" in printed


def test_a_drawn_picture_that_is_broken_leaves_the_table(run, tmp_path):
    write_voc(tmp_path, {"train": ["a", "b"], "val": ["c"]})
    for name in "ac":
        (tmp_path / f"Annotations/{name}.xml").write_text(OF_A_CAT)
    bitmap = tmp_path / "JPEGImages/c.bmp"
    Image.open(tmp_path / "JPEGImages/c.jpg").save(bitmap)
    bitmap.write_bytes(bitmap.read_bytes()[:-10])
    (tmp_path / "JPEGImages/c.jpg").unlink()
    code, printed = run("--data", str(tmp_path))
    assert code == 2
    assert [line.split()[1:3] for line in printed.splitlines()[2:4]] == [["train", "complete"], ["val", "broken"]]
    assert "JPEGImages/c.bmp: cannot be read as an image" in printed


@pytest.mark.parametrize(
    ("splits", "labels", "complaint"),
    [
        ({"trainval": ["a", "b"]}, "", "lists of trainval found; expected"),
        ({"train": ["a", "b"], "val": ["c"]}, "bird\ndog\n", "unknown class 'cat'; expected one of bird, dog"),
        ({"train": ["a", "b"], "val": ["c"]}, "cat\n", "voc_val has no object to be found"),
        ({}, "", "one image, expected two or more, to train on and to test on"),
    ],
)
def test_a_folder_that_training_would_not_take_is_not_well(run, tmp_path, capsys, splits, labels, complaint):
    write_voc(tmp_path, splits)
    (tmp_path / "Annotations/a.xml").write_text(OF_A_CAT)
    if labels:
        (tmp_path / "labels.txt").write_text(labels)
    code, printed = run("--data", str(tmp_path))
    assert code == 2
    assert complaint in printed + capsys.readouterr().err


def test_annotations_beside_the_images_in_flat_folders(run, tmp_path):
    for file in ("train/a b", "train/c", "valid/a b"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(tmp_path / f"{file}.jpg")
        (tmp_path / f"{file}.xml").write_text(ANNOTATION if file == "train/a b" else OF_A_CAT)
    code, printed = run("--data", str(tmp_path))
    assert code == 0
    assert "train: 1 objects (cat 1); 1 small, 0 middle-sized, 0 large; 1 of 2 images without" in printed
    assert "val: 1 objects (cat 1); 1 small, 0 middle-sized, 0 large; 0 of 1 images without" in printed
    (tmp_path / "valid/a b.jpg").unlink()
    code, printed = run("--data", str(tmp_path))
    assert code == 2
    assert "missing: valid/a b.jpg" in printed


def test_objects_of_ones_own_folder_are_counted_and_a_wrong_annotation_is_named(run, tmp_path):
    write_voc(tmp_path, {"train": ["a photo 1", "b"], "val": ["c"]})
    (tmp_path / "Annotations/c.xml").write_text(OF_A_CAT)
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(b"\xef\xbb\xbfa photo 1\r\nb -1\r\n")
    (tmp_path / "JPEGImages/b.jpg").rename(tmp_path / "JPEGImages/b.Jpg")
    # 30 x 30 and 40 x 30 pixels, on either side of 32 x 32.
    objects = OBJECT.format("cat", 30) + OBJECT.format("cat", 40) + OBJECT.format("dog", 40)
    (tmp_path / "Annotations/b.xml").write_text(ANNOTATION.replace("</size>", f"</size>{objects}"))
    code, printed = run("--data", str(tmp_path), "--deep", "--output", str(tmp_path / "out"))
    assert code == 0, printed
    # Of the two images the one with objects; one of the cats, which are drawn last, has all of its 40 x 30 pixels.
    drawn = np.asarray(Image.open(tmp_path / "out" / "check" / f"{tmp_path.name}-train.png"))
    height, width = np.ptp(
        np.argwhere(np.abs(drawn - 255 * class_colors(["cat", "dog"])["cat"]).max(axis=2) < 5), axis=0
    )
    assert height / width == pytest.approx(30 / 40, abs=0.02)
    assert "train: 3 objects (cat 2, dog 1); 1 small, 2 middle-sized, 0 large; 1 of 2 images without objects" in printed
    (tmp_path / "Annotations/c.xml").write_text(ANNOTATION.replace(">40<", ">no<"))
    code, printed = run("--data", str(tmp_path))
    assert code == 2
    assert "Annotations/c.xml: <size> with <width> and <height> is missing" in printed


@pytest.mark.parametrize("folders", [("",), ("train/", "val/")])
def test_birds_a_folder_a_class_are_counted(tmp_path, folders, monkeypatch, capsys):
    for folder in folders:
        for species in ("auk", "wren"):
            for number in range(5):
                file = tmp_path / f"{folder}{species}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), "teal").save(file)
    monkeypatch.setattr(sys, "argv", ["check_datasets", "--data", str(tmp_path), "--deep"])
    check_datasets.main()
    said = capsys.readouterr().out
    counts = (4, 1) if folders == ("",) else (5, 5)
    for split, count in zip(("train", "test"), counts, strict=True):
        assert f"{tmp_path.name} {split}: {2 * count} images of 2 classes (auk {count}, wren {count})" in said
    file.write_text("no picture")
    with pytest.raises(SystemExit):
        check_datasets.main()
    assert "wren/4.png: cannot be read as an image" in capsys.readouterr().out


def test_sizes_of_objects_are_counted_as_coco_counts_them(tmp_path):
    """On either side of 32 x 32 and of 96 x 96 pixels."""
    write_voc(tmp_path, {"train": ["a"]})
    objects = "".join(
        f"<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{x}</xmax><ymax>{y}</ymax></bndbox></object>"
        for x, y in ((31, 33), (32, 32), (95, 97), (96, 96))
    )
    text = f"<annotation><size><width>100</width><height>100</height></size>{objects}</annotation>"
    (tmp_path / "Annotations/a.xml").write_text(text)
    said = check_datasets.describe_objects(read_annotations(tmp_path, "train", ["a"]))
    assert said == "4 objects (cat 4); 1 small, 2 middle-sized, 1 large; 0 of 1 images without objects"


def test_pictures_that_are_drawn_come_from_the_whole_split(tmp_path, monkeypatch):
    monkeypatch.setattr(check_datasets, "DRAWN", 2)
    write_voc(tmp_path, {"train": ["a", "b", "c"]})
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"JPEGImages/{name}.jpg")
        (tmp_path / f"Annotations/{name}.xml").write_text(OF_A_CAT)
    drawn = check_datasets.draw_annotated(tmp_path, "train", ["cat"], "train").astype(int)
    shares = {name: (np.abs(drawn - colour).max(axis=2) < 8).mean() for name, colour in colours.items()}
    assert shares["a"] > 0.2 and shares["c"] > 0.2 and shares["b"] < 0.05
