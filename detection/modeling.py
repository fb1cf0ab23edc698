"""Building a detector, new or from the folder of its run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_detectron2_model
from torch import nn

from common.exported import ExportedModel, is_exported, read_card
from common.runtime import leave_cores, resolve_precision
from detection import meta_arch as meta_arch  # registers it
from detection.checkpoint import load_initial_weights, load_weights
from detection.classes import COCO_CLASSES, pair_classes
from detection.config import LEAF, META_ARCHITECTURES, RecordingCfg, blamed_on, read_run_cfg
from detection.exported import KIND, ExportedDetector, exported_cfg
from detection.starts import foreign_cfg, resolve_detector, run_of, set_classes
from detection.yolov3.darknet import fold_batch_norm


def build_model(cfg: CfgNode) -> nn.Module:
    """Builds `cfg.MODEL.META_ARCHITECTURE` on `cfg.MODEL.DEVICE` with random weights.

    With `MODEL.CHANNELS_LAST` convolutions run on NHWC memory.
    """
    model = build_detectron2_model(cfg)
    leave_cores(model)
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model


def load_detector(
    weights: str | Path, options: Sequence[str] = (), model: str = "faster_rcnn", classes: Sequence[str] | None = None
) -> tuple[CfgNode, nn.Module]:
    """A trained detector in inference mode, with its configuration.

    It is for inference only: BatchNorm of timm's networks is folded into their convolutions, which changes nothing but
    roundings.

    Args:
        weights: a run folder or a checkpoint in one; an exported file; or another whole detector, see
            `detection.starts`.
        options: KEY VALUE pairs over the configuration.
        model: which detector "coco" means.
        classes: what to detect in place of its own classes, for a third-party detector or one of COCO's classes. Names
            that it lacks get random weights or, with an exported file, no detections. Default: its own.

    Raises:
        UserError: weights or configuration are missing, broken, or do not fit each other.
    """
    source = resolve_detector(str(weights), model)
    if is_exported(source):
        exported = ExportedModel(Path(source), KIND)
        cfg = RecordingCfg(exported_cfg(exported.path, exported.card, options))
        pairs = [(number, number) for number in range(len(cfg.MODEL.CLASSES))]
        if classes and tuple(cfg.MODEL.CLASSES) == COCO_CLASSES:
            pairs = pair_classes(COCO_CLASSES, classes)
            set_classes(cfg, classes)
        return cfg, ExportedDetector(exported, cfg, pairs)
    cfg = RecordingCfg(read_detector_cfg(source, options))
    is_start = run_of(source) is None or bool(classes and tuple(cfg.MODEL.CLASSES) == COCO_CLASSES)
    if is_start:
        cfg.MODEL.WEIGHTS = source
        set_classes(cfg, classes or cfg.MODEL.CLASSES)
    with blamed_on(options[::2]):
        detector = build_model(cfg)
    if is_start:
        load_initial_weights(detector, cfg)
    else:
        load_weights(detector, source)
    detector.eval()
    fold_batch_norm(detector, resolve_precision(cfg.MODEL.PRECISION, torch.device(cfg.MODEL.DEVICE)))
    return cfg, detector


def start_by_model(start: str | None) -> dict[str, str]:
    """The detectors that a start gives, by the names of `detection.config.LEAF`: coco both, anything else what it is.

    Raises:
        UserError: it is no trained detector.
    """
    if start in (None, "coco"):
        return dict.fromkeys(LEAF, start) if start else {}
    architecture = read_detector_cfg(resolve_detector(start, "faster_rcnn")).MODEL.META_ARCHITECTURE
    return {model: start for model, architectures in META_ARCHITECTURES.items() if architecture in architectures}


def read_detector_cfg(source: str, options: Sequence[str] = ()) -> CfgNode:
    """The configuration of a whole detector: the one beside or in its file, or that of a third-party detector.

    Args:
        source: `MODEL.WEIGHTS`, see `detection.starts.resolve_detector`.
        options: KEY VALUE pairs over it.

    Raises:
        UserError: there is none, it is broken, or an option is wrong.
    """
    if is_exported(source):
        return exported_cfg(Path(source), read_card(Path(source), KIND), options)
    run = run_of(source)
    return read_run_cfg(run, options) if run else foreign_cfg(source, options)
