import os
import shutil
import struct
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances as detectron2_load_voc_instances
from detectron2.structures import BoxMode

from common.errors import UserError
from detection.voc import VOC_CLASSES, default_test, default_train, load_voc_instances, read_labels, register_voc
from detection.voc_annotations import annotation_xml
from detection.voc_lists import read_ids

DOG_AND_CAT = """<?xml version="1.0"?>
<annotation>
  <filename>of_no_matter.jpg</filename>
  <size><width>200</width><height>100</height><depth>3</depth></size>
  <object>
    <name>dog</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>
    <bndbox><xmin>1</xmin><ymin>11</ymin><xmax>200</xmax><ymax>60</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>5</xmin><ymin>12</ymin><xmax>9</xmax><ymax>15</ymax></bndbox></part>
  </object>
  <object>
    <bndbox><ymax>50.5</ymax><xmax>45.70000076293945</xmax><ymin>20.25</ymin><xmin> 31 </xmin></bndbox>
    <difficult>1</difficult><name> cat </name>
  </object>
</annotation>
"""
DOG = {"bbox": [0, 10, 200, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 11, "difficult": 0, "truncated": 1}
CAT = {
    "bbox": [30, 19.25, 45.70000076293945, 50.5],
    "bbox_mode": BoxMode.XYXY_ABS,
    "category_id": 7,
    "difficult": 1,
    "truncated": 0,
}


def annotation(*objects: tuple, width: object = 200, height: object = 100) -> str:
    """An annotation with objects (name, xmin, ymin, xmax, ymax)."""
    text = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{text}</annotation>"


def write(dirname: Path, split: str, annotations: dict[str, str], suffix: str = ".jpg") -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (dirname / folder).mkdir(parents=True, exist_ok=True)
    for image_id, xml in annotations.items():
        (dirname / "Annotations" / f"{image_id}.xml").write_text(xml)
        (dirname / "JPEGImages" / f"{image_id}{suffix}").touch()
    (dirname / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in annotations))
    return dirname


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images: two objects, one object, none."""
    annotations = {"b": DOG_AND_CAT, "a": annotation(("person", 3, 4, 5, 6)), "000003": annotation()}
    return write(tmp_path / "VOC2007", "train", annotations)


def load(dirname: Path) -> list[dict]:
    return load_voc_instances(dirname, "train", VOC_CLASSES)


# reading


def test_reads_hand_written_annotations_in_the_order_of_the_list(voc):
    b, a, empty = load(voc)
    assert b == {
        "file_name": str(voc / "JPEGImages" / "b.jpg"),
        "image_id": "b",
        "height": 100,
        "width": 200,
        "annotations": [DOG, CAT],
    }
    assert (a["image_id"], [o["bbox"] for o in a["annotations"]]) == ("a", [[2, 3, 5, 6]])
    assert (a["annotations"][0]["difficult"], a["annotations"][0]["truncated"]) == (0, 0)
    assert (empty["image_id"], empty["annotations"]) == ("000003", [])
    assert all(type(x) is float for x in b["annotations"][0]["bbox"])


def test_second_reading_equals_the_first(voc):
    first = load(voc)
    assert (voc / ".voc_cache" / "train.npz").is_file()
    assert load(voc) == first


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".JPG", ".Jpg", ".bmp", ".TIF", ".webp"])
def test_finds_images_by_their_stem(tmp_path, suffix):
    (entry,) = load(write(tmp_path, "train", {"x.1": annotation()}, suffix))
    assert entry["file_name"] == str(tmp_path / "JPEGImages" / f"x.1{suffix}")


def test_list_may_have_blank_lines_spaces_and_windows_line_ends(voc):
    (voc / "ImageSets/Main/train.txt").write_bytes(b"\xef\xbb\xbfb \r\n\r\n  a\r\n")
    assert [entry["image_id"] for entry in load(voc)] == ["b", "a"]


def test_box_leaving_the_image_by_one_pixel_is_clipped(tmp_path):
    (entry,) = load(write(tmp_path, "train", {"x": annotation(("dog", 0, 0.5, 201, 100.75))}))
    assert entry["annotations"][0]["bbox"] == [0, 0, 200, 100]


def test_a_box_of_the_first_pixel_is_one_in_pixels(tmp_path):
    """And none in shares of the image, which would be 0 to 1."""
    (entry,) = load(write(tmp_path, "train", {"x": annotation(("dog", 1, 1, 1, 1))}))
    assert entry["annotations"][0]["bbox"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("box", "corners"),
    [
        ((10.25, 20, 40.5, 30), [11.25, 21, 40.5, 30]),
        ((10.25, 20, 10.5, 20.5), [11.25, 21, 11.25, 21]),  # below a pixel: from and to the same
        ((99.5, 49.5, 100, 50), [100, 50, 100, 50]),  # the same in the last pixel
    ],
)
def test_written_boxes_count_from_1_and_stay_in_their_image(box, corners):
    written = ElementTree.fromstring(annotation_xml("a.jpg", 50, 100, [("cat", box)])).find("object/bndbox")
    assert [(side.tag, float(side.text)) for side in written] == list(
        zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )


@pytest.mark.parametrize(("year", "split"), [("VOC2007", "trainval"), ("VOC2007", "test"), ("VOC2012", "trainval")])
def test_agrees_with_detectron2_on_real_annotations(shared, tmp_path, year, split):
    for folder in ("Annotations", "ImageSets", "JPEGImages"):  # links keep the cache out of the shared folder
        (tmp_path / folder).symlink_to(shared / "datasets" / year / folder)
    expected = detectron2_load_voc_instances(str(tmp_path), split, VOC_CLASSES)
    for _ in ("parsed", "cached"):
        found = load_voc_instances(tmp_path, split, VOC_CLASSES)
        for entry in found:
            for instance in entry["annotations"]:
                assert {instance.pop("difficult"), instance.pop("truncated")} <= {0, 1}
        assert found == expected


def test_keeps_difficult_of_real_annotations(shared, tmp_path):
    for folder in ("Annotations", "ImageSets", "JPEGImages"):
        (tmp_path / folder).symlink_to(shared / "datasets" / "VOC2007" / folder)
    ids = (tmp_path / "ImageSets/Main/test.txt").read_text().split()
    texts = [(tmp_path / "Annotations" / f"{image_id}.xml").read_text() for image_id in ids]
    objects = [o for entry in load_voc_instances(tmp_path, "test", VOC_CLASSES) for o in entry["annotations"]]
    for flag in ("difficult", "truncated"):
        expected = sum(text.count(f"<{flag}>1</{flag}>") for text in texts)
        assert sum(o[flag] for o in objects) == expected > 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("<truncated>Unspecified</truncated><difficult>Unspecified</difficult>", (0, 0)),
        ("<truncated>0.0597</truncated><difficult>0.0</difficult>", (1, 0)),
        ("<truncated>False</truncated><difficult>true</difficult>", (0, 1)),
        ("<Truncated>1.0</Truncated><Difficult>1</Difficult>", (1, 1)),
        ("<truncated/><difficult></difficult>", (0, 0)),
    ],
)
def test_flags_as_annotation_tools_write_them(tmp_path, flags, expected):
    xml = annotation(("dog", 1, 1, 9, 9)).replace("</name>", f"</name>{flags}")
    (entry,) = load(write(tmp_path, "train", {"x": xml}))
    assert (entry["annotations"][0]["truncated"], entry["annotations"][0]["difficult"]) == expected


def test_labels_behind_ids_are_no_part_of_them_but_where_a_file_is_named_so(tmp_path):
    write(tmp_path, "train", {name: annotation() for name in ("000001", "a photo 1", "000002", "000003")})
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(b"000001 -1\r\na photo 1\r\n000002  1\r\n000003  0\r\n")
    assert read_ids(tmp_path, "train") == ["000001", "a photo 1", "000002", "000003"]


def test_cvats_undivided_list_with_subfolders_is_divided(tmp_path):
    names = [f"day {number % 2}/{number}" for number in range(11)]
    for folder in ("Annotations", "JPEGImages"):
        for part in ("day 0", "day 1"):
            (tmp_path / folder / part).mkdir(parents=True)
    write(tmp_path, "default", {name: annotation(("cat", 1, 1, 9, 9)) for name in names})
    assert (default_train(tmp_path), default_test(tmp_path)) == (("voc_train",), ("voc_val",))
    held = load_voc_instances(tmp_path, "val", VOC_CLASSES)
    assert [entry["image_id"] for entry in held] == ["day 0/4", "day 1/9"]
    assert held[0]["file_name"] == str(tmp_path / "JPEGImages/day 0/4.jpg")
    assert sorted([*read_ids(tmp_path, "train"), "day 0/4", "day 1/9"]) == sorted(names)


def test_of_fewer_than_five_undivided_images_the_last_is_held_back(tmp_path):
    write(tmp_path, "default", {name: annotation(("cat", 1, 1, 9, 9)) for name in "abc"})
    assert (read_ids(tmp_path, "train"), read_ids(tmp_path, "val")) == (["a", "b"], ["c"])


def flat(root: Path, **names: str) -> Path:
    """A folder as Roboflow exports VOC: annotations beside the images, no lists."""
    for folder, ids in names.items():
        (root / folder).mkdir(parents=True)
        for image_id in ids.split():
            (root / folder / f"{image_id}.xml").write_text(annotation((folder, 1, 1, 9, 9)))
            (root / folder / f"{image_id}.jpg").touch()
    return root


def test_flat_folders_with_annotations_beside_the_images(tmp_path):
    root = flat(tmp_path / "data", train="b a", valid="a", test="c")
    assert read_labels(root) == ("test", "train", "valid")
    assert (default_train(root), default_test(root)) == (("voc_train",), ("voc_test",))
    no_test = flat(tmp_path / "no test", train="a", valid="b")
    assert (default_train(no_test), default_test(no_test)) == (("voc_train",), ("voc_val",))
    for split, ids in (("train", ["train/a", "train/b"]), ("val", ["valid/a"]), ("test", ["test/c"])):
        entries = load_voc_instances(root, split, read_labels(root))
        assert [entry["image_id"] for entry in entries] == ids
        assert [entry["file_name"] for entry in entries] == [str(root / f"{image_id}.jpg") for image_id in ids]
        (name,) = {read_labels(root)[box["category_id"]] for entry in entries for box in entry["annotations"]}
        assert name == ids[0].partition("/")[0]


def test_flat_folders_that_lack_something_are_refused(tmp_path):
    root = flat(tmp_path, train="a b")
    with pytest.raises(UserError, match=r"annotations in train/ only; expected them in test/ or valid/"):
        default_test(root)
    with pytest.raises(UserError, match=r"/valid: no annotation in it"):
        read_ids(root, "val")
    (root / "train/b.jpg").unlink()
    with pytest.raises(UserError, match=r"train/b\.jpg: no such image"):
        load_voc_instances(root, "train", ("train",))


# cache


def test_changed_annotation_is_noticed_and_the_others_come_from_the_cache(voc):
    b, _, _ = load(voc)
    # Without a change of size or time a file is not opened again: b's new content stays unseen, a's is read.
    b_xml, a_xml = voc / "Annotations/b.xml", voc / "Annotations/a.xml"
    times = b_xml.stat()
    b_xml.write_text(DOG_AND_CAT.replace("<xmax>200</xmax>", "<xmax>100</xmax>"))
    os.utime(b_xml, ns=(times.st_atime_ns, times.st_mtime_ns))
    a_xml.write_text(annotation(("sheep", 3, 4, 50, 60)))
    assert load(voc)[0] == b
    (instance,) = load(voc)[1]["annotations"]
    assert (instance["category_id"], instance["bbox"]) == (VOC_CLASSES.index("sheep"), [2, 3, 50, 60])


def test_change_of_the_time_alone_is_noticed(voc):
    load(voc)
    xml = voc / "Annotations/a.xml"
    before = xml.stat()
    xml.write_text(xml.read_text().replace("<ymax>6<", "<ymax>7<"))
    os.utime(xml, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert xml.stat().st_size == before.st_size
    assert load(voc)[1]["annotations"][0]["bbox"] == [2, 3, 5, 7]


def test_change_of_the_size_alone_is_noticed(voc):
    load(voc)
    xml = voc / "Annotations/a.xml"
    before = xml.stat()
    xml.write_text(xml.read_text().replace("<ymax>6<", "<ymax>17<"))
    os.utime(xml, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(voc)[1]["annotations"][0]["bbox"] == [2, 3, 5, 17]


def test_files_of_equal_size_and_time_are_not_mistaken_for_one_another(tmp_path):
    annotations = {"x": annotation(("dog", 1, 1, 9, 9)), "y": annotation(("cat", 1, 1, 9, 9))}
    write(tmp_path, "train", annotations)
    for image_id in annotations:
        os.utime(tmp_path / "Annotations" / f"{image_id}.xml", ns=(0, 0))
    load(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("y\nx\n")
    names = [VOC_CLASSES[entry["annotations"][0]["category_id"]] for entry in load(tmp_path)]
    assert names == ["cat", "dog"]


def test_added_removed_and_reordered_ids_are_noticed(voc):
    load(voc)
    write(voc, "other", {"new": annotation(("cow", 1, 1, 10, 10))})
    (voc / "ImageSets/Main/train.txt").write_text("a\nnew\nb\n")
    for _ in ("partly cached", "cached"):
        a, new, b = load(voc)
        assert [entry["image_id"] for entry in (a, new, b)] == ["a", "new", "b"]
        assert a["annotations"][0]["category_id"] == VOC_CLASSES.index("person")
        assert new["annotations"][0]["category_id"] == VOC_CLASSES.index("cow")
        assert b["annotations"] == [DOG, CAT]


def test_removed_annotation_is_noticed(voc):
    load(voc)
    (voc / "Annotations/a.xml").unlink()
    with pytest.raises(UserError, match=r"a\.xml: No such file"):
        load(voc)


@pytest.mark.parametrize(
    "damage", ["not an archive", "cut", "another box", "empty", "other arrays", "no names", "folder", "no access"]
)
def test_damaged_cache_is_built_anew(voc, damage):
    expected = load(voc)
    cache = voc / ".voc_cache/train.npz"
    content = cache.read_bytes()
    if damage == "folder":
        cache.unlink()
        cache.mkdir()
    elif damage == "no access":  # for anybody, root too: a name longer than any file's
        shutil.rmtree(cache.parent)
        cache.parent.symlink_to("x" * 300)
    elif damage == "other arrays":
        np.savez(cache, ids=np.array(["b", "a", "000003"]), images=np.zeros(3), objects=np.zeros(3), names=np.zeros(0))
    elif damage == "no names":
        with np.load(cache) as arrays:
            np.savez(cache, **{**arrays, "names": np.array([], dtype=str)})
    else:
        cache.write_bytes(
            {
                "not an archive": b"nothing of the kind",
                "cut": content[: len(content) // 2],
                "another box": content.replace(struct.pack("<d", 19.25), struct.pack("<d", 18.25)),
                "empty": b"",
            }[damage]
        )
    assert load(voc) == expected
    if damage not in ("folder", "no access"):
        assert cache.read_bytes()[:2] == b"PK"
        assert load(voc) == expected


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_a_cache_is_never_loaded(voc, tmp_path):
    expected = load(voc)
    objects = np.array([Payload(tmp_path / "executed")], dtype=object)
    np.savez(voc / ".voc_cache/train.npz", ids=objects, images=objects, objects=objects, names=objects)
    assert load(voc) == expected
    assert not (tmp_path / "executed").exists()


def test_cache_goes_to_the_users_folder_where_the_data_cannot_be_written(voc, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (voc / ".voc_cache").write_text("a file in the place of the folder")
    first = load(voc)
    (cache,) = (tmp_path / "caches").rglob("train.npz")
    written = cache.stat().st_mtime_ns
    assert load(voc) == first
    assert cache.stat().st_mtime_ns == written


def test_no_place_for_a_cache_is_a_warning(voc, tmp_path, monkeypatch, caplog):
    (tmp_path / "caches").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (voc / ".voc_cache").touch()
    assert len(load(voc)) == 3
    assert "not cached" in caplog.text


def test_cache_serves_any_list_of_classes(voc):
    load(voc)
    b, a, _ = load_voc_instances(voc, "train", ["cat", "dog", "person"])
    assert [o["category_id"] for o in b["annotations"] + a["annotations"]] == [1, 0, 2]


# errors


def error_of(dirname: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load_voc_instances(dirname, split, VOC_CLASSES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NO_NUMBER = (
    "<annotation><size><width>9</width><height>9</height></size><object><name>dog</name>{}</object></annotation>"
)


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        (DOG_AND_CAT[:200], "not well-formed XML (unclosed token: line 6"),
        (DOG_AND_CAT.replace("</size>", ""), "not well-formed XML (mismatched tag: line"),
        ("", "not well-formed XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "not well-formed XML (unknown encoding"),
        ("<annotation/>", "<size> with <width> and <height> is missing"),
        (annotation(width=""), "<size> with <width> and <height> is missing"),
        (annotation(width=0), "image size is 0 x 100; expected two whole numbers above 0"),
        (annotation(height="nan"), "image size is 200 x nan"),
        (annotation(height="99.5"), "image size is 200 x 99.5"),
        (annotation(width=20000, height=20000), "expected two whole numbers above 0, at most 178,956,970 pixels"),
        (
            annotation(("dgo", 1, 1, 9, 9)),
            "unknown class 'dgo', did you mean 'dog'? expected one of aeroplane, bicycle",
        ),
        (annotation(("zzz", 1, 1, 9, 9)), "unknown class 'zzz'; expected one of aeroplane, bicycle"),
        (annotation((" ", 1, 1, 9, 9)), "<object> has no <name>"),
        (annotation(("dog", 9, 1, 8, 9)), "box of object 'dog', xmin 9 ymin 1 xmax 8 ymax 9, is empty or leaves"),
        (annotation(("dog", 9, 5, 12, 4)), "is empty or leaves its image of 200 x 100 pixels by more than 1"),
        (annotation(("dog", 9, 5, 202, 9)), "xmax 202 ymax 9, is empty or leaves"),
        (annotation(("dog", 9, 5, 19, 101.5)), "xmax 19 ymax 101.5, is empty or leaves"),
        (annotation(("dog", -1, 5, 19, 9)), "xmin -1 ymin 5"),
        (annotation(("dog", 9, -0.5, 19, 9)), "xmin 9 ymin -0.5"),
        (annotation(("dog", 0, 1, 0, 9)), "xmin 0 ymin 1 xmax 0"),
        (annotation(("dog", "nan", 1, 9, 9)), "xmin nan"),
        (annotation(("dog", 1, 1, "inf", 9)), "xmax inf"),
        (annotation(("dog", "one", 1, 9, 9)), "object 'dog' has no <bndbox> with four numbers"),
        (NO_NUMBER.format(""), "object 'dog' has no <bndbox> with four numbers"),
        (NO_NUMBER.format("<bndbox><xmin>1</xmin></bndbox>"), "object 'dog' has no <bndbox> with four numbers"),
        (annotation(("dog", 0.1, 0.2, 0.5, 1)), "seems to be in shares of its image; expected pixels"),
        (annotation(("dog", 0, 0, 1, 1)), "seems to be in shares of its image; expected pixels"),
        (
            annotation(("dog", 1, 1, 9, 9))
            .replace("<object>", "<objects><object>")
            .replace("</object>", "</object></objects>"),
            "1 objects or boxes lie elsewhere than VOC has them and would be lost",
        ),
        (
            annotation(("dog", 1, 1, 9, 9)).replace("</object>", "<bndbox/></object>"),
            "1 objects or boxes lie elsewhere than VOC has them",
        ),
        (DOG_AND_CAT.replace("<difficult>1<", "<difficult>0.5<"), "has <difficult> '0.5'; expected 0 or 1"),
        (DOG_AND_CAT.replace("<truncated>1<", "<truncated>5<"), "has <truncated> '5'; expected 0 or 1"),
        (
            DOG_AND_CAT.replace("<difficult>1<", "<difficult>\nyes<"),
            "an <object> has <difficult> 'yes'; expected 0 or 1",
        ),
    ],
)
def test_wrong_annotation_is_named(voc, xml, said):
    path = voc / "Annotations/a.xml"
    path.write_text(xml)
    for _ in range(2):  # nothing wrong is ever taken from a cache
        message = error_of(voc)
        assert message.startswith(f"{path}: ")
        assert said in message


def test_unknown_class_is_named_with_its_own_file_behind_images_without_objects(tmp_path):
    annotations = {"e": annotation(), "x": annotation(("dog", 1, 1, 9, 9)), "f": annotation()}
    annotations |= {"y": annotation(("dog", 1, 1, 9, 9), ("unicorn", 1, 1, 9, 9))}
    assert error_of(write(tmp_path, "train", annotations)).startswith(str(tmp_path / "Annotations/y.xml"))


def test_missing_files_are_named(voc):
    lists = voc / "ImageSets/Main"
    assert error_of(voc, "val").startswith(f"{lists / 'val.txt'}: no such file; expected the image ids")
    (voc / "JPEGImages/a.jpg").unlink()
    assert error_of(voc).startswith(f"{voc / 'JPEGImages/a.jpg'}: no such image, but {lists / 'train.txt'} lists 'a'")
    shutil.rmtree(voc / "JPEGImages")
    assert error_of(voc).startswith(f"{voc / 'JPEGImages'}: No such file or directory")
    shutil.rmtree(voc / "ImageSets")
    message = error_of(voc)
    assert message.startswith(f"{lists / 'train.txt'}: {voc / 'ImageSets'} is missing")
    assert message.endswith(f"`make check-datasets DATA={voc.parent}`")
    shutil.rmtree(voc)
    assert f"{voc} is missing" in error_of(voc)


def test_missing_annotation_is_named(voc):
    (voc / "Annotations/a.xml").unlink()
    message = error_of(voc)
    assert message.startswith(f"{voc / 'Annotations/a.xml'}: No such file or directory, but the split lists 'a'")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty; expected one image id a line"),
        (b" \n\n", "empty; expected one image id a line"),
        (b"a\nb\na\n", "image id 'a' is listed twice"),
        (b"../VOC2012/a\n", "image id '../VOC2012/a' is a path"),
        (b"\xff\xfea", "not text in UTF-8"),
    ],
)
def test_wrong_list_is_named(voc, content, said):
    path = voc / "ImageSets/Main/train.txt"
    path.write_bytes(content)
    assert error_of(voc).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("line", "image_id"),
    [
        ("a.jpg", "a"),
        ("/home/me/data/images/a.JPG", "a"),
        ("../data/obj/a.jpg", "a"),
        ("./JPEGImages/a.jpg", "a"),
        ("C:\\photos\\my cats\\a.jpg", "a"),
        ("https://host/a.jpg", "a"),
        ("data/a.jpg 1", "a"),
        ("elsewhere/b/a.jpg", "b/a"),
        ("elsewhere/a.b.jpg", "a.b"),
        ("elsewhere/c.png.jpg", "c.png"),
        ("c.png", "c.png"),
    ],
)
def test_a_path_in_a_list_means_the_id_that_is_annotated(voc, line, image_id):
    """Of two that might be meant the one with more of the path."""
    for other in ("b/a", "a.b", "c.png"):
        (voc / "Annotations" / other).parent.mkdir(exist_ok=True)
        (voc / "Annotations" / f"{other}.xml").write_text(annotation())
    for path in (voc / "ImageSets/Main/train.txt", voc / "train.txt"):
        path.write_text(f"{line}\n000003\n")
        assert read_ids(voc, "train") == [image_id, "000003"]
        path.unlink()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "data/obj/none.jpg",
            "'data/obj/none.jpg' is the path of a picture without an annotation in {}; expected image",
        ),
        ("/etc/a", "image id '/etc/a' is a path"),
        ("x/a.jpg\ny/a.jpg", "image id 'a' is listed twice"),
    ],
)
def test_a_path_of_no_annotated_picture_is_refused(voc, lines, said):
    path = voc / "ImageSets/Main/train.txt"
    path.write_text(lines)
    assert error_of(voc).startswith(f"{path}: {said.format(voc / 'Annotations')}")


def test_lists_beside_the_annotations_divide_them(tmp_path):
    """As YOLO's tools write them, where the annotations are VOC's."""
    for name in "abc":
        (tmp_path / f"{name}.xml").write_text(annotation(("dog", 1, 1, 9, 9)))
        (tmp_path / f"{name}.jpg").touch()
    (tmp_path / "train.txt").write_text("data/a.jpg\ndata/c.jpg\n")
    (tmp_path / "val.txt").write_text("data/b.jpg\n")
    assert (default_train(tmp_path), default_test(tmp_path)) == (("voc_train",), ("voc_val",))
    assert [record["image_id"] for record in load_voc_instances(tmp_path, "train", VOC_CLASSES)] == ["a", "c"]
    assert read_ids(tmp_path, "val") == ["b"]
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    for name in "abc":
        (tmp_path / f"{name}.xml").rename(tmp_path / f"Annotations/{name}.xml")
    assert read_ids(tmp_path, "train") == ["a", "c"]
    (tmp_path / "ImageSets/Main/train.txt").write_text("b\n")  # VOC's own list wins
    assert read_ids(tmp_path, "train") == ["b"]


# classes


def test_labels_file_decides_the_classes(voc):
    (voc / "labels.txt").write_text("# animals\ncat\n\n dog \nperson\n")
    assert read_labels(voc) == ("cat", "dog", "person")


def test_without_labels_file_vocs_classes_or_the_sorted_names_found(voc):
    assert read_labels(voc) == VOC_CLASSES
    write(voc, "test", {"z": annotation(("zebra", 1, 1, 9, 9))})
    assert read_labels(voc) == ("cat", "dog", "person", "zebra")


@pytest.mark.parametrize(("text", "said"), [("dog\ncat\ndog\n", "'dog' is named twice"), ("# none\n", "no class name")])
def test_wrong_labels_file_is_refused(voc, text, said):
    (voc / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_labels(voc)
    assert str(caught.value).startswith(f"{voc / 'labels.txt'}: ")


def test_folder_without_objects_needs_labels(tmp_path):
    write(tmp_path, "train", {"x": annotation()})
    with pytest.raises(UserError, match=r"\(train\) hold no object .*labels\.txt, one a line"):
        read_labels(tmp_path)


# catalogs


@pytest.fixture
def catalogs():
    yield
    for name in list(DatasetCatalog):
        if name.startswith(("voc_t", "voc_val", "voc07_", "voc12_")):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    root = tmp_path / "official"
    write(root / "VOC2007", "trainval", {"000005": DOG_AND_CAT})
    write(root / "VOC2007", "test", {"000001": annotation()})
    write(root / "VOC2012", "trainval", {"2008_000002": annotation(("dog", 1, 1, 9, 9))})
    return root


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    root = tmp_path / "zoo"
    write(root, "train", {"x": annotation(("zebra", 1, 1, 9, 9), ("okapi", 1, 1, 9, 9))})
    return write(root, "val", {"y": annotation(("zebra", 1, 1, 9, 9))})


def test_official_root_is_registered(catalogs, official):
    register_voc(official)
    assert DatasetCatalog.get("voc07_trainval")[0]["annotations"] == [DOG, CAT]
    assert [entry["image_id"] for entry in DatasetCatalog.get("voc12_trainval")] == ["2008_000002"]
    metadata = MetadataCatalog.get("voc07_test")
    assert metadata.thing_classes == list(VOC_CLASSES)
    assert (metadata.dirname, metadata.split) == (str(official / "VOC2007"), "test")
    assert metadata.evaluator_type == "voc"
    names = {f"voc{year}_{split}" for year in ("07", "12") for split in ("train", "val", "trainval", "test")}
    assert names <= set(DatasetCatalog)
    assert (default_train(official), default_test(official)) == (("voc07_trainval", "voc12_trainval"), ("voc07_test",))


def test_missing_split_of_an_official_root_is_an_error_when_asked_for(catalogs, official):
    register_voc(official)
    with pytest.raises(UserError, match=r"VOC2012/ImageSets/Main/test\.txt: no such file") as caught:
        DatasetCatalog.get("voc12_test")
    assert f"`make check-datasets DATA={official}`" in str(caught.value)


@pytest.mark.parametrize(("folder", "other"), [("VOC2007", "VOC2012"), ("VOC2012", "VOC2007")])
def test_official_root_with_one_year_is_no_default_to_train_on(catalogs, official, folder, other):
    shutil.rmtree(official / folder)
    register_voc(official)
    said = f"holds no {folder}/.*`make check-datasets DATA={official}`.* DATA={official / other}$"
    with pytest.raises(UserError, match=said):
        default_train(official)
    if folder == "VOC2012":
        assert default_test(official) == ("voc07_test",)
    else:
        with pytest.raises(UserError, match=said):
            default_test(official)


def test_custom_folder_is_registered_with_its_own_classes(catalogs, custom):
    register_voc(custom)
    assert MetadataCatalog.get("voc_train").thing_classes == ["okapi", "zebra"]
    assert [o["category_id"] for o in DatasetCatalog.get("voc_train")[0]["annotations"]] == [1, 0]
    assert (default_train(custom), default_test(custom)) == (("voc_train",), ("voc_val",))


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (("train", "val", "trainval", "test"), ("voc_trainval", "voc_test")),
        (("train", "test"), ("voc_train", "voc_test")),
        (("train", "val", "trainval"), ("voc_train", "voc_val")),
        (("train", "val", "test"), ("voc_train", "voc_test")),
    ],
)
def test_defaults_of_custom_folders(tmp_path, lists, expected):
    for split in lists:
        write(tmp_path, split, {"x": annotation()})
    assert (default_train(tmp_path), default_test(tmp_path)) == ((expected[0],), (expected[1],))


@pytest.mark.parametrize(
    ("lists", "said"), [((), "no split"), (("trainval", "val"), "val, trainval"), (("test",), "test")]
)
def test_custom_folder_without_a_pair_of_lists_is_refused(tmp_path, lists, said):
    write(tmp_path, "unused", {})
    for split in lists:
        write(tmp_path, split, {"x": annotation()})
    with pytest.raises(UserError, match=rf"ImageSets/Main: lists of {said} found; expected"):
        default_train(tmp_path)
    if lists == ("test",):
        assert default_test(tmp_path) == ("voc_test",)
    else:
        with pytest.raises(UserError, match=rf"ImageSets/Main: lists of {said} found; expected"):
            default_test(tmp_path)


def test_registering_again_replaces_the_former_root(catalogs, official, custom, tmp_path):
    register_voc(official)
    register_voc(custom)
    assert "voc_train" in DatasetCatalog
    assert "voc07_trainval" not in DatasetCatalog
    other = shutil.copytree(official, tmp_path / "other")
    register_voc(other)
    assert "voc_train" not in DatasetCatalog
    assert DatasetCatalog.get("voc07_trainval")[0]["file_name"] == str(other / "VOC2007/JPEGImages/000005.jpg")
    assert "voc_2007_train" in DatasetCatalog  # Detectron2's own stay


def test_root_that_is_neither_is_refused(tmp_path):
    for root, said in ((tmp_path, "no VOC data in it"), (tmp_path / "typo", "no such folder")):
        for function in (register_voc, default_train, default_test):
            with pytest.raises(UserError) as caught:
                function(root)
            assert str(caught.value).startswith(f"{root}: {said}; expected VOC2007/ and VOC2012/, or Annotations/")
            assert str(caught.value).endswith(f"`make check-datasets DATA={root}`")
