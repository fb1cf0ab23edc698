"""What both meta-architectures share, and Faster R-CNN as it runs here: precision, batches, a ROIAlign for CPUs."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign as Detectron2ROIAlign
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from common.runtime import autocast
from detection.roi_align import ROIAlign
from detection.test_time_augmentation import TTA


def padded_size(size: Sequence[int], divisibility: int) -> tuple[int, int]:
    """Height and width once padded to multiples of `divisibility`; unchanged where that is 0."""
    multiple = max(divisibility, 1)
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


class DetectorMixin(nn.Module):
    """What both meta-architectures do around Detectron2's `forward`; mixed in, it comes first.

    They run under autocast. In evaluation what is found in an image does not depend on the rest of its batch, since
    only images that are padded to the same size run together, and test-time augmentation merges its views.

    Attributes:
        precision: see `common.runtime.autocast`.
        test_augmentation: how images are looked at in evaluation; None for once, as they are.
    """

    precision: str = "float32"
    test_augmentation: TTA | None = None
    device: torch.device
    backbone: Backbone

    def forward(self, batched_inputs: list[dict]) -> Any:
        """Losses in training, detections in evaluation.

        Args:
            batched_inputs: for each image `image`, (3, H, W), RGB with values 0 to 255; for training also `instances`
                with `gt_boxes` in its pixels and `gt_classes`; in evaluation, where wanted, `height` and `width` of the
                output.

        Returns:
            In training the losses by name; in evaluation for each image `instances` with `pred_boxes`, `scores` and
            `pred_classes`, best first.
        """
        with autocast(self.device, self.precision):
            if self.training:
                return super().forward(batched_inputs)
            if self.test_augmentation is None:
                return self._detect(batched_inputs)
            return self.test_augmentation(self._detect, batched_inputs)

    def _detect(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        outputs: dict[int, dict[str, Instances]] = {}
        for indices in self.groups(batched_inputs):
            group = super().forward([batched_inputs[index] for index in indices])
            outputs.update(zip(indices, group, strict=True))
        return [outputs[index] for index in range(len(batched_inputs))]

    def groups(self, batched_inputs: list[dict]) -> list[list[int]]:
        """Indices of the images that run together, group by group: in training all, else those padded to one size."""
        if self.training:
            return [list(range(len(batched_inputs)))]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, inputs in enumerate(batched_inputs):
            padded = padded_size(inputs["image"].shape[-2:], self.backbone.size_divisibility)
            groups.setdefault(padded, []).append(index)
        return list(groups.values())


@META_ARCH_REGISTRY.register()
class FasterRCNN(DetectorMixin, GeneralizedRCNN):
    """Detectron2's Faster R-CNN in the precision of `MODEL.PRECISION`, with this project's ROIAlign.

    The layers that predict logits and box deltas stay in float32: the eight bits of a bfloat16 mantissa would tie many
    scores.
    """

    proposal_generator: RPN
    roi_heads: StandardROIHeads

    @configurable
    def __init__(self, *, precision: str, test_augmentation: TTA | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        self.precision = precision
        self.test_augmentation = test_augmentation
        for module in self.modules():
            if isinstance(module, ROIPooler):
                module.level_poolers = nn.ModuleList(
                    ROIAlign(level.output_size[0], level.spatial_scale, level.sampling_ratio, level.aligned)
                    if isinstance(level, Detectron2ROIAlign)
                    else level
                    for level in module.level_poolers
                )
        rpn, predictor = self.proposal_generator.rpn_head, self.roi_heads.box_predictor
        rpn.objectness_logits.__class__ = rpn.anchor_deltas.__class__ = Float32Conv2d
        predictor.cls_score.__class__ = predictor.bbox_pred.__class__ = Float32Linear

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads what Detectron2's class reads, `MODEL.PRECISION` and `TEST.AUG`."""
        return {
            **super().from_config(cfg),
            "precision": cfg.MODEL.PRECISION,
            "test_augmentation": TTA.from_config(cfg, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST),
        }


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of any type to float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) of any type to float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())
