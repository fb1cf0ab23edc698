"""Building a detector, new or from the folder of its run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_detectron2_model
from torch import nn

from common.runtime import resolve_precision
from detection import meta_arch as meta_arch  # registers it
from detection.checkpoint import load_weights
from detection.config import RecordingCfg, blamed_on, read_run_cfg
from detection.yolov3.darknet import fold_batch_norm


def build_model(cfg: CfgNode) -> nn.Module:
    """Builds `cfg.MODEL.META_ARCHITECTURE` on `cfg.MODEL.DEVICE` with random weights.

    With `MODEL.CHANNELS_LAST` convolutions run on NHWC memory.
    """
    model = build_detectron2_model(cfg)
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model


def load_detector(weights: Path, options: Sequence[str] = ()) -> tuple[CfgNode, nn.Module]:
    """A trained detector in inference mode, with the configuration that lies beside its weights.

    It is for inference only: YOLOv3's BatchNorm is folded into its convolutions, which changes nothing but roundings.

    Args:
        weights: a checkpoint in its run folder.
        options: KEY VALUE pairs over the configuration.

    Raises:
        UserError: weights or configuration are missing, broken, or do not fit each other.
    """
    cfg = RecordingCfg(read_run_cfg(weights.parent, options))
    with blamed_on(options[::2]):
        model = build_model(cfg)
    load_weights(model, weights)
    model.eval()
    fold_batch_norm(model, resolve_precision(cfg.MODEL.PRECISION, torch.device(cfg.MODEL.DEVICE)))
    return cfg, model
