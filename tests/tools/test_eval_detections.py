"""Scoring a file of detections from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_eval

from common.errors import UserError
from detection.detection_files import read_detections
from detection.evaluation import WRITTEN
from detection.voc import VOC_CLASSES
from tools.eval_detections import main

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"image_id": "000001", "category": "dog", "bbox": [10, 20, 30, 40], "score": 0.9}
UNNAMED = {key: value for key, value in GOOD.items() if key != "category"}


def write_voc(folder: Path, images: dict[str, list[tuple]]) -> None:
    """A VOC-layout folder with a test split: image id -> (class, xmin, ymin, xmax, ymax, difficult), from 1."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(images))
    for image_id, objects in images.items():
        cv2.imwrite(str(folder / "JPEGImages" / f"{image_id}.jpg"), np.zeros((100, 200, 3), np.uint8))
        lines = [
            f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
            f"<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, x0, y0, x1, y1, difficult in objects
        ]
        (folder / "Annotations" / f"{image_id}.xml").write_text(
            "<annotation><size><width>200</width><height>100</height><depth>3</depth></size>"
            f"{''.join(lines)}</annotation>"
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data root")
    images = {
        "000001": [("dog", 11, 21, 40, 60, 0), ("cat", 101, 1, 200, 100, 0)],
        "000002": [("dog", 1, 1, 50, 50, 0), ("dog", 60, 1, 100, 50, 1)],
        "000003": [],
    }
    write_voc(root / "VOC2007", images)
    return root


def run(data: Path, path: Path, entries: object, *options: str) -> None:
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    main([str(path), "--split", "voc07_test", "--data", str(data), *options])


def test_scores_a_file_end_to_end(data: Path, tmp_path: Path):
    detections = tmp_path / "mine.json"
    detections.write_text(
        json.dumps(
            [
                GOOD,  # the dog of image 1, exactly
                {"image_id": "000003", "category": "dog", "bbox": [0, 0, 9, 9], "score": 0.8},  # nothing there
                {"image_id": "000002", "category_id": 12, "bbox": [59, 0, 41, 50], "score": 0.7},  # a difficult dog
                {"image_id": "000002", "category_id": 12, "bbox": [0, 0, 50, 50], "score": 0.6},  # the other dog
                {"image_id": "000001", "category": "cat", "bbox": [0, 0, 9, 0.0], "score": -1},  # wrong and empty
            ]
        )
    )
    command = [sys.executable, "-m", "tools.eval_detections", detections, "--split", "voc07_test", "--data", data]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    dog = {"gts": 2, "dets": 4, "recall": 1.0, "AP50_11point": (6 + 5 * 2 / 3) / 11, "AP50": 5 / 6}
    dog |= {"F1": 0.8, "threshold": 0.6}
    assert content["per_class"]["dog"] == pytest.approx(dog)
    assert content["per_class"]["cat"] == {
        "gts": 1, "dets": 1, "recall": 0.0, "AP50_11point": 0.0, "AP50": 0.0, "F1": 0.0, "threshold": None
    }  # fmt: skip
    assert content["per_class"]["sofa"]["AP50"] is None
    # The mean is over the two classes that have objects.
    means = {"AP50_11point": dog["AP50_11point"] / 2, "AP50": 5 / 12, "AP75": 5 / 12, "AP": 5 / 12}
    assert {key: content[key] for key in means} == pytest.approx(means)
    assert "5 detections on voc07_test, 3 images" in done.stdout and "sample" not in done.stdout
    mean = next(line for line in done.stdout.splitlines() if "mAP" in line)
    assert mean.replace("|", " ").split() == [
        "mAP",
        "-",
        "-",
        "-",
        "0.424",
        "0.417",
        "0.417",
        "0.417",
        "0.667",
        "0.600",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", *WRITTEN}


def test_out_names_the_folder_of_the_results(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run(data, tmp_path / "d.json", [], "--out", str(tmp_path / "a" / "b"))
    assert json.loads((tmp_path / "a" / "b" / "evaluation.json").read_text())["AP50"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"d.json", "a"}
    assert str(tmp_path / "a" / "b") in capsys.readouterr().out


def test_intervals_are_there_where_they_are_asked_for(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run(data, tmp_path / "d.json", [GOOD])
    assert "intervals" not in json.loads((tmp_path / "evaluation.json").read_text())
    run(data, tmp_path / "d.json", [GOOD], "--interval")
    content = json.loads((tmp_path / "evaluation.json").read_text())
    printed = capsys.readouterr().out
    for metric in ("AP50_11point", "AP50"):
        low, high = content["intervals"][metric]
        assert 0 <= low <= content[metric] <= high <= 1
        assert printed.count(f"{metric}: 95 % interval {low:.3f} to {high:.3f}") == 1


def test_a_folder_with_classes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_voc(tmp_path / "own", {"x": [("crab", 1, 1, 50, 50, 0)]})
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"image_id": "x", "category": "crab", "bbox": [0, 0, 50, 50], "score": 1}]))
    (tmp_path / "own/ImageSets/Main/train.txt").write_text("x\n")
    main([str(path), "--data", str(tmp_path / "own")])  # no split named: the root's own test split
    assert "voc_test" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation.json").read_text())["per_class"] == {
        "crab": {"gts": 1, "dets": 1, "recall": 1.0, "AP50_11point": 1.0, "AP50": 1.0, "F1": 1.0, "threshold": 1.0}
    }


def test_coordinates_and_scores_are_read_exactly(tmp_path: Path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD | {"bbox": [0.1, 2, 0.2, 3.5], "score": 1 / 3}, GOOD | {"score": 2}]))
    detections = read_detections(path, [{"image_id": "x"}, {"image_id": "000001"}], ["cat", "dog"])
    assert detections.box.tolist() == [[0.1, 2, 0.1 + 0.2, 5.5], [10, 20, 40, 60]]
    assert detections.score.tolist() == [1 / 3, 2]
    assert detections.image.tolist() == detections.category.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ("[{", "not a JSON file"),
        ({"annotations": []}, "expected a JSON list"),
        ([GOOD, 3], "entry 1 (counted from 0): is 3"),
        ([GOOD, GOOD | {"image_id": "9"}], 'entry 1 (counted from 0): image_id "9" is not in the split'),
        ([GOOD | {"image_id": 4}], 'image_id 4 is not in the split, expected one such as "000001"; ANNOTATIONS='),
        ([GOOD | {"image_id": True}], "image_id true is not in the split"),
        ([GOOD | {"category": "wolf"}], 'category "wolf" is unknown, expected one of aeroplane,'),
        ([GOOD | {"category": ["dog"]}], 'category ["dog"] is unknown'),
        ([UNNAMED | {"category_id": 0}], "category_id 0 is unknown, expected 1 to 20"),
        ([UNNAMED | {"category_id": True}], "category_id true"),
        ([UNNAMED], "no 'category' and no 'category_id'"),
        *(([{k: v for k, v in GOOD.items() if k != key}], f"has no '{key}'") for key in ("image_id", "bbox", "score")),
        ([GOOD | {"bbox": [0, 0, 1]}], "bbox [0, 0, 1], expected four finite numbers"),
        ([GOOD | {"bbox": [0, 0, float("inf"), 1]}], "bbox [0, 0, Infinity, 1], expected four finite numbers"),
        ([GOOD | {"bbox": [0, 0, "5", 1]}], "expected four finite numbers"),
        ([GOOD | {"bbox": [50, 50, -10, 20]}], "has a negative size"),
        ([GOOD | {"score": float("nan")}], "score NaN, expected a finite number"),
        ([GOOD | {"score": 10**400}], "expected a finite number"),
        ([GOOD | {"score": None}], "score null, expected a finite number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, entries: object, found: str
):
    with pytest.raises(SystemExit) as exit_:
        run(data, tmp_path / "wrong.json", entries)
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.err.startswith(f"error: {tmp_path / 'wrong.json'}: ") and found in printed.err
    assert printed.err.count("\n") == 1 and len(printed.err) < 500
    assert not (tmp_path / "evaluation.json").exists()


def test_missing_files_splits_and_folders_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "d.json"
    path.write_text("[]")
    for arguments, found in (
        ([str(tmp_path / "none.json"), "--data", str(data), "--split", "voc07_test"], "none.json: No such file"),
        ([str(path), "--data", str(tmp_path / "nowhere")], "nowhere: no such folder"),
        ([str(path), "--data", str(data), "--split", "voc_2007_test"], "no split 'voc_2007_test', expected one of voc"),
        ([str(path), "--data", str(data), "--split", "voc07_val"], "val.txt"),
        ([str(path), "--data", str(data), "--split", "voc07_test", "--out", str(path / "x")], "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and found in error and error.count("\n") == 1


def test_detections_are_not_overwritten_by_what_they_score(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "evaluation.json"
    path.write_text("[]")
    words = [str(path), "--data", str(data), "--split", "voc07_test"]
    with pytest.raises(SystemExit):
        main(words)
    assert f"error: {path}: would be overwritten by the results" in capsys.readouterr().err
    assert path.read_text() == "[]"
    main([*words, "--out", str(tmp_path / "results")])


def test_results_of_a_run_are_not_overwritten_by_those_of_another_split(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "environment.json").write_text("[]")
    (tmp_path / "detections.json").write_text("[]")
    words = [str(tmp_path / "detections.json"), "--data", str(data), "--split", "voc07_test"]
    with pytest.raises(SystemExit):
        main(words)
    assert f"error: {tmp_path}: holds results of a run" in capsys.readouterr().err
    main([*words, "--out", str(tmp_path / "results")])


FOUND = [  # image, class, score, x0, y0, x1, y1
    ("000001", "dog", 0.9, 10, 20, 40, 60),
    ("000002", "dog", 0.8, 60, 60, 80, 80),
    ("000002", "dog", 0.75, 0, 0, 50, 48),
    ("000001", "cat", 0.5, 100, 0, 200, 90),
]
# By hand: of two dogs the first and the third detection find one each; the one cat is found by a box of IoU 0.9.
DOG = {"gts": 2, "dets": 3, "recall": 1.0, "AP50_11point": (6 + 5 * 2 / 3) / 11, "AP50": 5 / 6}
CAT = {"gts": 1, "dets": 1, "recall": 1.0, "AP50_11point": 1.0, "AP50": 1.0}


def coco_entries(image_ids: dict[str, int], category_ids: dict[str, int]) -> list[dict]:
    return [
        {"image_id": image_ids[i], "category_id": category_ids[c], "score": s, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for i, c, s, x0, y0, x1, y1 in FOUND
    ]


def assert_found(folder: Path) -> None:
    per_class = json.loads((folder / "evaluation.json").read_text())["per_class"]
    for name, expected in (("dog", DOG), ("cat", CAT)):
        assert {key: per_class[name][key] for key in expected} == pytest.approx(expected)
    assert {name for name, row in per_class.items() if row["dets"]} == {"dog", "cat"}


def test_numbers_of_images_are_their_names_or_those_of_cocos_annotations(data: Path, tmp_path: Path):
    run(data, tmp_path / "a.json", coco_entries({"000001": 1, "000002": 2}, {"dog": 12, "cat": 8}))
    assert_found(tmp_path)
    coco = {
        "images": [{"id": 1, "file_name": "000002.jpg"}, {"id": 77, "file_name": "test/000001.jpg"}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}, {"id": 1, "name": "tapir"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    entries = coco_entries({"000001": 77, "000002": 1}, {"dog": 90, "cat": 3})
    run(data, tmp_path / "b.json", entries, "--annotations", f"{tmp_path}/coco.json", "--out", f"{tmp_path}/b")
    assert_found(tmp_path / "b")


def test_a_number_that_two_names_share_is_refused(tmp_path: Path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD | {"image_id": 12}]))
    assert read_detections(path, [{"image_id": "x"}, {"image_id": "1_2"}], ["dog"]).image.tolist() == [1]
    with pytest.raises(UserError, match="image_id 12 is not in the split"):
        read_detections(path, [{"image_id": "1_2"}, {"image_id": "012"}], ["dog"])


def test_a_folder_of_yolo_is_scored(data: Path, tmp_path: Path):
    for image, name, score, x0, y0, x1, y1 in FOUND:
        shares = (x0 + x1) / 2 / 200, (y0 + y1) / 2 / 100, (x1 - x0) / 200, (y1 - y0) / 100
        with (tmp_path / f"{image}.txt").open("a") as file:
            print({"dog": 11, "cat": 7}[name], *shares, score, file=file)
    main([str(tmp_path), "--split", "voc07_test", "--data", str(data)])
    assert_found(tmp_path)


def test_images_in_folders_are_known_by_their_names(tmp_path: Path):
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.25 0.5 0.9\n\n")
    records = [{"image_id": f"test/{name}", "width": 40, "height": 80} for name in "ba"]
    detections = read_detections(tmp_path, records, ["dog"])
    assert detections.image.tolist() == [1] and detections.box.tolist() == [[15, 20, 25, 60]]


def test_a_submission_is_written_as_voc_has_it_and_read_again(data: Path, tmp_path: Path):
    run(data, tmp_path / "a.json", coco_entries({"000001": 1, "000002": 2}, {"dog": 12, "cat": 8}), "--submission")
    folder = tmp_path / "submission"
    # The image, the score, and pixels from 1, the last one included.
    assert (folder / "comp4_det_test_cat.txt").read_text() == "000001 0.5 101 1 200 90\n"
    assert (folder / "comp4_det_test_sofa.txt").read_text() == ""
    assert len(list(folder.iterdir())) == 20 and not (tmp_path / "evaluation.json").exists()
    main([str(folder), "--split", "voc07_test", "--data", str(data), "--out", f"{tmp_path}/again"])
    assert_found(tmp_path / "again")


def test_a_class_that_cannot_name_a_file_is_not_submitted(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/test.txt").write_text("a\n")
    (tmp_path / "labels.txt").write_text("cup/mug\n")
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "d.json"), "--split", "voc_test", "--data", str(tmp_path), "--submission"])
    assert "class 'cup/mug', expected a name without /" in capsys.readouterr().err
    assert not (tmp_path / "submission").exists()


def test_detectron2_scores_the_submission_alike(data: Path, tmp_path: Path):
    run(data, tmp_path / "a.json", coco_entries({"000001": 1, "000002": 2}, {"dog": 12, "cat": 8}), "--submission")
    year = data / "VOC2007"
    for name, expected in (("dog", DOG), ("cat", CAT)):
        files = str(tmp_path / "submission/comp4_det_test_{}.txt"), str(year / "Annotations/{}.xml")
        recall, _, ap = voc_eval(*files, str(year / "ImageSets/Main/test.txt"), name, ovthresh=0.5, use_07_metric=False)
        assert (recall[-1], ap) == pytest.approx((expected["recall"], expected["AP50"]))


def test_a_class_of_several_words_and_a_box_without_width_are_read(tmp_path: Path):
    (tmp_path / "comp4_det_test_traffic_light.txt").write_text("a 0.5 11 21 10 60\n")
    detections = read_detections(tmp_path, [{"image_id": "a"}], ["traffic_light"])
    assert detections.box.tolist() == [[10, 20, 10, 60]]


def test_a_split_without_annotations_can_be_submitted(tmp_path: Path):
    (tmp_path / "VOC2012/ImageSets/Main").mkdir(parents=True)
    (tmp_path / "VOC2012/ImageSets/Main/test.txt").write_text("2008_000001\n2008_000004\n")
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD | {"image_id": 2008000004}]))
    main([str(path), "--split", "voc12_test", "--data", str(tmp_path), "--submission"])
    dogs = tmp_path / "submission" / "comp4_det_test_dog.txt"
    assert dogs.read_text() == "2008_000004 0.9 11 21 40 60\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no .txt in it"),
        ({"000009.txt": ""}, "000009.txt: no image of the split has this name"),
        ({"000001.txt": "11 0.5 0.5 0.1 0.1"}, "000001.txt: line 1: 5 words; expected class x y width height score"),
        ({"000001.txt": "20 0.5 0.5 0.1 0.1 1"}, "class 20 is unknown, expected 0 to 19"),
        ({"000001.txt": "\n11 0.5 nan 0.1 0.1 1"}, "line 2: nan is no finite number"),
        ({"000001.txt": "11 0.5 0.5 -0.1 0.1 1"}, "line 1: a box of negative size"),
        ({"000001.txt": b"\xff\xfe"}, "000001.txt: cannot be read"),
        ({"comp4_det_test_dog.txt": "000009 1 1 1 2 2"}, "no file of the class 'aeroplane'"),
        ({"comp4_det_test_aeroplane.txt": "000009 1 1 1 2 2"}, "line 1: image '000009' is not in the split"),
        ({"comp4_det_test_wolf.txt": ""}, "comp4_det_test_wolf.txt: no class of the data"),
        ({"comp3_det_test_dog.txt": "", "comp4_det_test_dog.txt": ""}, "dog.txt: a second file of its class"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, files: dict[str, str | bytes], found: str
):
    if "comp4_det_test_aeroplane.txt" in files:
        files = {f"comp4_det_test_{name}.txt": "" for name in VOC_CLASSES} | files
    for name, text in files.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path), "--split", "voc07_test", "--data", str(data)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and found in error and error.count("\n") == 1


def test_wrong_annotations_of_coco_are_told_in_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for text, found in (("[]", "expected COCO's annotations"), ("{", "not a JSON file")):
        (tmp_path / "coco.json").write_text(text)
        with pytest.raises(SystemExit) as exit_:
            run(data, tmp_path / "d.json", [GOOD], "--annotations", f"{tmp_path}/coco.json")
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and found in error and error.count("\n") == 1
