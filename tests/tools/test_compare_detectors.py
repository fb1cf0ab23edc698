"""The command on two very small untrained detectors, which find something everywhere."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from detection.dataset_mapper import DatasetMapper
from detection.modeling import load_detector
from detection.trainer import Evaluator
from detection.voc import register_voc
from tests.tools.scenes import draw_scene
from tools.compare_detectors import compare_ap50, main

OBJECT = """<object><name>{}</name><truncated>0</truncated><difficult>{}</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def draw_photograph(path: Path, seed: int) -> list[tuple[str, int, int, int, int]]:
    image, objects = draw_scene(48, 64, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return objects


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six photographs in VOC layout, every third object difficult."""
    folder = tmp_path_factory.mktemp("tiny voc")
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "labels.txt").write_text("red\nblue\n")
    for number in range(6):
        objects = draw_photograph(folder / "JPEGImages" / f"{number}.png", number)
        text = "".join(OBJECT.format(n, int((i + number) % 3 == 0), *box) for i, (n, *box) in enumerate(objects))
        size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{number}.xml").write_text(f"<annotation>{size}{text}</annotation>")
    (folder / "ImageSets/Main/trainval.txt").write_text("0\n1\n")
    (folder / "ImageSets/Main/test.txt").write_text("2\n3\n4\n5\n")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data, make_detector) -> dict[str, Path]:
    """Weights by name; YOLOv3 has the classes in another order, and one of its own."""
    output = tmp_path_factory.mktemp("runs")
    return {
        "frcnn": make_detector(output / "faster_rcnn_R_50_FPN-sample", "faster_rcnn_R_50_FPN", ["red", "blue"], data),
        "yolov3": make_detector(output / "yolov3_darknet53", "yolov3_tiny", ["green", "blue", "red"], data),
        "same classes": make_detector(output / "same", "yolov3_tiny", ["red", "blue"], data),
        "other data": make_detector(output / "other", "yolov3_tiny", ["cat"], data / "elsewhere"),
    }


def error_of(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_code:
        main([str(argument) for argument in arguments])
    assert exit_code.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def ap50_of_evaluation(weights: Path) -> float:
    cfg, model = load_detector(weights)
    register_voc(Path(cfg.DATASETS.ROOT))
    return Evaluator(cfg).evaluate(model)["AP50"]


def test_photographs_of_several_folders(runs, tmp_path, capsys):
    names = ["a/same.png", "b/same.png", "b/other.png"]
    for seed, name in enumerate(names):
        draw_photograph(tmp_path / "photos" / name, seed)
    out = tmp_path / "out"
    arguments = ["--frcnn", runs["frcnn"], "--yolov3", runs["yolov3"], "--score", 0.2, "--out", out]
    main([str(a) for a in (tmp_path / "photos" / "a" / "same.png", tmp_path / "photos" / "b", *arguments)])

    content = json.loads((out / "comparison.json").read_text())
    assert content["weights"] == {"Faster R-CNN": str(runs["frcnn"]), "YOLOv3": str(runs["yolov3"])}
    photographs = content["photographs"]
    assert [photo["file_name"] for photo in photographs] == [
        str(tmp_path / "photos" / name) for name in ("a/same.png", "b/other.png", "b/same.png")
    ]
    assert [photo["picture"] for photo in photographs] == [
        "pictures/same.png", "pictures/other.png", "pictures/same-2.png"
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["other.png", "same-2.png", "same.png"]
    assert not (out / "errors.json").exists()

    # What each detector is said to find is what its model finds.
    for name, weights in content["weights"].items():
        cfg, model = load_detector(Path(weights))
        for photo in photographs:
            with torch.no_grad():
                (result,) = model([DatasetMapper(cfg, False)({"file_name": photo["file_name"]})])
            instances = result["instances"][result["instances"].scores >= 0.2]
            expected = sorted(zip(instances.scores.tolist(), instances.pred_classes.tolist(), strict=True))
            found = [pair[name] for pair in photo["objects"] if pair[name]]
            assert sorted((box["score"], cfg.MODEL.CLASSES.index(box["class"])) for box in found) == expected
            assert len(found) > 0
            assert photo["milliseconds"][name] > 0

    table = pd.read_csv(out / "photographs.csv")
    objects = pd.read_csv(out / "objects.csv")
    assert len(objects) == sum(len(photo["objects"]) for photo in photographs)
    counts = objects["agreement"].value_counts()
    for agreement in ("both", "other class", "only Faster R-CNN", "only YOLOv3"):
        assert table[agreement].iloc[-1] == table[agreement][:-1].sum() == counts.get(agreement, 0)
    printed = capsys.readouterr().out
    assert "b/same.png" not in printed and "same.png" in printed
    assert f"3 pictures, tables and comparison.json are in {out}" in printed


def test_an_odd_photograph_is_left_out_and_nothing_is_overwritten(runs, tmp_path, capsys):
    photos = tmp_path / "pictures"
    for seed, name in enumerate(("a.png", "b.png")):
        draw_photograph(photos / name, seed)
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:60])
    Image.new("RGB", (3000, 2)).save(photos / "thin.png")
    before = {path: path.read_bytes() for path in photos.iterdir()}
    words = [photos, "--frcnn", runs["frcnn"], "--yolov3", runs["yolov3"], "--out"]
    assert "pictures/a.png: is one of the files to read" in error_of(capsys, *words, tmp_path)
    assert "1 of 4 files could not be read" in error_of(capsys, *words, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["photographs"]
    assert [Path(photo["file_name"]).name for photo in found] == ["a.png", "b.png", "thin.png"]
    assert all((tmp_path / "out" / photo["picture"]).is_file() for photo in found)
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_a_split_gives_the_errors_and_the_ap_of_the_evaluation(runs, tmp_path, capsys):
    main(
        ["--frcnn", str(runs["frcnn"]), "--yolov3", str(runs["same classes"]), "--score", "0.9", "--out", str(tmp_path)]
    )
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert (errors["split"], errors["photographs"]) == ("voc_test", 4)
    table = pd.read_csv(tmp_path / "errors.csv", index_col="error")
    for name, weights in (("Faster R-CNN", runs["frcnn"]), ("YOLOv3", runs["same classes"])):
        assert errors[name]["ap50"] == pytest.approx(ap50_of_evaluation(weights), abs=1e-6)
        assert errors[name]["ap50"] > 0
        assert table[name].to_dict() == errors[name]["count"]
        assert table[f"{name} cost"].to_dict() == pytest.approx(errors[name]["cost"], abs=1e-4)
    assert sum(sum(errors[name]["count"].values()) for name in ("Faster R-CNN", "YOLOv3")) > 0
    assert (tmp_path / "errors.png").stat().st_size > 5000
    figures = json.loads((tmp_path / "comparison.json").read_text())["ap50"]
    ap50 = [errors[name]["ap50"] for name in ("Faster R-CNN", "YOLOv3")]
    assert [figures[name]["ap50"] for name in ("Faster R-CNN", "YOLOv3")] == ap50
    difference, (low, high) = figures["difference"].values()
    assert difference == ap50[0] - ap50[1] and low < difference < high
    printed = capsys.readouterr().out
    assert "voc_test" in printed
    assert f" by {100 * abs(difference):.1f} ± {50 * (high - low):.1f} points of AP50" in printed


def test_a_class_of_other_words_is_the_same(data, make_detector, tmp_path):
    """As COCO's words are for what VOC's say: equal weights are equally good, whatever their classes are called."""
    renamed = shutil.copytree(data, tmp_path / "data")
    (renamed / "labels.txt").write_text("sofa\ntvmonitor\n")
    for path in (renamed / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace(">red<", ">sofa<").replace(">blue<", ">tvmonitor<"))
    ours = make_detector(tmp_path / "ours", "yolov3_tiny", ["sofa", "tvmonitor"], renamed)
    others = make_detector(tmp_path / "others", "yolov3_tiny", ["couch", "TV"], renamed)
    words = ["--frcnn", str(others), "--yolov3", str(ours), "--score", "0.2", "--out", str(tmp_path / "out")]
    main(words)
    errors = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert errors["YOLOv3 1"] == errors["YOLOv3 2"] and errors["YOLOv3 1"]["ap50"] > 0
    main([*words[:-1], str(tmp_path / "photo"), str(renamed / "JPEGImages" / "0.png")])
    for out in ("out", "photo"):
        photographs = json.loads((tmp_path / out / "comparison.json").read_text())["photographs"]
        assert {pair["agreement"] for photo in photographs for pair in photo["objects"]} == {"both"}
        assert all(("picture" in photo) == (out == "photo") for photo in photographs)  # of a split where they differ


def test_who_is_ahead_is_said_with_the_interval_of_the_difference():
    """Both are spread by 20 points, but together: their difference is spread by 1.6."""
    photographs, rest = np.linspace(0.5, 0.7, 1001), np.linspace(0.012, 0.028, 1001)
    resampled = {"a": photographs, "b": photographs + np.random.default_rng(0).permutation(rest)}
    figures, sentence = compare_ap50({"a": 0.60, "b": 0.62}, resampled)
    assert sentence.startswith("b is ahead of a by 2.0 ± 0.8 points of AP50") and "chance" not in sentence
    assert figures["a"]["interval"] == pytest.approx((0.505, 0.695))
    assert figures["difference"]["interval"] == pytest.approx((-0.0276, -0.0124))
    _, sentence = compare_ap50({"a": 0.60, "b": 0.62}, {"a": photographs, "b": photographs[::-1]})
    assert sentence.startswith("b is ahead of a by 2.0 ± 19.0 points") and sentence.endswith("that may be chance")


def test_a_limit_takes_the_same_photographs_each_time_and_two_of_a_kind_are_numbered(runs, tmp_path):
    chosen = []
    for number in range(2):
        out = tmp_path / str(number)
        weights = ["--frcnn", str(runs["same classes"]), "--yolov3", str(runs["yolov3"])]
        main([*weights, "--split", "voc_trainval", "--limit", "1", "--score", "0.2", "--out", str(out)])
        content = json.loads((out / "comparison.json").read_text())
        assert list(content["weights"]) == ["YOLOv3 1", "YOLOv3 2"]
        chosen.append([photo["file_name"] for photo in content["photographs"]])
        for photo in content["photographs"]:  # they agree on some objects, and differ in others, which are shown
            assert {"both", "only YOLOv3 2"} <= {pair["agreement"] for pair in photo["objects"]}
            assert "picture" in photo
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 1


def test_without_weights_the_newest_runs_are_taken(runs, tmp_path, capsys):
    draw_photograph(tmp_path / "photo.png", 0)
    output = runs["frcnn"].parents[1]
    words = ["--recipe", "best", "--output", str(output), "--out", str(tmp_path / "out")]
    main([str(tmp_path / "photo.png"), *words])
    weights = json.loads((tmp_path / "out" / "comparison.json").read_text())["weights"]
    assert weights == {"Faster R-CNN": str(runs["frcnn"]), "YOLOv3": str(runs["yolov3"])}
    os.utime(runs["same classes"])
    main([str(tmp_path / "photo.png"), *words[2:]])  # of any recipe, and of a name of one's own
    weights = json.loads((tmp_path / "out" / "comparison.json").read_text())["weights"]
    assert weights == {"Faster R-CNN": str(runs["frcnn"]), "YOLOv3": str(runs["same classes"])}


def test_what_is_missing_or_does_not_fit_is_told_in_one_line(runs, tmp_path, capsys, data):
    photo = tmp_path / "photo.png"
    draw_photograph(photo, 0)
    empty = tmp_path / "no runs"
    line = error_of(capsys, photo, "--frcnn", runs["frcnn"], "--output", empty)
    assert "no trained YOLOv3" in line and "make train-yolov3" in line and "R-CNN" not in line
    line = error_of(capsys, photo, "--output", empty)
    assert "make train-frcnn train-yolov3" in line and "FRCNN=weights YOLOV3=weights" in line

    both = ("--frcnn", runs["frcnn"], "--yolov3", runs["yolov3"], "--out", tmp_path / "out")
    assert "expected either" in error_of(capsys, photo, "--split", "voc_test", *both)
    assert error_of(capsys, "--score", 50, *both) == "error: SCORE=50: expected a number from 0 to 1"
    assert "LIMIT=0" in error_of(capsys, "--limit", 0, *both)
    shutil.copytree(data, tmp_path / "empty")
    for number in "234":  # all of the split but one, which is not the one that is chosen
        path = tmp_path / "empty" / "Annotations" / f"{number}.xml"
        path.write_text(re.sub("<object>.*</object>", "", path.read_text(), flags=re.DOTALL))
    assert "show no object" in error_of(capsys, "--data", tmp_path / "empty", "--limit", 1, *both)
    assert "('voc_dev',)" in error_of(capsys, "--split", "voc_dev", *both)
    assert "no such file" in error_of(capsys, tmp_path / "none.jpg", *both)
    photo.write_bytes(b"no image")
    assert "none of the 1 files could be read" in error_of(capsys, photo, *both)

    stranger = ("--frcnn", runs["frcnn"], "--yolov3", runs["other data"], "--out", tmp_path / "out")
    assert "DATA=" in error_of(capsys, *stranger)
    assert "knows none of the classes" in error_of(capsys, "--data", data, *stranger)
