"""The drawn sample: the same bytes for the same seed, official layouts, boxes that are where the pixels are."""

import collections
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

import common.sample
from common.data_root import resolve_data_root
from common.errors import UserError
from common.sample import canvas, cub, draw_sample, sample_seed, voc

ROOT = Path(__file__).resolve().parents[2]

VOC_CLASSES = {
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
}
SPLITS = [("VOC2007", "train"), ("VOC2007", "val"), ("VOC2007", "test"), ("VOC2012", "train"), ("VOC2012", "val")]


@pytest.fixture
def sample(drawn_sample: Path) -> Path:
    return drawn_sample


def test_it_is_known_as_a_sample_wherever_it_lies(sample: Path) -> None:
    assert sample_seed(sample) == 0
    assert resolve_data_root(str(sample), ["VOC2007"]) == (sample, True)
    assert sample_seed(sample / "VOC2007") is None
    assert resolve_data_root(str(sample / "VOC2007"), []) == (sample / "VOC2007", False)


def test_asking_for_the_seed_loads_no_library_that_draws() -> None:
    code = "import sys, common.sample; assert not {'cv2', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_command_line(sample: Path) -> None:
    command = [sys.executable, "-m", "tools.sample_data", "--data", str(sample)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[0] == f"{sample}: drawn from seed 0"
    for line, name in zip(shown[1:], ("VOC2007", "VOC2012", "CUB_200_2011"), strict=True):
        assert line.split() == [name, str(len(list((sample / name).rglob("*.jpg")))), "images"]
    failed = subprocess.run([*command, "--seed", "-1"], cwd=ROOT, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert "seed -1: expected 0 or more" in failed.stderr


def ids(root: Path, folder: str, split: str) -> list[str]:
    return (root / folder / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def objects(root: Path, folder: str, image_id: str) -> list[ElementTree.Element]:
    return list(ElementTree.parse(root / folder / "Annotations" / f"{image_id}.xml").iter("object"))


def corners(node: ElementTree.Element) -> list[float]:
    return [float(node.findtext(f"bndbox/{tag}")) for tag in ("xmin", "ymin", "xmax", "ymax")]


def rows(root: Path, name: str) -> list[list[str]]:
    return [line.split() for line in (root / "CUB_200_2011" / f"{name}.txt").read_text().splitlines()]


def test_pictures_drawn_again_alone_are_identical_to_the_byte(sample):
    pictures = voc.plan(0)
    for picture in pictures[::-40]:
        jpeg, _, _ = voc.draw_picture(picture)
        assert (sample / picture.folder / "JPEGImages" / f"{picture.image_id}.jpg").read_bytes() == jpeg
    paths = rows(sample, "images")
    for label, number in ((199, 11), (0, 0), (57, 3)):
        path = paths[12 * label + number][1]
        assert (sample / "CUB_200_2011" / "images" / path).read_bytes() == cub.draw_picture(0, label, number)[0]


def test_another_seed_gives_another_world():
    assert voc.plan(0) == voc.plan(0)
    assert {picture.image_id for picture in voc.plan(0)} != {picture.image_id for picture in voc.plan(1)}
    assert cub.draw_picture(0, 5, 0)[0] != cub.draw_picture(1, 5, 0)[0]
    looks = [[cub.invent(seed, label).colours["body"] for label in range(200)] for seed in (0, 1)]
    assert np.mean([a == b for a, b in zip(*looks, strict=True)]) < 0.2


def test_no_two_birds_share_body_and_wing_colour():
    looks = [cub.invent(0, label).colours for label in range(200)]
    assert len({(look["body"], look["wing"]) for look in looks}) == 200


def test_voc_lists_agree_with_the_folders(sample):
    for folder in ("VOC2007", "VOC2012"):
        listed = [image_id for name, split in SPLITS if name == folder for image_id in ids(sample, folder, split)]
        assert len(listed) == len(set(listed))
        for child, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            assert {path.name for path in (sample / folder / child).iterdir()} == {name + suffix for name in listed}
        halves = ids(sample, folder, "train"), ids(sample, folder, "val")
        assert ids(sample, folder, "trainval") == sorted(halves[0] + halves[1])
    assert all(len(image_id) == 6 and image_id.isdigit() for image_id in ids(sample, "VOC2007", "trainval"))
    years = {image_id.split("_")[0] for image_id in ids(sample, "VOC2012", "trainval")}
    assert years == {"2008", "2009", "2010", "2011"}
    assert not (sample / "VOC2012" / "ImageSets" / "Main" / "test.txt").exists()


@pytest.mark.parametrize(("folder", "split"), [*SPLITS, ("VOC2007", "trainval"), ("VOC2012", "trainval")])
def test_class_lists_say_what_the_annotations_say(sample, folder, split):
    present = {image_id: collections.defaultdict(list) for image_id in ids(sample, folder, split)}
    for image_id, found in present.items():
        for node in objects(sample, folder, image_id):
            found[node.findtext("name")].append(node.findtext("difficult"))
    for name in VOC_CLASSES:
        lines = (sample / folder / "ImageSets" / "Main" / f"{name}_{split}.txt").read_text().splitlines()
        flags = {line[:-3]: int(line[-2:]) for line in lines}
        assert flags == {
            image_id: (1 if "0" in found[name] else 0) if name in found else -1 for image_id, found in present.items()
        }


def test_every_class_is_well_represented(sample):
    counts = {split: collections.Counter() for split in SPLITS}
    for folder, split in SPLITS:
        for image_id in ids(sample, folder, split):
            for node in objects(sample, folder, image_id):
                if node.findtext("difficult") == "0":
                    counts[folder, split][node.findtext("name")] += 1
    training = sum((count for (_, split), count in counts.items() if split != "test"), collections.Counter())
    assert set(training) == VOC_CLASSES
    assert min(counts["VOC2007", "test"][name] for name in VOC_CLASSES) >= 14
    assert min(training[name] for name in VOC_CLASSES) >= 44


def test_annotations_have_the_official_tags_and_valid_boxes(sample):
    for folder, split in SPLITS:
        for image_id in ids(sample, folder, split):
            root = ElementTree.parse(sample / folder / "Annotations" / f"{image_id}.xml").getroot()
            head = [child.tag for child in root if child.tag != "object"]
            assert head == ["folder", "filename", "source", "size", "segmented"]
            assert (root.findtext("folder"), root.findtext("filename")) == (folder, f"{image_id}.jpg")
            height, width, depth = cv2.imread(str(sample / folder / "JPEGImages" / f"{image_id}.jpg")).shape
            assert [int(root.findtext(f"size/{tag}")) for tag in ("width", "height", "depth")] == [width, height, depth]
            for node in root.iter("object"):
                tags = {"name", "pose", "truncated", "difficult", "bndbox"}
                assert {child.tag for child in node} == tags | ({"occluded"} if folder == "VOC2012" else set())
                xmin, ymin, xmax, ymax = corners(node)
                assert 1 <= xmin < xmax <= width and 1 <= ymin < ymax <= height
                if node.findtext("truncated") == "1":
                    assert xmin == 1 or ymin == 1 or xmax == width or ymax == height


def test_the_hard_cases_are_there(sample):
    nodes, empty, fractional = [], collections.Counter(), []
    for folder, split in SPLITS:
        for image_id in ids(sample, folder, split):
            found = objects(sample, folder, image_id)
            nodes += found
            empty[folder, split] += not found
            if any(value % 1 for node in found for value in corners(node)):
                fractional.append((folder, split))
    assert all(empty[split] for split in SPLITS)
    assert fractional == [("VOC2012", "train")]
    truncated = np.mean([node.findtext("truncated") == "1" for node in nodes])
    difficult = np.mean([node.findtext("difficult") == "1" for node in nodes])
    assert 0.04 < truncated < 0.12 and 0.03 < difficult < 0.08


def test_boxes_are_tight_around_the_pixels_that_the_objects_change(monkeypatch):
    # The same picture without its objects differs exactly where they are: nothing between the two is shared with the
    # code that measures boxes. Sensor noise is left out and PNG replaces JPEG to see single pixels.
    monkeypatch.setattr(canvas.Canvas, "develop", lambda self, rng: self.image)
    for picture in [p for p in voc.plan(0) if len(p.classes) == 1 and not p.extra][:20]:
        image, (item,), _ = voc.draw_picture(picture)
        bare, _, _ = voc.draw_picture(picture._replace(classes=[]))
        y, x = np.nonzero(np.abs(image - bare).max(axis=2) > 2)
        extent = np.array([x.min() + 1, y.min() + 1, x.max() + 1, y.max() + 1])
        assert np.abs(extent - item.box).max() <= 1  # half covered pixels of the rim


def test_objects_do_not_hide_each_other(sample):
    for image_id in ids(sample, "VOC2007", "test"):
        boxes = np.array([corners(node) for node in objects(sample, "VOC2007", image_id)])
        for i in range(len(boxes)):
            for j in range(i):
                sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2]) + 1
                areas = [np.prod(boxes[k, 2:] - boxes[k, :2] + 1) for k in (i, j)]
                shared = np.prod(sides.clip(0))
                assert shared / (sum(areas) - shared) < 0.12


def test_birds_fill_the_official_index_files(sample):
    root = sample / "CUB_200_2011"
    images, labels, split, boxes = (
        dict(rows(sample, name)) if name != "bounding_boxes" else {row[0]: row[1:] for row in rows(sample, name)}
        for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")
    )
    classes = dict(rows(sample, "classes"))
    assert list(classes) == [str(number) for number in range(1, 201)]
    assert classes["1"] == "001.Black_footed_Albatross" and classes["200"] == "200.Common_Yellowthroat"
    assert list(images) == list(labels) == list(split) == list(boxes) == [str(i) for i in range(1, 2401)]
    assert {path.relative_to(root / "images").as_posix() for path in root.glob("images/*/*")} == set(images.values())
    assert all(images[key].startswith(classes[labels[key]] + "/") for key in images)
    assert collections.Counter((labels[key], split[key]) for key in images) == {
        (label, flag): count for label in classes for flag, count in (("1", 8), ("0", 4))
    }
    for key in list(images)[::50]:
        height, width, _ = cv2.imread(str(root / "images" / images[key])).shape
        x, y, w, h = map(float, boxes[key])
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height and max(w, h) > 0.5 * min(width, height)


def test_a_second_call_returns_at_once_and_another_seed_or_an_unfinished_sample_is_drawn(tmp_path, monkeypatch):
    drawn = []

    def stand_in(root: Path, seed: int) -> None:
        root.mkdir()
        (root / "picture").write_text(str(seed))
        if seed == 9:
            raise KeyboardInterrupt
        drawn.append(seed)

    monkeypatch.setattr(common.sample, "_draw", stand_in)
    root = tmp_path / "datasets" / "sample"
    draw_sample(root, 0)
    draw_sample(root, 0)
    draw_sample(root, 1)
    with pytest.raises(KeyboardInterrupt):
        draw_sample(root, 9)
    assert drawn == [0, 1]
    assert (root / "picture").read_text() == "1"
    assert list(root.parent.iterdir()) == [root]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        draw_sample(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_root_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot draw the sample"):
        draw_sample(tmp_path / "file" / "sample")
