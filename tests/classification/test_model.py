import math
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import torchvision

from classification.model import (
    PretrainedWeightsUnavailable,
    build_model,
    head_names,
    load_classifier,
    load_weights,
    mean_and_std,
    parameter_groups,
)
from common import weights
from common.errors import UserError


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("alexnet", {"classifier.6.weight", "classifier.6.bias"}),
        ("tf_efficientnet_lite0", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_the_head_is_new_and_has_the_full_rate(name, head):
    model = build_model(name, 200)
    assert head_names(model) == head
    own = dict(model.named_parameters())
    assert all(own[key].shape[0] == 200 for key in head)
    heads, backbone = parameter_groups(model, 0.1)
    assert (heads["lr_scale"], backbone["lr_scale"]) == (1.0, 0.1)
    assert {id(p) for p in heads["params"]} == {id(own[key]) for key in head}
    assert {id(p) for p in backbone["params"]} == {id(p) for key, p in own.items() if key not in head}
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 200)


def test_alexnet_is_torchvisions_with_its_dropout():
    model = build_model("alexnet", 200)
    assert isinstance(model, torchvision.models.AlexNet)
    assert model.classifier[0].p == 0.5
    assert mean_and_std(model) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_normalisation_follows_the_weights():
    assert mean_and_std(build_model("tf_efficientnet_lite0", 2)) == ([0.5] * 3, [0.5] * 3)


def test_an_unknown_model_is_refused_with_a_guess():
    with pytest.raises(UserError, match=r"MODEL=resnet81: .*resnet18"):
        build_model("resnet81", 200)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file_keep_all_but_a_head_of_other_classes(tmp_path, suffix, caplog):
    caplog.set_level("INFO")
    source = build_model("resnet18", 1000)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    model = build_model("resnet18", 200, weights=path)
    for key, value in model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, source.state_dict()[key]), key
    assert "left out, the head of other classes: fc.bias, fc.weight" in caplog.text
    twin = build_model("resnet18", 1000, weights=path)
    assert torch.equal(twin.fc.weight, source.fc.weight)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save(build_model("resnet34", 1000).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(UserError, match=r"resnet34\.pth: does not fit the model: \d+ tensors unexpected"):
        load_weights(build_model("resnet18", 200), tmp_path / "resnet34.pth")
    state = build_model("resnet18", 1000).state_dict()
    del state["layer1.0.bn1.running_var"]
    torch.save(state, tmp_path / "incomplete.pth")
    with pytest.raises(UserError, match=r"1 tensors missing \(layer1\.0\.bn1\.running_var"):
        load_weights(build_model("resnet18", 200), tmp_path / "incomplete.pth")


def test_a_plain_state_dict_is_no_classifier(tmp_path):
    torch.save(build_model("resnet18", 5).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"plain\.pth: holds no classifier of this project"):
        load_classifier(tmp_path / "plain.pth")


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_without_network_the_two_ways_on_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(PretrainedWeightsUnavailable, match=r"WEIGHTS=.*PRETRAINED=0"):
        build_model(name, 200, pretrained=True)


def test_a_broken_file_in_weights_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("weights/resnet18.safetensors")
    path.parent.mkdir()
    path.write_text("<!doctype html><title>Sign in</title>")
    with pytest.raises(UserError, match=f"^{path}: is a web page"):
        build_model("resnet18", 200, pretrained=True)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{cut off")
    with pytest.raises(UserError, match=f"^{path}: "):
        build_model("resnet18", 200, pretrained=True)


@pytest.mark.parametrize("classes", [2, 5, 200])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "test_vit"])
def test_a_new_head_takes_no_class_for_certain(name, classes):
    """With nothing learned each class is as likely as another, and the loss is the logarithm of their number."""
    torch.manual_seed(0)
    model = build_model(name, classes).train()
    images = torch.randn(16, 3, model.pretrained_cfg["input_size"][1], model.pretrained_cfg["input_size"][1])
    labels = torch.arange(16) % classes
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert loss == pytest.approx(math.log(classes), abs=0.5)


def test_the_file_of_alexnet_in_weights_serves_for_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "LOCAL_WEIGHTS", tmp_path)
    torch.manual_seed(3)
    published = torchvision.models.alexnet()
    torch.save(published.state_dict(), tmp_path / "alexnet-owt-7be5be79.pth")
    model = build_model("alexnet", 200, pretrained=True)
    assert torch.equal(model.features[0].weight, published.features[0].weight)
    assert model.classifier[6].out_features == 200
