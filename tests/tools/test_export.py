"""Exported models beside PyTorch's in float32: small untrained ones, of which the test images are annotated."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from classification import evaluate as classification_evaluate
from classification.predict import BirdClassifier
from common.errors import UserError
from common.images import read_image
from detection import train_net
from detection.classes import COCO_CLASSES
from detection.modeling import build_model, load_detector, start_by_model
from detection.predict import Detector
from detection.starts import read_leaf, set_classes
from detection.voc_annotations import annotation_xml
from detection.yolov3.darknet_weights import write_darknet_weights
from tests.birds import COLOURS as BIRDS
from tests.birds import draw_birds
from tests.tools.scenes import draw_scene
from tools import app, compare_detectors, predict, predict_bird
from tools.export import main

for package in ("openvino", "onnx", "onnxruntime", "nncf"):
    pytest.importorskip(package, reason=f"{package} is not installed: make setup-export", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
SPECIES = sorted(name[4:].replace("_", " ") for name in BIRDS)
FLOAT32 = ["MODEL.PRECISION", "float32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_detector, make_classifier) -> dict[str, Path]:
    """Run folders; the data has what YOLOv3 finds in its test images for their truth."""
    output = tmp_path_factory.mktemp("runs")
    data = output / "data"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (data / name).mkdir(parents=True)
    (data / "labels.txt").write_text("red\nblue\n")
    frcnn = make_detector(output / "faster_rcnn", "faster_rcnn_R_50_FPN", ["red", "blue"], data)
    yolov3 = make_detector(output / "yolov3", "yolov3_tiny", ["red", "blue"], data)
    detector = Detector(yolov3)
    _, detector.model = load_detector(yolov3, FLOAT32)
    for number, (height, width) in enumerate([(48, 64), (90, 60), (64, 70), (50, 50), (48, 64), (120, 70)]):
        path = data / "JPEGImages" / f"{number}.jpg"
        draw_scene(height, width, number)[0].save(path)
        found = detector.predict(path, 0.0)
        objects = list(zip(found.names[::4], found.boxes[::4].tolist(), strict=True))
        (data / "Annotations" / f"{number}.xml").write_text(annotation_xml(path.name, height, width, objects))
    (data / "ImageSets/Main/trainval.txt").write_text("0\n1\n2\n")
    (data / "ImageSets/Main/test.txt").write_text("3\n4\n5\n")
    (yolov3.parent / "evaluation.json").write_text('{"threshold": 0.2}')
    bird = make_classifier(output / "bird", SPECIES)
    return {"faster_rcnn": frcnn.parent, "yolov3": yolov3.parent, "bird": bird.parent, "data": data}


@pytest.fixture(scope="module")
def export(runs) -> Callable[..., Path]:
    """Exports a run once."""

    def export(name: str, form: str, precision: str = "float32", *options: object) -> Path:
        out = runs[name] / "-".join(map(str, (form, precision, *options)))
        if not out.exists():
            words = ["--weights", runs[name], "--format", form, "--precision", precision, "--out", out, *options]
            main([str(word) for word in words])
        return out / ("model.xml" if form == "openvino" else "model.onnx")

    return export


def said(capsys, call: Callable, *words: object) -> str:
    """The one line of an error, with exit code 2."""
    with pytest.raises(SystemExit) as exit_code:
        call([str(word) for word in words])
    assert exit_code.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("form", ["openvino", "onnx"])
@pytest.mark.parametrize("name", ["faster_rcnn", "yolov3"])
def test_boxes_are_those_of_pytorch_whatever_the_size(runs, export, name, form):
    detector, exported = Detector(runs[name]), Detector(export(name, form))
    _, detector.model = load_detector(runs[name], FLOAT32)
    for path in sorted((runs["data"] / "JPEGImages").glob("*.jpg")):  # padded to 64 x 64, 64 x 96 and 64 x 128
        expected, found = detector.predict(path, 0.0), exported.predict(path, 0.0)
        assert len(found) == len(expected) > 10
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        distance = np.abs(found.boxes[:, None] - expected.boxes).max(axis=2)
        distance[np.array(found.names)[:, None] != np.array(expected.names)] = np.inf
        assert distance.min(axis=0).max() < 0.5 and distance.min(axis=1).max() < 0.5
    assert (exported.name, exported.class_names) == (detector.name, ["red", "blue"])


def test_size_is_the_short_side(runs, export):
    path = runs["data"] / "JPEGImages" / "1.jpg"
    exported = Detector(export("yolov3", "onnx", "float32", "--size", 96))
    assert min(exported.prepare(read_image(path))["image"].shape[1:]) == 96
    detector = Detector(runs["yolov3"])
    longest = str(round(detector.cfg.INPUT.MAX_SIZE_TEST * 96 / 64))
    options = [*FLOAT32, "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", longest]
    detector.cfg, detector.model = load_detector(runs["yolov3"], options)
    detector.prepare = exported.prepare
    np.testing.assert_allclose(exported.predict(path, 0).boxes, detector.predict(path, 0).boxes, atol=0.5)


@pytest.mark.parametrize("form", ["openvino", "onnx"])
def test_ap_is_that_of_pytorch(runs, export, form):
    def ap(weights: Path, *options: str) -> float:
        train_net.eval_only(
            train_net.parse_args(["--model", "yolov3", "--weights", str(weights), "--eval-only", *options])
        )
        return 100 * json.loads((weights.parent / "evaluation" / "evaluation.json").read_text())["AP"]

    expected = ap(runs["yolov3"] / "model_best.pth", *FLOAT32)
    assert expected > 10
    assert ap(export("yolov3", form)) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("form", ["openvino", "onnx"])
def test_int8_hardly_moves_most_boxes(runs, export, form):
    detector, exported = Detector(runs["yolov3"]), Detector(export("yolov3", form, "int8"))
    _, detector.model = load_detector(runs["yolov3"], FLOAT32)
    for path in sorted((runs["data"] / "JPEGImages").glob("*.jpg")):
        expected, found = detector.predict(path, 0.15), exported.predict(path, 0.1)
        assert len(expected) > 10 and found.scores.tolist() != expected.scores.tolist()
        # Of two boxes that score nearly alike suppression may keep the other one, so the median counts.
        assert np.median(np.abs(expected.boxes[:, None] - found.boxes).max(axis=2).min(axis=1)) < 0.5


@pytest.mark.parametrize("form", ["openvino", "onnx"])
def test_int8_weights_leave_room_for_sixteen_bits(export, form):
    """Two products of unsigned eight and signed seven bits are at most 2 x 255 x 64 = 32,640, below 2 ** 15."""
    path = export("yolov3", form, "int8")
    if form == "onnx":
        onnx = pytest.importorskip("onnx")
        tensors = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    else:
        operations = pytest.importorskip("openvino").Core().read_model(path).get_ops()
        tensors = [operation.get_data() for operation in operations if operation.get_type_name() == "Constant"]
    weights = [tensor.astype(int) for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim == 4]
    assert len(weights) > 5
    assert max(np.abs(weight).max() for weight in weights) <= 64


def test_int8_spares_what_predicts_and_decodes(export):
    openvino = pytest.importorskip("openvino")
    operations = openvino.Core().read_model(export("yolov3", "openvino", "int8")).get_ops()

    def is_quantised(operation) -> bool:
        sources = [each.get_source_output().get_node().get_type_name() for each in operation.inputs()]
        return "FakeQuantize" in sources

    convolutions = {
        op.get_friendly_name(): is_quantised(op) for op in operations if op.get_type_name() == "Convolution"
    }
    predicting = [name for name in convolutions if ".prediction/" in name]
    assert len(predicting) == 2 and not any(convolutions[name] for name in predicting)
    assert sum(convolutions.values()) > 0
    assert not any(is_quantised(op) for op in operations if op.get_type_name() in ("Multiply", "Exp", "Sigmoid"))


@pytest.mark.parametrize("form", ["openvino", "onnx"])
def test_birds_are_those_of_pytorch(runs, export, form, tmp_path, monkeypatch, capsys):
    draw_birds(tmp_path, test=4)

    def probabilities(weights: Path, *options: str) -> list[str]:
        words = [str(weights), "--data", str(tmp_path), "--out", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["evaluate", *words])
        classification_evaluate.main()
        return (tmp_path / "out" / "predictions.csv").read_text().splitlines()

    weights = export("bird", form)
    for options in ((), ("--tta",)):
        expected, found = probabilities(runs["bird"] / "model_best.pth", *options), probabilities(weights, *options)
        assert [row.rsplit(",", 1)[0] for row in found] == [row.rsplit(",", 1)[0] for row in expected]
        for row, other in zip(found[1:], expected[1:], strict=True):
            assert float(row.rsplit(",", 1)[1]) == pytest.approx(float(other.rsplit(",", 1)[1]), abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["predict_bird", "x.jpg", "--weights", str(weights), "--saliency"])
    with pytest.raises(SystemExit):
        predict_bird.main()
    assert "has no gradients" in capsys.readouterr().err


def test_int8_of_birds(runs, export, tmp_path):
    draw_birds(tmp_path)
    weights = export("bird", "openvino", "int8", "--data", tmp_path)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = BirdClassifier(runs["bird"]).probabilities(images)
    found = BirdClassifier(weights).probabilities(images)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_every_command_takes_it(runs, export, tmp_path, capsys):
    photograph = runs["data"] / "JPEGImages" / "0.jpg"
    frcnn, yolov3, bird = export("faster_rcnn", "onnx"), export("yolov3", "onnx"), export("bird", "onnx")
    in_float32 = Detector(runs["yolov3"])
    _, in_float32.model = load_detector(runs["yolov3"], FLOAT32)
    for weights, model, score, least in (
        (yolov3, in_float32, ["--score", "best"], 0.2),
        (bird, BirdClassifier(runs["bird"]), [], 0.0),
    ):
        out = tmp_path / weights.parent.parent.name
        predict.main(["--weights", str(weights), "--out", str(out), *score, str(photograph)])
        entries = json.loads((out / "predictions.json").read_text())
        expected = model.predict(photograph, least)
        assert [entry["score"] for entry in entries] == pytest.approx(expected.scores.tolist(), abs=1e-4)
        assert sorted(entry["category"] for entry in entries) == sorted(expected.names) != []
    words = ["--frcnn", frcnn, "--yolov3", yolov3, "--out", tmp_path / "both", photograph]
    compare_detectors.main([str(word) for word in words])
    assert json.loads((tmp_path / "both" / "comparison.json").read_text())["weights"]["YOLOv3"] == str(yolov3)
    models = app.load_models({app.FASTER_RCNN: str(frcnn), app.BIRDS: str(bird)})
    assert models.frcnn and models.bird
    app.build_page(models, 0.5)
    assert start_by_model(str(yolov3)) == {"yolov3": str(yolov3)}


def test_what_cannot_be_exported(runs, export, tmp_path, capsys):
    run = ["--weights", runs["yolov3"], "--out", tmp_path / "out"]
    assert "PRECISION=bfloat16" in said(capsys, main, *run, "--format", "onnx", "--precision", "bfloat16")
    assert "SIZE=8" in said(capsys, main, *run, "--size", 8)
    assert "cannot be written for openvino" in said(capsys, main, "--weights", runs["bird"], "--size", 3)
    assert "SIZE=0" in said(capsys, main, "--weights", runs["bird"], "--size", 0)
    assert "is exported already" in said(capsys, main, "--weights", export("yolov3", "onnx"))
    assert "WEIGHTS is not given" in said(capsys, main)
    assert not (tmp_path / "out" / "model.xml").exists()


@pytest.fixture(scope="module")
def of_coco(tmp_path_factory) -> Path:
    """yolov3-tiny with random weights, as Darknet writes it, which names neither data nor classes."""
    cfg = read_leaf("yolov3_tiny_coco", ["MODEL.DEVICE", "cpu"])
    set_classes(cfg, COCO_CLASSES)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("coco") / "tiny.weights"
    model = build_model(cfg)
    for name, value in model.named_parameters():
        if ".prediction" in name:
            torch.nn.init.normal_(value)  # of any class, where training would begin with next to none
    write_darknet_weights(path, model)
    return path


def test_a_detector_of_others_is_not_calibrated_on_the_drawn_sample(of_coco, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    assert "DATA is not given" in said(capsys, main, "--weights", of_coco, "--precision", "int8", "--out", "out")
    assert not (tmp_path / "datasets").exists()


def test_classes_of_coco_are_taken_by_their_names(of_coco, tmp_path):
    """A file says what it knows of the classes that the data has; PyTorch gives the others random weights."""
    main(["--weights", str(of_coco), "--format", "onnx", "--out", str(tmp_path)])
    image = {"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}
    _, whole = load_detector(tmp_path / "model.onnx")
    all_of_them = whole([image])[0]["instances"]
    numbers = all_of_them.pred_classes.unique()[:2].tolist()
    words = ["zebra fish", *(COCO_CLASSES[number].replace(" ", "").upper() for number in numbers)]
    cfg, exported = load_detector(tmp_path / "model.onnx", classes=words)
    assert words == cfg.MODEL.CLASSES
    found = exported([image])[0]["instances"]
    for ours, theirs in enumerate(numbers, start=1):
        expected = all_of_them[all_of_them.pred_classes == theirs]
        assert len(expected)
        assert torch.equal(found[found.pred_classes == ours].pred_boxes.tensor, expected.pred_boxes.tensor)
    assert len(numbers) and set(found.pred_classes.tolist()) == set(range(1, len(numbers) + 1))


def test_suppression_is_in_the_file(export):
    key = "MODEL.YOLOV3.NMS_THRESH_TEST"
    words = ["--model", "yolov3", "--eval-only", "--start", export("yolov3", "onnx"), key, "0.3"]
    with pytest.raises(UserError, match=f"{key} 0.3: nothing would come of it"):
        train_net.eval_only(train_net.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("form", ["openvino", "onnx"])
def test_a_bad_file_is_one_line(export, form, tmp_path, capsys, monkeypatch):
    good = export("yolov3", form)

    def told(path: Path) -> str:
        return said(capsys, predict.main, "--weights", path, "--out", tmp_path / "out", good)

    bad = tmp_path / good.name
    assert "no such file" in told(bad)
    bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    assert f"{bad}: cannot be read" in told(bad)
    bad.write_bytes(good.read_bytes())
    if form == "openvino":
        assert f"{bad}: cannot be read" in told(bad)  # without the other file
        with_half = (good.parent / "model.bin").read_bytes()
        (tmp_path / "model.bin").write_bytes(with_half[: len(with_half) // 2])
        assert f"{bad}: cannot be read" in told(bad)
        (tmp_path / "model.bin").write_bytes(with_half)
        bad.write_text(bad.read_text().replace("<kind ", "<other "))
    else:
        onnx = pytest.importorskip("onnx")
        model = onnx.load(good)
        del model.metadata_props[:]
        onnx.save(model, bad)
    assert "does not say which model it holds" in told(bad)
    if form == "onnx":
        for value in ("detector", '"detector"'):  # no JSON, and nothing beside it
            entry = model.metadata_props.add()
            entry.key, entry.value = "kind", value
            onnx.save(model, bad)
            assert "does not say which model it holds" in told(bad)
            del model.metadata_props[:]
    assert "is a detector of this project, expected a classifier" in said(
        capsys, lambda words: run_evaluate(monkeypatch, words), good
    )
    monkeypatch.setitem(sys.modules, "onnxruntime" if form == "onnx" else "openvino", None)
    assert "make setup-export" in told(good)


def run_alone(program: str, home: Path, *words: object) -> list[str]:
    """What a program prints that knows of no test and no CI, in both of which the runtimes behave otherwise."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(
        command, env=environment | {"HOME": str(home)}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_nobody_is_told_of_an_export(runs, tmp_path):
    """OpenVINO and NNCF would keep a number for the user in the home folder and send their reports in processes."""
    program = """
import os, sys, threading
os.register_at_fork(before=lambda: print("a process of", threading.current_thread().name))
from tools.export import main
main(sys.argv[1:])
print("done")
"""
    words = ("--weights", runs["bird"], "--format", "openvino", "--precision", "int8", "--out", tmp_path / "out")
    draw_birds(tmp_path / "birds")
    lines = run_alone(program, tmp_path / "home", *words, "--data", tmp_path / "birds")
    assert lines[-1] == "done"
    assert not [line for line in lines if line.startswith("a process of")]
    assert not (tmp_path / "home" / "intel").exists()


@pytest.mark.parametrize("form", ["openvino", "onnx"])
def test_a_network_that_makes_room_takes_no_threads_from_a_runtime(export, form, tmp_path):
    """It does so for a moment, and a runtime has its threads for good."""
    program = """
import sys
from pathlib import Path
import onnxruntime, openvino, torch
from common import exported, runtime

def compile_model(core, model, device, settings, compile_model=openvino.Core.compile_model):
    print(settings["INFERENCE_NUM_THREADS"])
    return compile_model(core, model, device, settings)

def session(path, options, session=onnxruntime.InferenceSession, **rest):
    print(options.intra_op_num_threads)
    return session(path, options, **rest)

openvino.Core.compile_model, onnxruntime.InferenceSession = compile_model, session
torch.set_num_threads(2)
runtime.LoadWatch.cores_left = lambda self, interval: 1
network = torch.nn.Linear(1, 1).eval()
runtime.leave_cores(network)
network(torch.ones(1, 1))
assert torch.get_num_threads() == 1
exported.ExportedModel(Path(sys.argv[1]))
"""
    assert run_alone(program, tmp_path, export("bird", form)) == ["2"]


def run_evaluate(monkeypatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    classification_evaluate.main()
