"""Weights in and out; torchvision's and timm's own networks say what converted weights must compute."""

import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from common.errors import UserError
from common.weights import save_checkpoint
from detection.checkpoint import load_initial_weights, load_weights
from detection.config import CONFIGS, get_cfg
from detection.torchvision_detectors import convert_resnet

BACKBONE = "backbone.bottom_up."


def resnet_cfg(weights: str | Path) -> CfgNode:
    """The recipe with its full ResNet-50, and the rest narrow."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "Base-FasterRCNN.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8, 8
    cfg.MODEL.WEIGHTS = str(weights)
    return cfg


@pytest.fixture(scope="module")
def tiny_cfg(tiny_opts: list[str]) -> CfgNode:
    cfg = resnet_cfg("")
    cfg.merge_from_list(tiny_opts)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    return cfg


def randomise(model: nn.Module) -> nn.Module:
    """BatchNorm starts as the identity, under which a mixed-up layer would go unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            low = 0.5 if name.endswith(("running_var", "weight")) else -0.2
            value.uniform_(low, low + 0.4, generator=generator)
    return model.eval()


def torchvision_features(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = layer(x)
        features.append(x)
    return features


@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_converted_resnet_computes_the_same_features(tmp_path: Path, source: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 96)
    if source == "torchvision":
        original = randomise(torchvision.models.resnet50())
        expected = torchvision_features(original, x)
    else:
        original = randomise(timm.create_model("resnet50"))
        expected = original.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    torch.save(original.state_dict(), tmp_path / "resnet50.pth")

    model = build_model(resnet_cfg(tmp_path / "resnet50.pth")).eval()
    load_initial_weights(model, resnet_cfg(tmp_path / "resnet50.pth"))
    with torch.no_grad():
        features = model.backbone.bottom_up(x)
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for feature, other in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(feature, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())

    # Every tensor is accounted for: used once, or one of the classifier's and the step counters.
    converted = convert_resnet(original.state_dict())
    dropped = len(original.state_dict()) - len(converted)
    assert dropped == 2 + sum(isinstance(module, nn.BatchNorm2d) for module in original.modules())
    own = {name for name in model.state_dict() if name.startswith(BACKBONE)}
    assert converted.keys() == own


def test_incomplete_or_foreign_backbones_are_refused(tmp_path: Path) -> None:
    state = torchvision.models.resnet50().state_dict()
    model = build_model(resnet_cfg(""))
    for name, change, expected in (
        ("short", lambda s: s.pop("layer3.2.bn2.running_mean"), "1 tensors missing .*res4.2.conv2.norm.running_mean"),
        ("strange", lambda s: s.update({"layer5.0.conv1.weight": torch.zeros(1)}), "res6|layer5"),
        ("foreign", lambda s: s.update({"attention.weight": torch.zeros(1)}), "attention.weight"),
        ("wide", lambda s: s.update({"conv1.weight": torch.zeros(9, 3, 7, 7)}), r"another shape .*\(9, 3, 7, 7\)"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=expected) as error:
            load_initial_weights(model, resnet_cfg(tmp_path / f"{name}.pth"))
        assert str(error.value).startswith(f"{tmp_path / name}.pth: ")
        assert "\n" not in str(error.value)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match="does not fit the model"):
        load_initial_weights(model, resnet_cfg(tmp_path / "resnet18.pth"))


@pytest.mark.parametrize("source", ["hub://x", "timm://no_such_network", "torchvision://NoSuchWeights.X"])
def test_unknown_hubs_and_names(tiny_cfg: CfgNode, source: str) -> None:
    cfg = tiny_cfg.clone()
    cfg.MODEL.WEIGHTS = source
    with pytest.raises(UserError, match=re.escape(source)):
        load_initial_weights(build_model(tiny_cfg), cfg)


def test_detector_there_and_back(tmp_path: Path, tiny_cfg: CfgNode) -> None:
    saved, loaded = build_model(tiny_cfg), build_model(tiny_cfg)
    path = tmp_path / "model.pth"
    save_checkpoint(path, {"model": saved.state_dict(), "iteration": 7})
    load_weights(loaded, path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())


def test_detector_of_other_classes(tmp_path: Path, tiny_cfg: CfgNode) -> None:
    other = tiny_cfg.clone()
    other.MODEL.ROI_HEADS.NUM_CLASSES = 5
    other.MODEL.WEIGHTS = str(tmp_path / "two classes.pth")
    two, five = build_model(tiny_cfg), build_model(other)
    save_checkpoint(Path(other.MODEL.WEIGHTS), {"model": two.state_dict()})

    with pytest.raises(
        UserError, match=r"does not fit the model: 4 tensors of another shape .*expected weights of the"
    ):
        load_weights(five, other.MODEL.WEIGHTS)

    before = {name: value.clone() for name, value in five.state_dict().items()}
    load_initial_weights(five, other)  # to train it on the other classes
    for name, value in five.state_dict().items():
        kept = name.startswith("roi_heads.box_predictor")
        assert torch.equal(value, before[name] if kept else two.state_dict()[name])
