"""Building a detector: Detectron2's model, in the memory layout and precision in which the machine is fast."""

import types
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.modeling.poolers import ROIPooler
from torch import nn

from detection.checkpoint import load_weights
from detection.config import read_run_cfg
from detection.roi_align import ROIAlign
from detection.yolov3.darknet import fold_batch_norm


def build_model(cfg: CfgNode) -> nn.Module:
    """Builds `cfg.MODEL.META_ARCHITECTURE` on `cfg.MODEL.DEVICE` with random weights.

    With `MODEL.CHANNELS_LAST` convolutions run on NHWC memory; with `MODEL.BF16` the forward pass is autocast to
    bfloat16, which needs no gradient scaler. The layers that predict logits and box deltas stay in float32: the eight
    bits of a bfloat16 mantissa would tie many scores. ROIAlign is this project's own, see there.
    """
    model = build_detectron2_model(cfg)
    for module in model.modules():
        if isinstance(module, ROIPooler) and cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE == "ROIAlignV2":
            module.level_poolers = nn.ModuleList(
                ROIAlign(level.output_size[0], level.spatial_scale, level.sampling_ratio)
                for level in module.level_poolers
            )
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if _runs_in_bf16(cfg):
        device = torch.device(cfg.MODEL.DEVICE).type
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
        for module in _prediction_layers(model):
            _keep_float32(module, device)
    return model


def load_detector(weights: Path) -> tuple[CfgNode, nn.Module]:
    """A trained detector in inference mode, with the configuration that lies beside its weights.

    It is for inference only: YOLOv3's BatchNorm is folded into its convolutions, which changes nothing but roundings.

    Raises:
        UserError: weights or configuration are missing, broken, or do not fit each other.
    """
    cfg = read_run_cfg(weights.parent)
    model = build_model(cfg)
    load_weights(model, weights)
    model.eval()
    fold_batch_norm(model, torch.bfloat16 if _runs_in_bf16(cfg) else torch.float32)
    return cfg, model


def _prediction_layers(model: nn.Module) -> Iterable[nn.Module]:
    """The last layers of Faster R-CNN; YOLOv3 keeps its own in float32."""
    if hasattr(model, "proposal_generator"):
        yield model.proposal_generator.rpn_head.objectness_logits
        yield model.proposal_generator.rpn_head.anchor_deltas
    if hasattr(model, "roi_heads"):
        yield model.roi_heads.box_predictor.cls_score
        yield model.roi_heads.box_predictor.bbox_pred


def _runs_in_bf16(cfg: CfgNode) -> bool:
    """Whether bfloat16 is wanted, and the device fast in it."""
    if not cfg.MODEL.BF16:
        return False
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def _keep_float32(module: nn.Module, device: str) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, enabled=False):
            return type(self).forward(self, x.float())

    module.forward = types.MethodType(forward, module)
