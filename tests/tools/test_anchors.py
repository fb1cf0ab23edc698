"""The command line end to end on a small folder in VOC layout."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from detection.yolov3.anchors import mean_best_iou
from tools.anchors import main, object_sizes

OBJECT = "<object><name>{}</name><difficult>0</difficult><truncated>0</truncated><bndbox>{}</bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Sixty photographs of 200 x 100 with one object each, of growing width and height."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    for split, ids in (("train", range(60)), ("val", range(60, 62))):
        names = [f"{index:06d}" for index in ids]
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for index, name in zip(ids, names, strict=True):
            Image.new("RGB", (200, 100)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
            box = f"<xmin>1</xmin><ymin>1</ymin><xmax>{10 + 3 * index}</xmax><ymax>{5 + index}</ymax>"
            (tmp_path / "Annotations" / f"{name}.xml").write_text(
                "<annotation><size><width>200</width><height>100</height><depth>3</depth></size>"
                + OBJECT.format("cat", box)
                + "</annotation>"
            )
    return tmp_path


def test_prints_anchors_that_fit_better_and_their_iou(voc, capsys):
    main(["--data", str(voc), "--size", "400"])
    out = capsys.readouterr().out
    assert "60 objects of voc_train" in out
    old, new = (float(number) for number in re.findall(r"(0\.\d{4}) with", out))
    assert new > old
    anchors = torch.tensor(json.loads(re.search(r"ANCHORS: (.*)", out)[1])).double()
    assert anchors.shape == (3, 3, 2)
    sizes = torch.tensor([[2 * (10.0 + 3 * i), 2 * (5.0 + i)] for i in range(60)], dtype=torch.float64)
    assert mean_best_iou(sizes, anchors.flatten(0, 1)) == pytest.approx(new, abs=1e-4)


def test_no_anchor_has_a_side_of_nothing(voc, capsys):
    main(["--data", str(voc), "--size", "2"])  # at which most objects are less than a pixel high
    anchors = torch.tensor(json.loads(re.search(r"ANCHORS: (.*)", capsys.readouterr().out)[1]))
    assert anchors.min() == 1


def test_the_longer_side_of_an_image_becomes_the_size_whether_it_lies_or_stands():
    lying, upright = {"height": 100, "width": 200}, {"height": 200, "width": 100}
    records = [{**sides, "annotations": [{"bbox": [10, 20, 30, 70]}]} for sides in (lying, upright)]
    assert object_sizes(records, 400).tolist() == [[40, 100]] * 2


def test_a_size_of_nothing_is_refused(voc, capsys):
    with pytest.raises(SystemExit):
        main(["--data", str(voc), "--size", "0"])
    assert capsys.readouterr().err == "error: SIZE=0: expected 1 or more\n"


def test_too_few_objects(voc, capsys):
    (voc / "ImageSets" / "Main" / "train.txt").write_text("000001\n000002")
    with pytest.raises(SystemExit):
        main(["--data", str(voc)])
    assert "2 objects in voc_train, expected 9" in capsys.readouterr().err
    (voc / "ImageSets" / "Main" / "train.txt").write_text("\n".join(f"{7 * n:06d}" for n in range(9)))
    main(["--data", str(voc)])
    assert "9 objects of voc_train" in capsys.readouterr().out
