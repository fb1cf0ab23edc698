"""timm's networks below either detector; timm's own classifiers say what the features and the weights must be."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from common.errors import UserError
from detection.checkpoint import load_initial_weights
from detection.config import CONFIGS, get_cfg, merge_file
from detection.timm_backbone import TimmBackbone, normalisation_of

STAGES = ["res2", "res3", "res4", "res5"]
# One for each way in which timm makes features of a classifier: named as there, joined names, the whole of it inside.
NETWORKS = ["test_efficientnet", "mobilenetv3_small_050", "test_convnext", "cspnext_s"]


def detector_cfg(base: str, name: str, *options: object) -> CfgNode:
    """A detector over a timm network."""
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"Base-{base}.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.PRECISION", "float32", "MODEL.TIMM.NAME", name, *options])
    return cfg


def pyramid_cfg(name: str, *options: object) -> CfgNode:
    """Faster R-CNN over a timm network, narrow above it."""
    narrow = ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
    return detector_cfg("FasterRCNN", name, "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", *narrow, *options)


def classifier(name: str) -> nn.Module:
    """A timm classifier whose BatchNorms are not the identity, under which a mixed-up layer would go unseen."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).eval()
    for module in network.modules():
        if hasattr(module, "running_mean"):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def intermediates(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What the classifier itself computes at strides 4 to 32."""
    by_stride = {
        images.shape[-1] // feature.shape[-1]: feature
        for feature in network.forward_intermediates(images, intermediates_only=True)
    }
    return [by_stride[stride] for stride in (4, 8, 16, 32)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_classifiers_file_gives_its_features_below_a_pyramid(name: str, tmp_path: Path) -> None:
    network = classifier(name)
    torch.save(network.state_dict(), tmp_path / "classifier.pth")
    cfg = pyramid_cfg(name, "MODEL.WEIGHTS", str(tmp_path / "classifier.pth"))
    model = build_model(cfg).eval()
    load_initial_weights(model, cfg)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features = model.backbone.bottom_up(images)
        levels = model.backbone(images)
        expected = intermediates(network, images)
    assert list(features) == STAGES
    for feature, other in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(feature, other)
    assert {level: tuple(value.shape) for level, value in levels.items()} == {
        f"p{k}": (1, 8, -(-64 // 2**k), -(-96 // 2**k)) for k in range(2, 7)
    }
    assert {level: shape.stride for level, shape in model.backbone.output_shape().items()} == {
        f"p{k}": 2**k for k in range(2, 7)
    }


def test_what_is_not_of_the_classifier_is_refused() -> None:
    backbone = TimmBackbone(name="test_efficientnet", out_features=STAGES)
    state = timm.create_model("test_efficientnet").state_dict()
    assert {"conv_head.weight", "bn2.weight", "classifier.weight"} <= state.keys()
    assert len(backbone.convert_timm(state)) == sum(
        not name.startswith(("conv_head", "bn2", "classifier")) for name in state
    )
    with pytest.raises(ValueError, match=r"1 tensors \(blocks.9.weight, ...\) are none of test_efficientnet's"):
        backbone.convert_timm({**state, "blocks.9.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="are none of test_efficientnet's"):
        backbone.convert_timm(timm.create_model("test_convnext").state_dict())


@pytest.mark.parametrize(
    ("name", "freeze_at", "trained"),
    [
        ("tf_efficientnet_lite0", 2, {f"blocks.{stage}" for stage in range(2, 7)}),
        ("tf_efficientnet_lite0", 1, {f"blocks.{stage}" for stage in range(1, 7)}),
        ("test_convnext", 2, {"stages_1", "stages_2", "stages_3"}),
        ("test_convnext", 5, set()),
    ],
)
def test_frozen_stages(name: str, freeze_at: int, trained: set[str]) -> None:
    backbone = TimmBackbone(name=name, out_features=STAGES, freeze_at=freeze_at).train()
    parts = 2 if name == "tf_efficientnet_lite0" else 1
    found = {
        ".".join(parameter.split(".")[1 : 1 + parts])
        for parameter, value in backbone.named_parameters()
        if value.requires_grad
    }
    assert found == trained
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))  # moves BatchNorm's statistics
    moved = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert {".".join(key.split(".")[1 : 1 + parts]) for key in moved} <= trained
    assert bool(moved) == (name == "tf_efficientnet_lite0")


@pytest.mark.parametrize(("features", "expected"), [(STAGES[1:], 3), (STAGES, 4)])
def test_what_no_feature_is_computed_with_is_not_trained(features: list[str], expected: int) -> None:
    """HRNet goes on at stride 4 to its end, also where nobody looks; several processes would wait for its gradient."""
    backbone = TimmBackbone(name="hrnet_w18_small", out_features=features).train()
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert len(maps) == expected
    sum(feature.square().sum() for feature in maps.values()).backward()
    trained = {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert (len(trained) < len(list(backbone.parameters()))) == (expected == 3)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("no_such_network", {}, "does not know"),
        ("resnet10t.no_such_tag", {}, "does not know"),
        ("test_vit", {}, r"strides \[16, 16, 16\], expected \[4, 8, 16, 32\]"),
        ("levit_128s", {}, r"strides \[16, 32, 64\]"),
        ("swin_tiny_patch4_window7_224", {}, r"any size, here 64 x 96 \(Input height \(64\) doesn't match model"),
        ("test_mambaout", {}, r"any size, here 64 x 96 \(shapes"),
        ("inception_v3", {}, "any size"),
        ("test_convnext", {"freeze_at": 1}, "FREEZE_AT 1: the first features of test_convnext have stride 4"),
        ("test_efficientnet", {"norm": "GN"}, "MODEL.TIMM.NORM GN"),
        ("test_efficientnet", {"negative_slope": 0.1}, "NEGATIVE_SLOPE of test_efficientnet"),
    ],
)
def test_networks_that_make_no_pyramid_are_refused_in_a_line(name: str, options: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        TimmBackbone(name=name, out_features=STAGES, **options)
    assert "\n" not in str(error.value)


def test_a_pyramid_without_the_finest_stride() -> None:
    backbone = build_backbone(pyramid_cfg("test_convnext", "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]))
    assert [shape.stride for shape in backbone.output_shape().values()] == [8, 16, 32, 64]


def test_a_training_step() -> None:
    torch.manual_seed(0)
    model = build_model(pyramid_cfg("test_efficientnet", "MODEL.BACKBONE.FREEZE_AT", 0)).train()
    objects = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[8.0, 8, 60, 50]])), gt_classes=torch.tensor([3]))
    with EventStorage():
        losses = model([{"image": torch.randint(0, 256, (3, 64, 96)), "instances": objects}] * 2)
    sum(losses.values()).backward()
    # The layer that predicts the boxes' deltas and the first of the network: gradients flow all the way down.
    for parameter in (model.roi_heads.box_predictor.bbox_pred.weight, next(model.backbone.bottom_up.parameters())):
        assert parameter.grad.abs().sum() > 0


def test_mean_and_deviation_follow_the_weights() -> None:
    assert normalisation_of("tf_efficientnet_lite0") == ([127.5] * 3, [127.5] * 3)
    mean, deviation = normalisation_of("resnet50.a1_in1k")
    assert mean == pytest.approx([123.675, 116.28, 103.53])
    assert deviation == pytest.approx([58.395, 57.12, 57.375])
    for unknown in ("no_such_network", "resnet50.no_such_tag"):
        with pytest.raises(UserError, match=f"{unknown}: timm knows no such"):
            normalisation_of(unknown)


def test_imagenet_weights_on_a_photograph(shared: Path) -> None:
    """The file of a whole classifier serves both detectors, whose features are then the classifier's."""
    file = shared / "weights" / "tf_efficientnet_lite0.pth"
    name = "tf_efficientnet_lite0"
    network = timm.create_model(name, checkpoint_path=str(file)).eval()
    image = Image.open(sorted((shared / "photos").glob("*.jpg"))[0]).convert("RGB").resize((224, 160))
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = intermediates(network, images)
    cfgs = [pyramid_cfg(name), detector_cfg("YOLOv3", name)]
    for cfg, wanted in zip(cfgs, (expected, expected[1:]), strict=True):
        cfg.MODEL.WEIGHTS = str(file)
        model = build_model(cfg).eval()
        load_initial_weights(model, cfg)
        backbone = next(module for module in model.modules() if isinstance(module, TimmBackbone))
        with torch.no_grad():
            features = backbone(images)
        for feature, other in zip(features.values(), wanted, strict=True):
            torch.testing.assert_close(feature, other, rtol=1e-4, atol=1e-4)
