"""Converted weights of torchvision's detectors against those detectors themselves, on random weights."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN,
    FasterRCNN_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.misc import FrozenBatchNorm2d

from common.weights import load_state
from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
from detection.torchvision_detectors import (
    TorchvisionAnchorGenerator,
    TorchvisionOutputLayers,
    convert_torchvision,
    is_torchvision,
    is_torchvision_v2,
)

CATEGORIES = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
# Few proposals: the head of the second version costs a hundred million multiplications for each.
FEW = {"rpn_post_nms_top_n_test": 40}
SMALL = {"min_size": 96, "max_size": 200}


@torch.no_grad()
def randomise(model: FasterRCNN) -> FasterRCNN:
    """Random weights under which each layer counts, boxes move, and some classes are likely."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            # The last of a residual block is small, else fifty layers would amplify what is rounded otherwise.
            low, high = (0.1, 0.3) if name.endswith("bn3") else (0.5, 1.5)
            nn.init.uniform_(module.weight, low, high)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.05)
    nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.02)
    model.backbone.train()
    images, _ = model.transform(list(torch.rand(4, 3, 96, 128)))
    pyramid = list(model.backbone(images.tensors).values())
    model.roi_heads.box_head.train()
    pooled = F.adaptive_avg_pool2d(pyramid[0], 7).repeat(2, 1, 1, 1) + torch.randn(8, 256, 7, 7)
    features = model.roi_heads.box_head(pooled)
    predictor = model.roi_heads.box_predictor
    nn.init.normal_(predictor.cls_score.weight, std=2.5 / float(features.square().sum(1).mean().sqrt()))
    nn.init.normal_(predictor.bbox_pred.weight, std=0.5 / float(features.square().sum(1).mean().sqrt()))
    if model.roi_heads.box_predictor.cls_score.out_features == len(CATEGORIES):
        never = [index for index, name in enumerate(CATEGORIES) if name == "N/A"]
        predictor.cls_score.bias[never] = -50  # as training leaves what never occurs
    return model.eval()


def first_version() -> FasterRCNN:
    """As it is built without weights: BatchNorm."""
    return randomise(fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=21, **FEW, **SMALL))


def published_first_version() -> FasterRCNN:
    """As it is built for its COCO weights: frozen BatchNorm with an epsilon of 0, which small variances show."""
    learned = randomise(fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=91, **FEW, **SMALL))
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d)
    model = FasterRCNN(backbone, 91, **FEW, **SMALL)
    model.load_state_dict(learned.state_dict())
    overwrite_eps(model, 0.0)
    first, norm = model.backbone.body.conv1, model.backbone.body.bn1
    first.weight.data[:8] *= 0.01
    norm.running_mean[:8] *= 0.01
    norm.running_var[:8] *= 0.0001
    return model.eval()


def second_version() -> FasterRCNN:
    return randomise(fasterrcnn_resnet50_fpn_v2(weights_backbone=None, num_classes=91, **FEW, **SMALL))


def ours(leaf: str, state: dict[str, Tensor], num_classes: int) -> nn.Module:
    """Our network by the leaf, with converted weights, each of which has its place."""
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"{leaf}.yaml")
    options = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.CHANNELS_LAST",
        False,
        "MODEL.PRECISION",
        "float32",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        num_classes,
    ]
    cfg.merge_from_list([*options, "MODEL.RPN.POST_NMS_TOPK_TEST", FEW["rpn_post_nms_top_n_test"]])
    model = build_model(cfg).eval()
    load_state(model, convert_torchvision(state), "torchvision")
    return model


@pytest.mark.parametrize(
    ("build", "leaf", "num_classes"),
    [
        (first_version, "faster_rcnn_R_50_FPN_coco", 20),
        (published_first_version, "faster_rcnn_R_50_FPN_coco", 80),
        (second_version, "faster_rcnn_R_50_FPN_v2_coco", 80),
    ],
)
def test_boxes_and_scores_are_those_of_torchvision(build: Callable, leaf: str, num_classes: int) -> None:
    torch.manual_seed(0)
    theirs = build()
    state = theirs.state_dict()
    assert is_torchvision(state)
    assert is_torchvision_v2(state) == ("v2" in leaf)
    model = ours(leaf, state, num_classes)
    names = [name for name in CATEGORIES[1:] if name != "N/A"] if num_classes == 80 else CATEGORIES[1:21]
    # Resized to 96 x 96, whose coarsest level has a stride of 48, to 124 x 96, and to 95 x 200, the limit.
    for size in ((80, 80), (113, 87), (49, 103)):
        image = torch.rand(3, *size, generator=torch.Generator().manual_seed(sum(size)))
        scale = min(96 / min(size), 200 / max(size))
        resized = F.interpolate(image[None], scale_factor=scale, mode="bilinear", recompute_scale_factor=True)[0]
        with torch.no_grad():
            (expected,) = theirs([image])
            found = model([{"image": resized * 255, "height": size[0], "width": size[1]}])[0]["instances"]
        assert len(found) == len(expected["boxes"]) > 20
        assert len(set(found.pred_classes.tolist())) > 5
        assert [names[index] for index in found.pred_classes] == [CATEGORIES[index] for index in expected["labels"]]
        torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found.pred_boxes.tensor, expected["boxes"], rtol=0, atol=1e-4)


def test_anchors_are_those_of_torchvision() -> None:
    """On sides where max-pooling rounds up, down to one cell, and where it does not."""
    sizes, ratios = ((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5
    strides = (4, 8, 16, 32, 64)
    shapes = [ShapeSpec(channels=8, stride=stride) for stride in strides]
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / "faster_rcnn_R_50_FPN_coco.yaml")
    generator = TorchvisionAnchorGenerator(cfg, shapes)
    for height, width in ((96, 160), (32, 64), (608, 800)):
        features = [torch.zeros(1, 8, -(-height // stride), -(-width // stride)) for stride in strides]
        images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
        (expected,) = AnchorGenerator(sizes, ratios)(images, features)
        assert torch.equal(torch.cat([boxes.tensor for boxes in generator(features)]), expected)


def test_boxes_that_the_edge_leaves_thin_are_no_detections() -> None:
    """Moved to the right by 0.8 of its width a box of 50 pixels keeps 10 of them; moved by its width it keeps none."""
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    layers = TorchvisionOutputLayers(ShapeSpec(channels=4), box2box_transform=transform, num_classes=2)
    proposals = Instances((60, 100), proposal_boxes=Boxes(torch.tensor([[50.0, 10, 100, 40]])))
    logits = torch.tensor([[1.0, 2, 0]])
    (scores,) = layers.predict_probs((logits, torch.tensor([[0.8, 0, 0, 0, 1, 0, 0, 0]])), [proposals])
    expected = logits.softmax(1)
    expected[0, 1] = 0
    torch.testing.assert_close(scores, expected)


def test_names_of_old_files() -> None:
    """The published file of the first version was saved before torchvision put these layers into sequences."""
    state = fasterrcnn_resnet50_fpn(weights_backbone=None).state_dict()
    old = {}
    for name, value in state.items():
        for new in (
            "rpn.head.conv.0.0.",
            *(f"backbone.fpn.{b}_blocks.{i}.0." for b in ("inner", "layer") for i in range(4)),
        ):
            if name.startswith(new):
                name = new.replace(".0.0.", ".").replace(".0.", ".") if "rpn" in new else new.removesuffix("0.")
                name += "weight" if value.dim() > 1 else "bias"
        old[name] = value
    assert old.keys() != state.keys()
    expected, found = convert_torchvision(state), convert_torchvision(old)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize(
    "stranger",
    ["roi_heads.mask_head.mask_fcn1.weight", "backbone.body.layer5.0.conv1.weight", "rpn.head.conv.0.0.gamma"],
)
def test_a_tensor_without_a_place_is_refused(stranger: str) -> None:
    state = fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=3).state_dict()
    with pytest.raises(ValueError, match=stranger.removeprefix("backbone.body.").replace(".", r"\.")) as error:
        convert_torchvision({**state, stranger: torch.zeros(1)})
    assert "\n" not in str(error.value)
