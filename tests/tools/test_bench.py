"""Each benchmark at a toy size: rows and figures are there. No test asks how fast anything is."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

from classification.cub import read_cub
from common.errors import UserError
from common.weights import save_checkpoint
from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
from detection.voc import VOC_CLASSES
from detection.yolov3.targets import assign_targets
from tests.birds import draw_birds
from tools import predict
from tools.bench import busy, classification, faster_rcnn, pipeline, rivals, timing, training_images, voc, yolov3
from tools.bench.__main__ import main
from tools.bench.rivals import MISSING
from tools.bench.runs import save_resnet18
from tools.bench.timing import Contender, at_precision, in_turn, rows

MISSING_GPU = "not measured: none here"
ANNOTATION = """<annotation><size><width>96</width><height>64</height><depth>3</depth></size><object><name>dog</name>
<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>{ymin}</ymin><xmax>70</xmax><ymax>60</ymax></bndbox></object></annotation>"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("trainval", "test"):
        ids = [f"{split}{number}" for number in range(4)]
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids))
        for ymin, image_id in enumerate(ids, start=5):
            Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / f"JPEGImages/{image_id}.jpg")
            (folder / "Annotations" / f"{image_id}.xml").write_text(ANNOTATION.format(ymin=ymin))
    # Of float coordinates, which Detectron2's evaluator does not read.
    (folder / "Annotations" / "trainval0.xml").write_text(ANNOTATION.format(ymin=5.5))
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def assert_compares(table: pd.DataFrame, by: list[str]) -> None:
    """All do the same, ours first."""
    assert table["by"].tolist() == by and table["what"].nunique() == 1
    assert (table["s"] > 0).all() and (table["± %"] >= 0).all()
    ratio = table["s"] / table["s"].iloc[0]
    pd.testing.assert_series_equal(table["times as fast"][1:], ratio[1:], check_names=False)
    assert (table["threads"] >= 1).all()


@pytest.fixture(autouse=True)
def nothing_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)


def test_contenders_take_turns() -> None:
    calls = []
    contenders = [Contender(name, lambda name=name: calls.append(name)) for name in "abc"]
    seconds = in_turn(contenders, 2)
    assert "".join(calls) == "abcabcabc"
    assert [len(times) for times in seconds] == [3, 3, 3]


def test_short_runs_are_repeated_in_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = 0.0, []

    def work(name: str, seconds: float) -> None:
        nonlocal clock
        clock += seconds
        calls.append(name)

    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.5)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    contenders = [Contender("a", lambda: work("a", 0.125)), Contender("b", lambda: work("b", 0.75))]
    assert in_turn(contenders, 2) == [[0.125] * 3, [0.75] * 3]
    assert "".join(calls) == "ab" + "a" + "aaaab" * 2  # once each, once to see how long, then the turns


def test_median_spread_and_ratio_by_hand() -> None:
    contenders = [Contender("ours", print, "bfloat16", 2), *(Contender(name, print, "float32") for name in "xyz")]
    seconds = [[2.0, 1.8, 2.2], [5.0, 4.0, 4.0], [1.0, 1.0, 1.0], [2.09, 2.09, 2.09]]
    ours, x, y, z = rows("job", contenders, seconds, images=4)
    assert {key: ours.pop(key) for key in ("s", "± %", "images/s")} == pytest.approx({"s": 2, "± %": 10, "images/s": 2})
    assert ours == {"what": "job", "by": "ours", "precision": "bfloat16", "threads": 2}
    assert x == {"what": "job", "by": "x", "precision": "float32", "threads": 1} | {
        "s": 4.0, "± %": 12.5, "images/s": 1.0, "times as fast": 2.0, "ours is": "faster"
    }  # fmt: skip
    assert (y["times as fast"], y["ours is"]) == (0.5, "slower")
    assert (z["times as fast"], z["ours is"]) == (pytest.approx(1.045), "noise")


def test_a_rival_at_our_precision_is_a_copy_that_computes_in_it() -> None:
    model = torch.nn.Conv2d(2, 3, 1)
    assert at_precision(model, "float32", "cpu") is model
    image = torch.rand(1, 2, 4, 4)
    low = at_precision(model, "bfloat16", "cpu")
    assert low(image).dtype == torch.bfloat16 and model(image).dtype == torch.float32
    torch.testing.assert_close(low(image).float(), model(image), atol=0.02, rtol=0.02)
    assert low.weight is not model.weight


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the rows of a GPU too")
def test_faster_rcnn_speed(root: Path) -> None:
    table = faster_rcnn.speed(root, size=(32, 48), rounds=1)
    ours = table["precision"][0]
    rivals = ["float32"] * 2 if ours == "float32" else ["float32"] * 2 + [ours] * 2
    contenders = 1 + len(rivals)
    for part, count in ((table[:contenders], 1), (table[contenders:-1], 2)):
        assert_compares(part, ["ours", *["stock Detectron2", "torchvision"] * (len(rivals) // 2)])
        assert part["precision"].tolist() == [ours, *rivals]
        np.testing.assert_allclose(part["images/s"], count / part["s"])
    assert table["by"].tolist()[-1:] == [MISSING_GPU]


def test_the_three_networks_are_the_same(root: Path) -> None:
    samples = faster_rcnn.read_samples(root, 2, (64, 96))
    ours, stock, rival = (each.model for each in faster_rcnn.build_detectors(samples, "cpu")[:3])
    for name, value in ours.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name]), name
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, stock, rival)]
    assert counts[0] == counts[1]
    # Torchvision predicts one box more, that of the background, and has BatchNorm's constants in no parameter either.
    assert counts[2] - counts[0] == 4 * (1024 + 1)
    image = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        bottom_up = stock.eval().backbone.bottom_up(image)
        body = rival.eval().backbone.body(image)
    for mine, theirs in zip(bottom_up.values(), body.values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_faster_rcnn_accuracy(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "make train-frcnn" in faster_rcnn.accuracy(root)["what"][0]

    cfg = get_cfg()
    for name in ("faster_rcnn_R_50_FPN", "Sample-faster_rcnn"):
        merge_file(cfg, CONFIGS / f"{name}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CLASSES = list(VOC_CLASSES)
    run = tmp_path / "output" / "faster_rcnn_R_50_FPN-sample"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(cfg.dump())
    save_checkpoint(run / "model_best.pth", {"model": build_model(cfg).state_dict()})
    table = faster_rcnn.accuracy(root)
    assert table["what"].tolist() == ["AP50_11point", "AP50", "AP75", "AP"]
    assert table["ours"].between(0, 100).all()
    pd.testing.assert_series_equal(table["difference"], table["ours"] - table["stock Detectron2"], check_names=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the rows of a GPU too")
def test_yolov3_speed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolov3, "has_ultralytics", lambda: False)  # tests download nothing
    table = yolov3.speed(root, size=64, rounds=1)
    assert_compares(table[:2], ["ours", "OpenCV"])
    assert table["by"].tolist()[2:] == [f"not measured: {MISSING}", "ours", f"not measured: {MISSING}", MISSING_GPU]


def test_opencv_computes_our_yolov3(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolov3, "has_ultralytics", lambda: False)
    samples = yolov3.read_samples(root, 4, (96, 96))
    ours, opencv = yolov3.build_detectors(samples, "cpu", tmp_path)
    (found,) = ours.detect(samples[:1])
    ((_, scores, _),) = opencv.detect(samples[:1])
    assert len(scores)
    assert found["instances"].scores.max().item() == pytest.approx(float(np.max(scores)), abs=0.05)  # bfloat16


def test_the_loop_over_objects_assigns_the_same_targets() -> None:
    scenes = yolov3.random_scenes(3, 30)
    ours = assign_targets(*scenes)
    classes, ignored = yolov3.assign_in_a_loop(*scenes)
    assert ignored.any()
    assert torch.equal(ours.ignored, ignored)
    places = zip(ours.images.tolist(), ours.predictions.tolist(), strict=True)
    assert dict(zip(places, ours.classes.tolist(), strict=True)) == classes
    assert_compares(yolov3.targets(Path(), images=2, objects=3, rounds=1), ["ours", "a loop over objects"])


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to train on for a batch of timm's script, 128."""
    return draw_birds(tmp_path_factory.mktemp("data"), train=26, test=8)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (classification.OURS, ""),
        (classification.PLAIN, "float32"),
        (classification.PLAIN, "bfloat16"),
        (classification.TIMM, "bfloat16"),
    ],
)
def test_contenders_of_classification_train(birds: Path, name: str, precision: str) -> None:
    cub = read_cub(birds)
    training = classification.build(name, precision, cub.train, len(cub.class_names), 32, 0.02)
    before = training.model.fc.weight.clone()
    assert 0 <= training.epoch() <= 100
    assert not torch.equal(training.model.fc.weight, before)
    measured = training.accuracy(cub.test, 32)
    assert 0 <= measured["test top-1, %"] <= measured["test top-5, %"] == 100  # of five classes


def test_voc_loader(root: Path) -> None:
    table = voc.loader(root, images=6, rounds=1)
    assert_compares(table[:2], ["ours", "stock Detectron2"])
    assert table["what"].iloc[2] == "the same again, from the cache" and table["s"].iloc[2] > 0


def test_voc_evaluator(root: Path) -> None:
    table = voc.evaluator(root, images=9, detections=5, rounds=1)
    assert_compares(table[:2], ["ours, all figures", "stock Detectron2, AP alone"])
    assert table["what"].tolist()[2:] == ["1000 resamples of 9 images of 5 detections"] and table["s"][2] > 0


def test_random_detections_find_objects(root: Path) -> None:
    records = [{"width": 96, "height": 64, "annotations": [{"bbox": [10, 4, 70, 60], "category_id": 11}]}] * 2
    records.append({"width": 96, "height": 64, "annotations": []})
    outputs = voc.random_detections(records, 300)
    right = [(output.pred_classes == 11).float().mean() for output in outputs]
    assert right[0] > 0.25 and right[1] > 0.25 and right[2] < 0.15
    assert all((output.pred_boxes.area() > 0).float().mean() > 0.9 for output in outputs)


def test_training_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_images, "has_ultralytics", lambda: False)
    table = training_images.training_images(root, images=2, rounds=1, large=(300, 400), size=(32, 48))
    reference = ["ours", "torchvision's reference"]
    for start, by in ((0, [*reference, "stock Detectron2"]), (6, reference)):
        photographs, large = table[start : start + len(by)], table[start + len(by) : start + 2 * len(by)]
        assert_compares(photographs, by)
        assert_compares(large, by)
        assert (large["MB"] >= 0).all()
    assert table["images/s"][10] > 0


def test_pipeline(root: Path, make_detector, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_tiny(root: Path, folder: Path) -> None:
        make_detector(folder, "yolov3_tiny", pipeline.CLASSES, root)

    monkeypatch.setattr(pipeline, "NETWORKS", {"ResNet-18": (save_resnet18, 256), "YOLOv3": (save_tiny, 64)})
    drawn = []
    monkeypatch.setattr(predict, "draw", lambda picture, prediction, colors: drawn.append(prediction) or picture.pixels)
    table = pipeline.pipeline(root, most=3, rounds=1).rename(columns={"times the network": "times as fast"})
    ways = ["the network alone", "make predict", "make predict DRAW=0", "make eval"]
    assert_compares(table[:4], ways)
    assert_compares(table[4:].reset_index(), ways)
    assert len(drawn) == 2 * 2 * 3  # networks, rounds, photographs
    assert sum(map(len, drawn[:6])) == sum(map(len, drawn[6:])) == 2 * 3 * pipeline.DRAWN


def test_pictures_of_the_pipeline_are_annotated(root: Path, tmp_path: Path) -> None:
    """Boxes of 96 x 64 pixels at 640 x 480, 20/3 and 7.5 times as large."""
    (path,) = pipeline.write_photographs(root, tmp_path, 1)
    assert Image.open(path).size == (640, 480)
    box = ElementTree.parse(tmp_path / "Annotations" / f"{path.stem}.xml").find("object/bndbox")
    assert box is not None
    sides = [float(box.findtext(side) or "") for side in ("xmin", "ymin", "xmax", "ymax")]
    assert sides == [67.67, 31, 466.67, 450]


def test_the_memory_of_a_run_is_measured() -> None:
    assert training_images.peak_megabytes(lambda: np.ones(10**7)) == pytest.approx(80, rel=0.2)
    assert training_images.peak_megabytes(lambda: None) < 5


def test_a_measured_run_does_not_wait_for_threads_that_it_has_not() -> None:
    """OpenMP would wait for ever for those that this process has and a forked one lacks."""

    def run() -> None:
        assert torch.get_num_threads() == 1

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert training_images.peak_megabytes(run) < 5
        with pytest.raises(EOFError):  # what a run that ends early leaves
            training_images.peak_megabytes(lambda: os._exit(1))
    finally:
        torch.set_num_threads(before)


def test_command_line(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    # Data that is missing stops its own benchmark, not the one after it.
    monkeypatch.setattr(sys, "argv", ["bench", "classification", "faster_rcnn_accuracy", "--data", str(root)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert torch.__version__ in printed.out and str(root) in printed.out and "GFLOP/s in float32" in printed.out
    assert stopped.value.code == 2 and "classification: not measured for want of data" in printed.err
    assert printed.out.index("## classification\n\nnot measured: ") < printed.out.index("make train-frcnn")

    monkeypatch.setattr(sys, "argv", ["bench", "nonsense"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2


def test_ultralytics_is_asked_for_and_held_against_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def install(command: list[str], check: bool) -> subprocess.CompletedProcess:
        calls.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(rivals, "has_ultralytics", lambda: False)
    monkeypatch.setattr(rivals.subprocess, "run", install)
    path = list(sys.path)
    with rivals.fetched_ultralytics(agreed=False):  # the input of tests is no terminal
        assert not calls
    monkeypatch.setattr(sys, "stdin", Mock(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: "n")
    with rivals.fetched_ultralytics(agreed=False):
        assert not calls
    monkeypatch.setattr("builtins.input", lambda _: "Y")
    with rivals.fetched_ultralytics(agreed=False):
        ((command, requirements),) = calls
    assert {"--require-hashes", "--no-deps"} < set(command)
    assert re.fullmatch(r"ultralytics==[\d.]+ --hash=sha256:[0-9a-f]{64}\n", requirements)
    assert sys.path == path  # pip has failed


def test_a_busy_process_runs_as_long_as_it_is_wanted() -> None:
    def children() -> list[psutil.Process]:
        return psutil.Process().children()

    before = children()
    seconds = busy.measure(lambda: len(children()) - len(before), rounds=2)
    assert seconds == {"quiet": [0, 0], "busy": [1, 1]}
    assert children() == before


def test_a_job_is_timed_once_what_follows_the_load_has_settled() -> None:
    began = []
    seconds = busy.seconds_once_settled(lambda: (began.append(time.monotonic()), time.sleep(0.05)), 2, settling=0.2)
    assert seconds >= 0.05
    assert len(began) >= 3 and began[-2] - began[0] >= 0.2


def test_a_job_of_the_busy_machine_runs_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busy, "JOBS", busy.JOBS[:1])
    (row,) = busy.busy(tmp_path, rounds=1).to_dict("records")
    assert row["what"] == "ResNet-18, inference" and row["quiet, s"] > 0
    assert row["busy / quiet"] == pytest.approx(row["busy, s"] / row["quiet, s"])


def test_a_job_without_data_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "JOBS", ["YOLOv3, inference"])
    with pytest.raises(UserError, match=f"^{tmp_path}[^\\n]*expected[^\\n]*$"):
        busy.busy(tmp_path, rounds=1)
