"""The command line end to end: Darknet's files to ours and back, every byte the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from detection.classes import COCO_CLASSES
from detection.modeling import build_model, load_detector
from detection.starts import read_leaf, set_classes
from detection.yolov3.darknet_weights import write_darknet_weights
from tools.convert_darknet import main

CONFIG = ["--config", "detection/configs/yolov3_tiny.yaml"]
NUM_VALUES = 8_858_734  # of yolov3-tiny for 80 classes
NUM_BACKBONE_VALUES = 6_298_480


def write_file(path: Path, count: int, version: int = 2) -> np.ndarray:
    values = np.random.default_rng(0).random(count, dtype=np.float32)
    seen = np.array([12345], "<i8" if version >= 2 else "<i4")
    path.write_bytes(np.array([0, version, 0], "<i4").tobytes() + seen.tobytes() + values.tobytes())
    return values


def error_of(capsys: pytest.CaptureFixture, *argv: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])


def test_there_and_back(tmp_path, capsys):
    source, ours, back = tmp_path / "tiny.weights", tmp_path / "tiny.pth", tmp_path / "back.weights"
    values = write_file(source, NUM_VALUES)
    main([str(source), str(ours), *CONFIG])
    main([str(ours), str(back), *CONFIG])
    assert source.read_bytes() == back.read_bytes()
    assert f"{NUM_VALUES:,} values" in capsys.readouterr().out
    assert "the folder is that of another run" in error_of(capsys, source, tmp_path / "again.pth", *CONFIG)
    # Layout by hand: shift, scale, mean and variance of the first BatchNorm (16 channels), then its kernel.
    state = torch.load(ours, weights_only=True)["model"]
    first = [state[f"backbone.dark4.0.{name}"].flatten() for name in
             ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var", "conv.weight")]  # fmt: skip
    np.testing.assert_array_equal(torch.cat(first), values[: 4 * 16 + 16 * 3 * 9])
    # And the last ones are the kernel of the finer level's prediction.
    last = state["head.levels.1.prediction.weight"].flatten()
    np.testing.assert_array_equal(last, values[-255 * 256 :])


def test_files_before_version_0_2_have_a_shorter_header(tmp_path):
    source, ours = tmp_path / "old.weights", tmp_path / "old.pth"
    values = write_file(source, NUM_VALUES, version=1)
    main([str(source), str(ours), *CONFIG])
    checkpoint = torch.load(ours, weights_only=True)
    assert checkpoint["images_seen"] == 12345
    np.testing.assert_array_equal(checkpoint["model"]["backbone.dark4.0.bn.bias"], values[:16])


def test_backbone_only(tmp_path, capsys):
    source, ours, back = tmp_path / "tiny.weights", tmp_path / "backbone.pth", tmp_path / "backbone.weights"
    write_file(source, NUM_VALUES)
    main([str(source), str(ours), "--backbone", *CONFIG])
    assert f"{NUM_VALUES - NUM_BACKBONE_VALUES:,} beyond the backbone" in capsys.readouterr().out
    assert all(name.startswith("backbone.") for name in torch.load(ours, weights_only=True)["model"])
    main([str(ours), str(back), "--backbone", *CONFIG])
    assert back.read_bytes() == source.read_bytes()[: 20 + 4 * NUM_BACKBONE_VALUES]


def test_of_a_checkpoint_with_an_average_that_is_converted(tmp_path):
    values = write_file(tmp_path / "tiny.weights", NUM_VALUES)
    main([str(tmp_path / "tiny.weights"), str(tmp_path / "tiny.pth"), *CONFIG])
    average = torch.load(tmp_path / "tiny.pth", weights_only=True)["model"]
    raw = {name: torch.zeros_like(value) for name, value in average.items()}
    torch.save({"model": raw, "average": average}, tmp_path / "averaged.pth")
    main([str(tmp_path / "averaged.pth"), str(tmp_path / "back.weights"), *CONFIG])
    np.testing.assert_array_equal(np.fromfile(tmp_path / "back.weights", np.float32, offset=20), values)


def test_a_whole_detector_becomes_a_run_folder(tmp_path):
    source, ours = tmp_path / "tiny.weights", tmp_path / "new" / "run" / "model_best.pth"
    write_darknet_weights(source, untrained())
    main([str(source), str(ours)])
    cfg, model = load_detector(ours.parent)
    expected_cfg, expected = load_detector(source)
    assert cfg.MODEL.CLASSES == expected_cfg.MODEL.CLASSES == list(COCO_CLASSES)
    image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    found, wanted = (network([image])[0]["instances"] for network in (model, expected))
    assert torch.equal(found.pred_boxes.tensor, wanted.pred_boxes.tensor)


def test_without_a_configuration_that_of_the_file_is_taken(tmp_path):
    """Of a published file its own, of a run the one beside it."""
    source, run, back = tmp_path / "tiny.weights", tmp_path / "run" / "model_best.pth", tmp_path / "back.weights"
    write_darknet_weights(source, untrained())
    main([str(source), str(tmp_path / "backbone.pth"), "--backbone"])
    assert len(torch.load(tmp_path / "backbone.pth", weights_only=True)["model"]) > 30
    main([str(source), str(run)])
    main([str(run), str(back)])
    np.testing.assert_array_equal(*(np.fromfile(path, np.float32, offset=20) for path in (source, back)))


def untrained() -> torch.nn.Module:
    """yolov3-tiny for COCO with random weights."""
    cfg = read_leaf("yolov3_tiny_coco", ["MODEL.DEVICE", "cpu"])
    set_classes(cfg, COCO_CLASSES)
    torch.manual_seed(0)
    return build_model(cfg)


def test_real_file(tmp_path, shared):
    source, back = shared / "weights" / "yolov3-tiny.weights", tmp_path / "back.weights"
    main([str(source), str(tmp_path / "tiny.pth"), *CONFIG])
    main([str(tmp_path / "tiny.pth"), str(back), *CONFIG])
    assert source.read_bytes() == back.read_bytes()


@pytest.mark.parametrize("count", [NUM_VALUES - 1, NUM_VALUES + 1])
def test_every_value_is_accounted_for(tmp_path, capsys, count):
    source = tmp_path / "tiny.weights"
    write_file(source, count)
    line = error_of(capsys, source, tmp_path / "tiny.pth", *CONFIG)
    assert f"{count:,} values, but the network has {NUM_VALUES:,}" in line
    assert not (tmp_path / "tiny.pth").exists()


def test_user_errors(tmp_path, capsys):
    broken, half = tmp_path / "broken.weights", tmp_path / "half.weights"
    broken.write_bytes(b"nothing")
    write_file(half, 10)
    half.write_bytes(half.read_bytes()[:-2])
    target = tmp_path / "out.pth"
    assert "is the file complete?" in error_of(capsys, broken, target, *CONFIG)
    assert "is the file complete?" in error_of(capsys, half, target, *CONFIG)
    assert "no such file" in error_of(capsys, tmp_path / "none.weights", target, *CONFIG)
    assert "expected one of Darknet's" in error_of(capsys, tmp_path / "a.weights", tmp_path / "out.weights")
    base = ("--config", "detection/configs/Base-YOLOv3.yaml")  # which has PyTorch's epsilon
    assert "NORM_EPS 1e-06" in error_of(capsys, half, target, *base)
    torch.save({"model": {"backbone.other": torch.zeros(1)}}, target)
    assert "does not fit the model" in error_of(capsys, target, tmp_path / "out.weights", *CONFIG)


def test_as_a_command(fork_server, tmp_path):
    code, printed = fork_server("tools.convert_darknet", str(tmp_path / "none.weights"), "out.pth", *CONFIG)
    assert code == 2
    assert "no such file" in printed and "Traceback" not in printed
