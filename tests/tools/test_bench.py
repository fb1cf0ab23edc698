"""Each benchmark at a toy size: rows and figures are there. No test asks how fast anything is."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from classification.cub import read_cub
from common.weights import save_checkpoint
from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
from detection.voc import VOC_CLASSES
from detection.yolov3.targets import assign_targets
from tests.birds import draw_birds
from tools.bench import classification, faster_rcnn, training_images, voc, yolov3
from tools.bench.__main__ import main
from tools.bench.timing import against_rivals, in_turn

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


def assert_compares(table: pd.DataFrame, rivals: list[str]) -> None:
    assert table["rival"].tolist() == rivals
    measured = table[table["rival, s"].notna()]
    assert (measured[["ours, s", "rival, s"]] > 0).all(axis=None)
    ratio = measured["rival, s"] / measured["ours, s"]
    pd.testing.assert_series_equal(measured["times as fast"], ratio, check_names=False)


def test_runs_take_turns_and_the_first_round_does_not_count() -> None:
    calls = []
    seconds = in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, 2)
    assert "".join(calls) == "abcabcabc"
    assert list(seconds) == ["a", "b", "c"]


def test_a_rival_of_twice_the_time_is_half_as_fast() -> None:
    assert against_rivals("job", {"ours": 2.0, "x": 4.0, "y": 1.0}) == [
        {"what": "job", "ours, s": 2.0, "rival": "x", "rival, s": 4.0, "times as fast": 2.0},
        {"what": "job", "ours, s": 2.0, "rival": "y", "rival, s": 1.0, "times as fast": 0.5},
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the rows of a GPU too")
def test_faster_rcnn_speed(root: Path) -> None:
    table = faster_rcnn.speed(root, size=(32, 48), repetitions=1)
    assert_compares(table, ["stock Detectron2", "torchvision"] * 2 + [MISSING_GPU])
    batches = np.array([1, 1, 2, 2])
    np.testing.assert_allclose(table["ours, images/s"][:4], batches / table["ours, s"][:4])


def test_the_three_networks_are_the_same(root: Path) -> None:
    samples = faster_rcnn.read_samples(root, 2, (64, 96))
    contenders = faster_rcnn.build_contenders(samples, "cpu")
    ours, stock, rival = (each.model for each in contenders.values())
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
    monkeypatch.setattr(yolov3, "fetch_ultralytics", lambda _: False)  # tests download nothing
    table = yolov3.speed(root, size=64, repetitions=1)
    assert table["rival"].tolist() == ["OpenCV", "ultralytics: not there", "ultralytics: not there", MISSING_GPU]
    assert_compares(table[:1], ["OpenCV"])


def test_opencv_computes_our_yolov3(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolov3, "fetch_ultralytics", lambda _: False)
    samples = yolov3.read_samples(root, 4, (96, 96))
    contenders = yolov3.build_contenders(samples, "cpu", tmp_path)
    (ours,) = contenders["ours"].detect(samples[:1])
    ((_, scores, _),) = contenders["OpenCV"].detect(samples[:1])
    assert len(scores)
    assert ours["instances"].scores.max().item() == pytest.approx(float(np.max(scores)), abs=0.05)  # bfloat16


def test_the_loop_over_objects_assigns_the_same_targets() -> None:
    scenes = yolov3.random_scenes(3, 30)
    ours = assign_targets(*scenes)
    classes, ignored = yolov3.assign_in_a_loop(*scenes)
    assert ignored.any()
    assert torch.equal(ours.ignored, ignored)
    places = zip(ours.images.tolist(), ours.predictions.tolist(), strict=True)
    assert dict(zip(places, ours.classes.tolist(), strict=True)) == classes
    assert_compares(yolov3.targets(Path(), images=2, objects=3, repetitions=1), ["a loop over objects"])


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to train on for a batch of timm's script, 128."""
    return draw_birds(tmp_path_factory.mktemp("data"), train=26, test=8)


@pytest.mark.parametrize("name", [classification.OURS, classification.PLAIN, classification.TIMM])
def test_contenders_of_classification_train(birds: Path, name: str) -> None:
    cub = read_cub(birds)
    training = classification.build(name, cub.train, len(cub.class_names), 32, 0.02)
    before = training.model.fc.weight.clone()
    assert 0 <= training.epoch() <= 100
    assert not torch.equal(training.model.fc.weight, before)
    measured = training.accuracy(cub.test, 32)
    assert 0 <= measured["test top-1, %"] <= measured["test top-5, %"] == 100  # of five classes


def test_voc_loader(root: Path) -> None:
    table = voc.loader(root, images=6, repetitions=1)
    assert_compares(table, ["stock Detectron2"] * 2)
    assert table["what"].tolist() == ["reading 6 annotations, first", "reading 6 annotations, cached"]


def test_voc_evaluator(root: Path) -> None:
    assert_compares(voc.evaluator(root, images=9, detections=5), ["stock Detectron2"])


def test_random_detections_find_objects(root: Path) -> None:
    records = [{"width": 96, "height": 64, "annotations": [{"bbox": [10, 4, 70, 60], "category_id": 11}]}] * 2
    records.append({"width": 96, "height": 64, "annotations": []})
    outputs = voc.random_detections(records, 300)
    right = [(output.pred_classes == 11).float().mean() for output in outputs]
    assert right[0] > 0.25 and right[1] > 0.25 and right[2] < 0.15
    assert all((output.pred_boxes.area() > 0).float().mean() > 0.9 for output in outputs)


def test_training_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolov3, "fetch_ultralytics", lambda _: False)
    table = training_images.training_images(root, images=2, repetitions=1, large=(300, 400), size=(32, 48))
    reference = "torchvision's reference"
    assert_compares(table[:6], [reference, "stock Detectron2"] * 2 + [reference] * 2)
    np.testing.assert_allclose(table["ours, images/s"][:6], 1 / table["ours, s"][:6])
    assert (table[["ours, MB", "rival, MB"]].loc[[2, 3, 5]] >= 0).all(axis=None)
    assert table["ours, images/s"][6] > 0


def test_the_memory_of_a_run_is_measured() -> None:
    assert training_images.peak_megabytes(lambda: np.ones(10**7)) == pytest.approx(80, rel=0.2)
    assert training_images.peak_megabytes(lambda: None) < 5


def test_command_line(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "faster_rcnn_accuracy", "--data", str(root)])
    main()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and str(root) in printed
    assert "## faster_rcnn_accuracy" in printed and "not measured" in printed

    monkeypatch.setattr(sys, "argv", ["bench", "nonsense"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
