"""Backbones: shapes, freezing, timm's weights under our names."""

import pytest
import timm
import torch
from torch import nn

from common.errors import UserError
from detection.yolov3.darknet import Darknet, DarknetTiny


@pytest.mark.parametrize("name", ["darknet53", "darknet21", "resnet18"])
def test_any_timm_network_with_these_strides(name):
    backbone = Darknet(name=name).eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 64, 96))
    shapes = backbone.output_shape()
    assert list(features) == list(shapes) == ["dark3", "dark4", "dark5"]
    for key, stride in zip(features, (8, 16, 32), strict=True):
        assert shapes[key].stride == stride
        assert features[key].shape == (1, shapes[key].channels, 64 // stride, 96 // stride)


def test_darknet53_has_the_channels_of_the_paper():
    shapes = Darknet(name="darknet53").output_shape()
    assert [shape.channels for shape in shapes.values()] == [256, 512, 1024]


def test_tiny():
    backbone = DarknetTiny().eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 64, 96))
    assert {name: tuple(feature.shape) for name, feature in features.items()} == {
        "dark4": (1, 256, 4, 6),
        "dark5": (1, 1024, 2, 3),
    }


@pytest.mark.parametrize(("name", "reason"), [("darknet99", "does not know"), ("vit_tiny_patch16_224", "strides")])
def test_other_networks_are_refused(name, reason):
    with pytest.raises(UserError, match=reason):
        Darknet(name=name)


def test_timm_weights_give_timm_features():
    torch.manual_seed(0)
    network = timm.create_model("darknet21", num_classes=10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    backbone = Darknet(name="darknet21").eval()
    state = backbone.convert_timm(network.state_dict())
    backbone.load_state_dict(state)  # strict: all of the backbone's tensors, no other
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)["dark5"], network.forward_features(images))


def test_slope_and_epsilon():
    modules = list(Darknet(name="darknet21", norm_eps=1e-3, negative_slope=0.2).modules())
    assert {module.eps for module in modules if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    assert {module.negative_slope for module in modules if isinstance(module, nn.LeakyReLU)} == {0.2}


def test_frozen_stages_do_not_change():
    backbone = Darknet(name="darknet21", freeze_at=2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    sum(feature.mean() for feature in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    stages = {name.split(".")[1] for name in changed}
    assert stages == {"stages_2", "stages_3", "stages_4"}  # strides 8, 16, 32; the stem, 2 and 4 are frozen
    trained = {name.split(".")[1] for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == stages


@pytest.mark.parametrize("backbone", [Darknet(name="darknet21", norm="SyncBN"), DarknetTiny(norm="SyncBN")])
def test_sync_bn(backbone):
    norms = [module for module in backbone.modules() if hasattr(module, "running_mean")]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
