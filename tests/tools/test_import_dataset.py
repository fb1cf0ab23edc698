"""Data sets of COCO's and YOLO's form into VOC's layout: numbers by hand, and boxes that come back as they were."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.foreign_datasets import split_of
from detection.voc import default_test, default_train, load_voc_instances, read_labels
from detection.voc_annotations import annotation_xml
from detection.voc_lists import UNDIVIDED
from tools import check_datasets
from tools.import_dataset import main

WIDTH, HEIGHT = 64, 48


def draw(path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), "teal").save(path, **options)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def boxes(folder: Path, split: str) -> dict[str, list[tuple[str, list[float]]]]:
    """Class and box (pixels counted from 0) of the objects by image."""
    names = read_labels(folder)
    return {
        record["image_id"]: [(names[each["category_id"]], each["bbox"]) for each in record["annotations"]]
        for record in load_voc_instances(folder, split, names)
    }


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def coco(images: list[str], annotations: list[dict], names: tuple[str, ...] = ("cat", "dog")) -> str:
    entries = [{"id": n, "file_name": name, "width": WIDTH, "height": HEIGHT} for n, name in enumerate(images, 10)]
    categories = [{"id": 3 * n, "name": name} for n, name in enumerate(names, 1)]
    numbered = [{"id": n, "iscrowd": 0, **annotation} for n, annotation in enumerate(annotations)]
    return json.dumps({"images": entries, "annotations": numbered, "categories": categories})


def test_numbers_of_yolo_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "yolo", tmp_path / "out"
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnames: {0: cat, 1: a dog}\n")
    for split in ("train", "valid"):
        draw(root / split / "images" / "a.jpg")
    # A centre of 32 and 24 and a size of 16 x 24 pixels: 24 to 40 and 12 to 36, which VOC counts from 1.
    write(root / "train/labels/a.txt", "1 0.5 0.5 0.25 0.5\n\n0 0 0 0.5 0.5\n")
    write(root / "valid/labels/a.txt", "0 0.25 0.25 0.5 0.25 0.5 0.75\n")
    main([str(root), "--out", str(out)])
    text = (out / "Annotations/a.xml").read_text().replace("\n", "").replace("\t", "")
    assert "<bndbox><xmin>25</xmin><ymin>13</ymin><xmax>40</xmax><ymax>36</ymax></bndbox>" in text
    assert boxes(out, "train") == {"a": [("a dog", [24, 12, 40, 36]), ("cat", [0, 0, 16, 12])]}
    assert boxes(out, "val") == {"a-2": [("cat", [16, 12, 32, 36])]}
    assert (default_train(out), default_test(out)) == (("voc_train",), ("voc_val",))
    said = capsys.readouterr().out
    assert "2 pictures (train 1, val 1), 2 classes (cat, a dog)" in said
    assert "1 boxes cut off at the edge" in said
    assert "1 outlines that became the box around them" in said


def test_yolo_beside_its_pictures_without_splits_is_what_the_check_calls_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "yolo", tmp_path / "out"
    write(root / "classes.txt", "cat\ndog\n")
    for number in range(5):
        draw(root / f"{number}.png")
        write(root / f"{number}.txt", f"{number % 2} 0.5 0.5 0.5 0.5\n")
    (root / "3.txt").unlink()
    main([str(root), "--out", str(out)])
    assert "1 pictures without a file of labels, taken to have no object" in capsys.readouterr().out
    assert {**boxes(out, "train"), **boxes(out, "val")} == {
        str(number): [] if number == 3 else [(("cat", "dog")[number % 2], [16, 12, 48, 36])] for number in range(5)
    }
    monkeypatch.setattr("sys.argv", ["check_datasets", "--data", str(out)])
    check_datasets.main()
    assert "4 of 4" in capsys.readouterr().out


def test_several_folders_of_either_form_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [tmp_path / name for name in ("one", "two", "three")]
    for source, names in zip(sources[:2], ("cat\ndog\n", "dog\n"), strict=True):
        write(source / "classes.txt", names)
        draw(source / "a.jpg")
        write(source / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    draw(sources[2] / "b.jpg")
    write(sources[2] / "notes.json", coco(["b.jpg"], [{"image_id": 10, "category_id": 6, "bbox": [1, 2, 3, 4]}]))
    main([" ".join(map(str, sources)), "--out", str(tmp_path / "out")])
    assert "3 pictures (default 3), 2 classes (cat, dog)" in capsys.readouterr().out
    found = boxes(tmp_path / "out", "train") | boxes(tmp_path / "out", "val")
    middle = [16, 12, 48, 36]
    assert found == {"a": [("cat", middle)], "a-2": [("dog", middle)], "b": [("dog", [1, 2, 4, 6])]}


@pytest.mark.parametrize("has_labels", [False, True])
def test_the_form_of_a_folder_with_names_of_classes_and_a_json_file(tmp_path: Path, has_labels: bool) -> None:
    """Label Studio's YOLO export has notes in JSON; a data set of COCO's form may list its classes as text."""
    root = tmp_path / "export"
    draw(root / "images/a.jpg")
    write(root / "classes.txt", "cat\ndog\n")
    if has_labels:
        write(root / "labels/a.txt", "1 0.5 0.5 0.5 0.5\n")
        write(
            root / "notes.json", '{"categories": [{"id": 0, "name": "cat"}], "info": {"contributor": "Label Studio"}}'
        )
    else:
        write(root / "train.json", coco(["a.jpg"], [{"image_id": 10, "category_id": 6, "bbox": [16, 12, 32, 24]}]))
    main([str(root), "--out", str(tmp_path / "out")])
    assert boxes(tmp_path / "out", "default" if has_labels else "train") == {"a": [("dog", [16, 12, 48, 36])]}


def test_what_programs_put_beside_pictures_is_none(yolo: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in yolo.rglob("*.jpg"))
    write(yolo / "classes.txt", "cat\ndog\n")
    (yolo / "__MACOSX").mkdir()
    (yolo / "__MACOSX" / "._0.jpg").write_bytes(b"\0\5\26\7")
    draw(yolo / "@eaDir" / "0.jpg" / "SYNOPHOTO_THUMB_XL.jpg")
    draw(yolo / ".thumbnails" / "normal" / "thumb.jpg")
    main([str(yolo), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out" / "JPEGImages").iterdir()) == before


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("instances_train2017", "train"),
        ("valid/images", "val"),
        ("train/_annotations.coco", "train"),
        ("test_images", "test"),
        ("Test shoot 2019", UNDIVIDED),
        ("Val d'Isère", UNDIVIDED),
        ("my_test_export", UNDIVIDED),
        ("Test shoot/train", "train"),
    ],
)
def test_words_of_a_path_that_name_a_split(path: str, split: str) -> None:
    assert split_of(Path(path)) == split


def test_folders_of_yolo_in_any_case_and_hidden_files(tmp_path: Path) -> None:
    root = tmp_path / "yolo"
    write(root / ".pre-commit-config.yaml", "repos: []\n")
    write(root / "args.yaml", "names: {0: wrong}\n")
    write(root / "data.yaml", "names: {0: cat}\n")
    draw(root / "Images" / "a.jpg")
    write(root / "Labels" / "a.txt", "0 0.5 0.5 0.25 0.5\n")
    draw(root / "Images" / "b.jpg")
    draw(root / "images" / "old" / "images" / "c.jpg")
    write(root / "images" / "old" / "labels" / "c.txt", "0 0.5 0.5 0.25 0.5\n")  # in the place of the last
    main([str(root), "--out", str(tmp_path / "out")])
    assert read_labels(tmp_path / "out") == ("cat",)
    found = boxes(tmp_path / "out", "train") | boxes(tmp_path / "out", "val")
    names = {image: [name for name, _ in objects] for image, objects in found.items()}
    assert names == {"a": ["cat"], "b": [], "c": ["cat"]}


def test_labels_that_are_nowhere_are_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "yolo/data.yaml", "names: {0: cat}\n")
    draw(tmp_path / "yolo/images/a.jpg")
    write(tmp_path / "yolo/txt/a.txt", "0 0.5 0.5 0.25 0.5\n")
    assert "none of the 1 pictures has a file of labels" in refused(
        capsys, tmp_path / "yolo", "--out", tmp_path / "out"
    )
    # Beside another source, of which one of two pictures has none.
    write(tmp_path / "other/classes.txt", "cat\n")
    write(tmp_path / "other/a.txt", "0 0.5 0.5 0.25 0.5\n")
    for name in ("a", "b"):
        draw(tmp_path / "other" / f"{name}.jpg")
    assert "yolo: none of the 1 pictures has a file of labels" in refused(
        capsys, tmp_path / "other", tmp_path / "yolo", "--out", tmp_path / "out"
    )
    write(tmp_path / "yolo/images/a.txt", "0 0.5 0.5 0.25 0.5\n")
    main([str(tmp_path / "other"), str(tmp_path / "yolo"), "--out", str(tmp_path / "out")])
    assert "1 pictures without a file of labels" in capsys.readouterr().out


def test_files_of_coco_that_are_named_one_by_one_keep_their_splits(tmp_path: Path) -> None:
    """Roboflow calls all of them alike."""
    for split in ("train", "valid"):
        annotation = {"image_id": 10, "category_id": 3, "bbox": [1, 2, 30, 40]}
        write(tmp_path / split / "_annotations.coco.json", coco(["a.jpg"], [annotation]))
        draw(tmp_path / split / "a.jpg")
    words = [str(tmp_path / split / "_annotations.coco.json") for split in ("train", "valid")]
    main([*words, "--out", str(tmp_path / "out")])
    assert (len(boxes(tmp_path / "out", "train")), len(boxes(tmp_path / "out", "val"))) == (1, 1)


def test_of_yolos_poses_the_boxes_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "yolo"
    write(root / "data.yaml", "train: images/train\nnames: [person]\nkpt_shape: [2, 3]\n")
    draw(root / "images/train/a.jpg")
    write(root / "labels/train/a.txt", "0 0.5 0.5 0.25 0.5 0.1 0.2 2 0.9 0.95 1\n")
    main([str(root), "--out", str(tmp_path / "out")])
    assert boxes(tmp_path / "out", "train") == {"a": [("person", [24, 12, 40, 36])]}
    assert "1 objects whose keypoints are left out" in capsys.readouterr().out


def test_from_voc_to_coco_and_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before: dict[str, dict[str, list]] = {"train": {}, "test": {}}
    for split, count in (("train", 6), ("test", 3)):
        for number in range(count):
            low = rng.integers(0, (120, 80), (number, 2)) / 4
            corners = np.hstack([low, low + rng.integers(4, (136, 112), (number, 2)) / 4]).tolist()
            before[split][f"{split} {number}"] = [(("cat", "dog")[n % 2], corner) for n, corner in enumerate(corners)]
    voc, photos = tmp_path / "voc", tmp_path / "photos"
    for split, images in before.items():
        for name, objects in images.items():
            draw(photos / f"{name}.png")
            write(voc / f"{name}.xml", annotation_xml(f"{name}.png", HEIGHT, WIDTH, objects))
        annotations = [
            {"image_id": image, "category_id": {"cat": 3, "dog": 6}[name], "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for image, objects in enumerate(images.values(), 10)
            for name, (x0, y0, x1, y1) in objects
        ]
        write(tmp_path / f"instances_{split}2017.json", coco([f"{name}.png" for name in images], annotations))
    sources = " ".join(str(tmp_path / f"instances_{split}2017.json") for split in before)
    main([sources, "--images", str(photos), "--out", str(tmp_path / "out")])
    for split, images in before.items():
        assert boxes(tmp_path / "out", split) == images
        for name in images:
            assert (tmp_path / "out/Annotations" / f"{name}.xml").read_text() == (voc / f"{name}.xml").read_text()


def test_what_coco_holds_beside_boxes_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "images/deep/a.jpg")
    of = {"image_id": 10, "category_id": 6}
    annotations = [
        {**of, "bbox": [1.2, 2.7, 10, 10]},
        {**of, "bbox": [-3, 5, 10, 10]},
        {**of, "bbox": [100, 5, 10, 10]},
        {**of, "bbox": [5, 5, 0, 3]},
        {**of, "bbox": [5, 5, 9, 9], "iscrowd": 1},
        {**of, "bbox": [5, 5, 9, 9], "attributes": {"rotation": 30.0}},
        {**of, "segmentation": [[5, 6, 20, 6, 20, 30], [2, 8, 3, 8, 3, 9]]},
        {**of, "segmentation": {"size": [48, 64], "counts": "abc"}},
    ]
    source = write(tmp_path / "coco.json", coco(["deep/a.jpg"], annotations))
    main([str(source), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for line in (
        "1 boxes cut off at the edge",
        "2 boxes that are empty or outside left out",
        "1 crowds left out",
        "1 rotated boxes left out",
        "1 outlines that became the box around them",
        "1 annotations without a box left out",
    ):
        assert line in said.splitlines()
    (tmp_path / "out/ImageSets/Main/default.txt").rename(tmp_path / "out/ImageSets/Main/train.txt")
    found = boxes(tmp_path / "out", "train")["a"]
    assert [name for name, _ in found] == ["dog"] * 3
    expected = [[1.2, 2.7, 11.2, 12.7], [0, 5, 7, 15], [2, 6, 20, 30]]
    np.testing.assert_allclose([box for _, box in found], expected, atol=1e-9)


def test_nothing_is_overwritten_and_pictures_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(tmp_path / "a.jpg")
    photo = (tmp_path / "a.jpg").read_bytes()
    source = write(tmp_path / "coco.json", coco(["a.jpg"], []))
    write(tmp_path / "mine/notes.txt", "mine")
    assert "mine: is there, and nothing is overwritten" in refused(capsys, source, "--out", tmp_path / "mine")
    write(tmp_path / ".out.part/Annotations/old.xml", "of a call that was killed")
    main([str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out/Annotations/old.xml").exists()
    assert "is there, and nothing is overwritten" in refused(capsys, source, "--out", tmp_path / "out")
    assert (tmp_path / "out/JPEGImages/a.jpg").read_bytes() == (tmp_path / "a.jpg").read_bytes() == photo
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "coco.json", "mine", "out"]


def test_a_full_disk_leaves_nothing_and_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw(tmp_path / "a.jpg")
    source = write(tmp_path / "coco.json", coco(["a.jpg"], []))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a.jpg"))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", refuse)
    assert f"error: {tmp_path}/out: cannot be written (No space left" in refused(
        capsys, source, "--out", tmp_path / "out"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "coco.json"]


def test_a_picture_with_blanks_around_its_name_is_read_again(tmp_path: Path) -> None:
    names = ["photo .jpg", "a\u2028b.jpg", " .jpg"]
    for name in names:
        draw(tmp_path / name)
    cat = {"category_id": 3, "bbox": [16, 12, 32, 24]}
    source = write(tmp_path / "train.json", coco(names, [{"image_id": 10 + n, **cat} for n in range(3)]))
    main([str(source), "--out", str(tmp_path / "out")])
    assert boxes(tmp_path / "out", "train") == {name: [("cat", [16, 12, 48, 36])] for name in ("photo", "a b", "_")}


def test_pictures_are_hard_linked_or_on_another_disk_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "deep/a.jpg")
    (tmp_path / "a.jpg").symlink_to("deep/a.jpg")
    source = write(tmp_path / "coco.json", coco(["a.jpg"], []))
    main([str(source), "--out", str(tmp_path / "linked")])
    picture = tmp_path / "linked/JPEGImages/a.jpg"
    assert not picture.is_symlink() and picture.samefile(tmp_path / "deep/a.jpg")

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    main([str(source), "--out", str(tmp_path / "copied")])
    picture = tmp_path / "copied/JPEGImages/a.jpg"
    assert not picture.samefile(tmp_path / "deep/a.jpg")
    assert picture.read_bytes() == (tmp_path / "deep/a.jpg").read_bytes()


def test_pictures_of_coco_are_found_by_their_path_or_their_name(tmp_path: Path) -> None:
    """The paths may be those of Windows, or of a machine that had other folders."""
    for name in ("deep/a.jpg", "b.jpg"):
        draw(tmp_path / name)
    source = write(tmp_path / "train.json", coco(["deep\\a.jpg", "D:\\old\\b.jpg"], []))
    main([str(source), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out/JPEGImages").iterdir()) == ["a.jpg", "b.jpg"]


def test_coco_may_tell_the_size_of_the_pixels_as_they_are_stored(tmp_path: Path) -> None:
    """What EXIF turns by a quarter is shown with height and width exchanged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "a.jpg", exif=exif)
    annotation = {"image_id": 10, "category_id": 3, "bbox": [40, 8, 24, 30]}  # where only the stored pixels reach
    main([str(write(tmp_path / "train.json", coco(["a.jpg"], [annotation]))), "--out", str(tmp_path / "out")])
    assert boxes(tmp_path / "out", "train") == {"a": [("cat", [40, 8, 64, 38])]}


def test_classes_of_coco_come_in_the_order_of_their_ids_without_the_parent_of_the_others(tmp_path: Path) -> None:
    """Roboflow's first category is that parent. A class of which there is no object keeps its place."""
    draw(tmp_path / "a.jpg")
    content = json.loads(coco(["a.jpg"], [{"image_id": 10, "category_id": 1, "bbox": [1, 1, 9, 9]}]))
    classes = [(2, "ant", "pets"), (0, "pets", "none"), (1, "zebra", "pets")]
    content["categories"] = [{"id": n, "name": name, "supercategory": parent} for n, name, parent in classes]
    main([str(write(tmp_path / "train.json", json.dumps(content))), "--out", str(tmp_path / "out")])
    assert read_labels(tmp_path / "out") == ("zebra", "ant")


def test_a_class_whose_name_would_be_a_remark_is_read_again(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg")
    annotations = [{"image_id": 10, "category_id": 3 * n, "bbox": [n, n, 9, 9]} for n in (1, 2)]
    source = write(tmp_path / "train.json", coco(["a.jpg"], annotations, ("# 1", "dog")))
    main([str(source), "--out", str(tmp_path / "out")])
    assert boxes(tmp_path / "out", "train") == {"a": [("# 1", [1, 1, 10, 10]), ("dog", [2, 2, 11, 11])]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (coco(["b.jpg"], []), "b.jpg: no such picture, but"),
        (coco(["../a.jpg"], []), "names the picture '../a.jpg', which is a path outside"),
        (coco(["a.jpg"], [{"image_id": 11, "category_id": 3, "bbox": [1, 1, 2, 2]}]), "11 is missing or unknown"),
        (coco(["a.jpg"], [{"image_id": 10, "category_id": 4, "bbox": [1, 1, 2, 2]}]), "4 is missing or unknown"),
        (coco(["a.jpg"], [{"image_id": 10, "category_id": 3, "bbox": ["a", 1, 2, 2]}]), "could not convert"),
        (coco(["a.jpg"], []).replace("64", "65"), "a.jpg: is not of 65 x 48 pixels"),
        (coco(["a.jpg"], [], ("cat", "d\n")).replace('"d\\n"', '"d\\u0007g"'), "expected a name without control"),
        ('[{"image_id": 1}]', "expected a data set in COCO's form"),
        (coco([], []), "names no picture"),
    ],
)
def test_a_wrong_file_of_coco_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    draw(tmp_path / "a.jpg")
    assert said in refused(capsys, write(tmp_path / "coco.json", text), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2 0.5 0.5 0.5 0.5", "a.txt: line 1 is '2 0.5 0.5 0.5 0.5'; expected class x y width height"),
        ("0 32 24 16 24", "shares of the image's size from 0 to 1"),
        ("0 0.5 0.5 0.5", "expected class x y width height"),
        ("cat 0.5 0.5 0.5 0.5", "the class from 0 to 1"),
        ("0 nan 0.5 0.5 0.5", "expected class x y width height"),
    ],
)
def test_a_wrong_line_of_yolo_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    draw(tmp_path / "yolo/a.jpg")
    write(tmp_path / "yolo/classes.txt", "cat\ndog\n")
    write(tmp_path / "yolo/a.txt", line)
    assert said in refused(capsys, tmp_path / "yolo", "--out", tmp_path / "out")


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Six pictures in `images/`, of two classes in turn, whose folder tells no split."""
    for number in range(6):
        draw(tmp_path / f"yolo/images/{number}.jpg")
        write(tmp_path / f"yolo/labels/{number}.txt", f"{number % 2} 0.5 0.5 0.5 0.5\n")
    return tmp_path / "yolo"


LISTS = {"train.txt": "./images/0.jpg\n/content/yolo/images/1.jpg\n", "val.txt": "C:\\yolo\\images\\4.jpg\n"}


@pytest.mark.parametrize(
    "files",
    [
        {"data.yaml": "train: train.txt\nval: val.txt\ntest: ''\nnames: [no, 2024]", **LISTS},
        {"data.yaml": "path: ../yolo\ntrain: [train.txt]\nval: [./val.txt]\nnames: {0: no, 1: 2024}", **LISTS},
        {"obj.data": "classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/my.names"} | LISTS,
        {"classes.txt": "no\n2024\n", **LISTS},
    ],
)
def test_a_list_of_pictures_is_the_split_that_yolo_takes_it_for(
    yolo: Path, tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And the names of classes are the words that stand there, not what YAML takes them for."""
    for name, text in ({"my.names": "no\n2024\n"} | files).items():
        write(yolo / name, text)
    main([str(yolo), "--out", str(tmp_path / "out")])
    box = [16, 12, 48, 36]
    assert boxes(tmp_path / "out", "train") == {"0": [("no", box)], "1": [("2024", box)]}
    assert boxes(tmp_path / "out", "val") == {"4": [("no", box)]}
    assert "3 pictures outside of train, val and test left out" in capsys.readouterr().out


def test_folders_are_the_splits_that_they_are_named_for_whatever_their_names(tmp_path: Path) -> None:
    """The folder of a split that is not there is none, as in Roboflow's exports; its own words tell of what is left."""
    for name in ("red/1", "blue/2", "test/3"):
        draw(tmp_path / f"yolo/images/{name}.jpg")
    write(tmp_path / "yolo/labels/red/1.txt", "0 0.5 0.5 0.25 0.5\n")
    write(tmp_path / "yolo/data.yaml", "train: ../images/red\nval: images/blue\ntest: ../missing/images\nnames: [cat]")
    main([str(tmp_path / "yolo"), "--out", str(tmp_path / "out")])
    lists = {path.name: path.read_text() for path in (tmp_path / "out/ImageSets/Main").iterdir()}
    assert lists == {"train.txt": "1\n", "val.txt": "2\n", "test.txt": "3\n"}


def test_a_file_of_labels_is_no_list(yolo: Path, tmp_path: Path) -> None:
    write(yolo / "classes.txt", "cat\ndog\n")
    draw(yolo / "train.jpg")
    write(yolo / "train.txt", "1 0.5 0.5 0.5 0.5\n")
    main([str(yolo), "--out", str(tmp_path / "out")])
    assert len((tmp_path / "out/ImageSets/Main/default.txt").read_text().split()) == 7


@pytest.mark.parametrize(
    ("settings", "lists", "said"),
    [
        ("train: train.txt\nnames: [cat, dog]", {}, "data.yaml: names the list train.txt, which is not below"),
        (
            "train: train.txt\nnames: [cat, dog]",
            {"train.txt": "images/0.jpg\nimages/9.jpg\n"},
            "train.txt: 'images/9.jpg': no such picture below",
        ),
        (
            "train: images\nval: images\nnames: [cat, dog]",
            {},
            "images/0.jpg is for train and for val; expected it in one",
        ),
        ("train: images", {}, "data.yaml: no names of the classes; expected names: [cat, dog]"),
        ("- cat", {}, "data.yaml: is no YAML of keys and values; expected names: [cat, dog]"),
    ],
)
def test_what_yolo_says_of_its_splits_is_not_passed_over(
    yolo: Path, tmp_path: Path, settings: str, lists: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in ({"data.yaml": settings} | lists).items():
        write(yolo / name, text)
    assert said in refused(capsys, yolo, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
