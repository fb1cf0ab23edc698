"""torchvision's ResNet and Faster R-CNN in Detectron2's terms: anchors, thin boxes, names of weights, order of classes.

`detection/configs/faster_rcnn_R_50_FPN_coco.yaml` and its `_v2_` have the settings that compute as torchvision does.
"""

import re

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

# Sides in pixels of the network's input that torchvision's proposals and detections have at least.
MIN_PROPOSAL, MIN_DETECTION = 1e-3, 1e-2
# Epsilon of Detectron2's BatchNorm; torchvision computes with 0 in the frozen ones of its COCO weights.
NORM_EPS = 1e-5
BACKBONE = "backbone.bottom_up."
# The first match says where a tensor goes. Files of old have `inner_blocks.0.weight` for `inner_blocks.0.0.weight`.
RULES = (
    (r"backbone\.fpn\.inner_blocks\.(\d)\.1\.(.+)", "backbone.fpn_lateral{level}.norm.{1}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.1\.(.+)", "backbone.fpn_output{level}.norm.{1}"),
    (r"backbone\.fpn\.inner_blocks\.(\d)(?:\.0)?\.(weight|bias)", "backbone.fpn_lateral{level}.{1}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)(?:\.0)?\.(weight|bias)", "backbone.fpn_output{level}.{1}"),
    (r"rpn\.head\.conv\.(weight|bias)", "proposal_generator.rpn_head.conv.{0}"),
    (r"rpn\.head\.conv\.(\d)\.0\.(weight|bias)", "proposal_generator.rpn_head.conv.conv{0}.{1}"),
    (r"rpn\.head\.cls_logits\.(weight|bias)", "proposal_generator.rpn_head.objectness_logits.{0}"),
    (r"rpn\.head\.bbox_pred\.(weight|bias)", "proposal_generator.rpn_head.anchor_deltas.{0}"),
    (r"roi_heads\.box_head\.fc6\.(weight|bias)", "roi_heads.box_head.fc1.{0}"),
    (r"roi_heads\.box_head\.fc7\.(weight|bias)", "roi_heads.box_head.fc2.{0}"),
    (r"roi_heads\.box_head\.([0-3])\.0\.(weight)", "roi_heads.box_head.conv{next}.{1}"),
    (r"roi_heads\.box_head\.([0-3])\.1\.(.+)", "roi_heads.box_head.conv{next}.norm.{1}"),
    (r"roi_heads\.box_head\.5\.(weight|bias)", "roi_heads.box_head.fc1.{0}"),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias)", "roi_heads.box_predictor.{0}.{1}"),
)


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Anchors as torchvision's `AnchorGenerator` lays them.

    Their corners are whole numbers, and their strides are the sides of the padded image divided by those of the level.
    That is another stride than the usual one where max-pooling rounds up: 48 instead of 64 on a side of 96 pixels.
    """

    def generate_cell_anchors(self, sizes: tuple[float, ...], aspect_ratios: tuple[float, ...]) -> Tensor:
        """Anchors (A, 4) around the origin, XYXY in pixels."""
        return super().generate_cell_anchors(sizes, aspect_ratios).round()

    def _grid_anchors(self, grid_sizes: list[list[int]]) -> list[Tensor]:
        """Anchors (H * W * A, 4) of each level, whose size (H, W) is given, the finest first."""
        anchors = []
        finest = self.strides[0]
        for (height, width), cell_anchors in zip(grid_sizes, self.cell_anchors, strict=True):
            steps = [finest * grid_sizes[0][0] // height, finest * grid_sizes[0][1] // width]
            y, x = (
                (torch.arange(count, device=cell_anchors.device) + self.offset) * step
                for count, step in zip((height, width), steps, strict=True)
            )
            y, x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
            anchors.append((shifts + cell_anchors).view(-1, 4))
        return anchors


@PROPOSAL_GENERATOR_REGISTRY.register()
class TorchvisionRPN(RPN):
    """Detectron2's RPN without proposals thinner than a thousandth of a pixel."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Reads what Detectron2's class reads."""
        parts = super().from_config(cfg, input_shape)
        return {**parts, "min_box_size": max(parts["min_box_size"], MIN_PROPOSAL)}


class TorchvisionOutputLayers(FastRCNNOutputLayers):
    """Detectron2's predictor without detections thinner than a hundredth of a pixel, as edges of the image leave them.

    They go before non-maximum suppression, so that they take no other's place among the best hundred.
    """

    def predict_probs(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> tuple[Tensor, ...]:
        """Probabilities (R, K + 1) of the R proposals of each image, 0 for classes whose box is too thin."""
        probabilities = []
        for scores, boxes, image in zip(
            super().predict_probs(predictions, proposals),
            self.predict_boxes(predictions, proposals),
            proposals,
            strict=True,
        ):
            clipped = Boxes(boxes.reshape(-1, 4))
            clipped.clip(image.image_size)
            corners = clipped.tensor.view(len(boxes), -1, 4)
            thin = (corners[..., 2:] - corners[..., :2]).amin(-1) < MIN_DETECTION
            probabilities.append(torch.cat([scores[:, :-1].masked_fill(thin, 0), scores[:, -1:]], dim=1))
        return tuple(probabilities)


@ROI_HEADS_REGISTRY.register()
class TorchvisionROIHeads(StandardROIHeads):
    """Detectron2's heads with `TorchvisionOutputLayers`."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        parts = super()._init_box_head(cfg, input_shape)
        return {**parts, "box_predictor": TorchvisionOutputLayers(cfg, parts["box_head"].output_shape)}


def is_torchvision(state: dict[str, Tensor]) -> bool:
    """Whether tensors are named as in torchvision's two-stage detectors."""
    return "rpn.head.cls_logits.weight" in state


def is_torchvision_v2(state: dict[str, Tensor]) -> bool:
    """Whether tensors of a torchvision detector are named as in `fasterrcnn_resnet50_fpn_v2`."""
    return "roi_heads.box_head.0.0.weight" in state


def convert_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of `fasterrcnn_resnet50_fpn` and `fasterrcnn_resnet50_fpn_v2` to those of Detectron2.

    The background moves from the first class to the last and loses its boxes. Of 91 classes, numbered as COCO's
    categories, the eighty that are no placeholders are kept: the others never occur in training, so their probability
    is almost zero. BatchNorm's step counters are dropped. A network without them has frozen BatchNorms, which
    torchvision computes with an epsilon of 0; their variances are lowered by the epsilon that is added here.

    Raises:
        ValueError: a tensor has no place.
    """
    converted = convert_resnet(
        {name[len("backbone.body.") :]: value for name, value in state.items() if name.startswith("backbone.body.")}
    )
    if not any(name.endswith("num_batches_tracked") for name in state):
        converted = {
            name: value - NORM_EPS if name.endswith("running_var") else value for name, value in converted.items()
        }
    depth = len({name for name in state if re.fullmatch(r"rpn\.head\.conv\.\d\.0\.weight", name)})
    rows = _rows_of_classes(len(state["roi_heads.box_predictor.cls_score.bias"]))
    for name, value in state.items():
        if name.startswith("backbone.body.") or name.endswith("num_batches_tracked"):
            continue
        new = _renamed(name)
        if depth == 1:
            new = new.replace(".conv.conv0.", ".conv.")
        if "cls_score" in new:
            value = value[[*rows, 0]]
        elif "box_predictor.bbox_pred" in new:
            value = value.view(-1, 4, *value.shape[1:])[rows].flatten(0, 1)
        converted[new] = value
    return converted


def convert_resnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of torchvision's and timm's ResNet to Detectron2's `backbone.bottom_up`.

    `conv1`, `bn1` become the stem; `layer1` to `layer4` become `res2` to `res5`; a block's `bnK` becomes `convK.norm`
    and its `downsample` the `shortcut`. The classifier (`fc`) and BatchNorm's step counters are the only ones dropped.

    Raises:
        ValueError: a tensor has a name that no ResNet has.
    """
    converted = {}
    for name, value in state.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        new = re.sub(r"^(conv1|bn1)\.", lambda match: f"stem.{match[1]}.", name)
        new = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", new)
        new = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", new)
        new = new.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        if not re.match(r"(stem|res[2-5])\.", new):
            raise ValueError(f"tensor {name} belongs to no plain ResNet; expected conv1, bn1, layer1-4, fc")
        converted[BACKBONE + new] = value
    return converted


def _renamed(name: str) -> str:
    for pattern, new in RULES:
        if match := re.fullmatch(pattern, name):
            number = int(match[1]) if match[1].isdecimal() else 0
            return new.format(*match.groups(), level=number + 2, next=number + 1)
    raise ValueError(
        f"tensor {name} has no place in Faster R-CNN; expected torchvision's fasterrcnn_resnet50_fpn or "
        "fasterrcnn_resnet50_fpn_v2"
    )


def _rows_of_classes(count: int) -> list[int]:
    """Indices of the classes to keep among `count`, the background being the first."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [row for row in range(1, count) if count != len(names) or names[row] != "N/A"]
