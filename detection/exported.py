"""Detectors that another runtime computes, in the place of Detectron2's: see `common.exported`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from common.errors import UserError
from common.exported import ExportedModel
from common.runtime import default_device
from detection.config import get_cfg, merge_options, merge_yaml
from detection.test_time_augmentation import TTA

KIND = "detector"


class ExportedDetector(nn.Module):
    """Takes and returns what the meta-architectures do; images run one by one.

    Args:
        model: the exported file, opened.
        cfg: its configuration, of which only test-time augmentation still has an effect.
        classes: pairs of a class of the file and its number in what is returned; objects of others are left out.
    """

    def __init__(self, model: ExportedModel, cfg: CfgNode, classes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.model = model
        self.numbers = torch.full((len(model.card["class_names"]),), -1)
        for old, new in classes:
            self.numbers[old] = new
        self.test_augmentation = None
        if cfg.TEST.AUG.ENABLED:
            is_yolov3 = cfg.MODEL.META_ARCHITECTURE == "YOLOv3"
            nms_thresh = cfg.MODEL.YOLOV3.NMS_THRESH_TEST if is_yolov3 else cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
            self.test_augmentation = TTA.from_config(cfg, nms_thresh)

    def forward(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Detects, see `detection.meta_arch.DetectorMixin`."""
        if self.test_augmentation is None:
            return self._detect(batched_inputs)
        return self.test_augmentation(self._detect, batched_inputs)

    def _detect(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        outputs = []
        for inputs in batched_inputs:
            height, width = inputs["image"].shape[1:]
            boxes, labels = self.model(inputs["image"])
            labels = self.numbers.to(labels.device)[labels]
            boxes, labels = boxes[labels >= 0], labels[labels >= 0]
            found = Instances((height, width), pred_boxes=Boxes(boxes[:, :4]), scores=boxes[:, 4], pred_classes=labels)
            outputs.append(
                {"instances": detector_postprocess(found, inputs.get("height", height), inputs.get("width", width))}
            )
        return outputs


def exported_cfg(path: Path, card: Mapping[str, Any], options: Sequence[str] = ()) -> CfgNode:
    """The configuration of the run that a detector was exported from, with KEY VALUE pairs over it.

    Args:
        path: the exported file.
        card: what it says of its model.
        options: the pairs.

    Raises:
        UserError: it has no configuration, or an option is wrong.
    """
    if "config" not in card:
        raise UserError(f"{path}: holds no configuration; expected a detector that make export has written")
    cfg = get_cfg()
    merge_yaml(cfg, card["config"], path)
    cfg.MODEL.DEVICE = default_device()
    merge_options(cfg, options)
    return cfg
