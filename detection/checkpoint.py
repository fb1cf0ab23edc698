"""Weights into a detector: those of a run, and of torchvision, timm or Darknet for the backbones."""

import logging
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import nn

from common.errors import UserError
from common.weights import load_state, locate_weights, read_checkpoint, weights_of
from detection.timm_backbone import TimmBackbone
from detection.torchvision_detectors import BACKBONE, convert_resnet
from detection.yolov3.darknet_weights import read_darknet_weights

logger = logging.getLogger(__name__)


def load_initial_weights(model: nn.Module, cfg: CfgNode) -> None:
    """Loads `cfg.MODEL.WEIGHTS` into a fresh model before training.

    The source is a file or `torchvision://ResNet50_Weights.IMAGENET1K_V1`, `timm://darknet53.c2ns_in1k` or another name
    of these hubs; the empty string leaves the random weights. A file may hold the classifier that the backbone is made
    of, Darknet's `.weights` (its backbone is taken), or a whole detector; the layers that predict classes are left at
    random, with a line in the log, where the file's classes are others.

    Raises:
        UserError: the weights cannot be had, or do not fit tensor for tensor.
    """
    source = cfg.MODEL.WEIGHTS
    if not source:
        logger.info("Training starts from random weights")
        return
    if source.endswith(".weights"):
        found = read_darknet_weights(Path(source), model.get_submodule("backbone"), partly=True)
        logger.info(
            "Loaded the backbone from %s: %d values, %d left over. To keep a whole detector: tools.convert_darknet",
            source, found.values_read, found.values_left,
        )  # fmt: skip
        return
    state = _fetch(source) if "://" in source else weights_of(read_checkpoint(source))
    of_backbone = None
    prefix, network = next(((f"{n}.", m) for n, m in model.named_modules() if isinstance(m, TimmBackbone)), ("", None))
    if network and not any(name.startswith("backbone.") for name in state):
        of_backbone = {f"{prefix}{name}": value for name, value in network.convert_timm(state).items()}
    elif "layer1.0.conv1.weight" in state:
        of_backbone, prefix = convert_resnet(state), BACKBONE
    if of_backbone is not None:
        load_state(model, of_backbone, source, prefix)
        others = len(model.state_dict().keys() - of_backbone.keys())
        logger.info("Loaded the backbone from %s; %d tensors of the other parts are random", source, others)
        return
    class_layers = [name for name in model.state_dict() if name in state and is_class_layer(name)]
    random = load_state(model, state, source, replaceable=class_layers)
    logger.info("Loaded the detector from %s; random, since the classes are others: %s", source, random or "none")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a trained detector, the average of its weights where there is one; every tensor must fit.

    Raises:
        UserError: the file is not a checkpoint of this model and number of classes.
    """
    load_state(model, weights_of(read_checkpoint(path)), path)


def is_class_layer(name: str) -> bool:
    """Whether a parameter's shape depends on the number of classes."""
    return "box_predictor" in name or ".prediction" in name


def _fetch(source: str) -> dict[str, torch.Tensor]:
    hub, name = source.split("://", 1)
    try:
        if hub == "torchvision":
            from torchvision.models import get_weight

            return get_weight(name).get_state_dict(progress=True, check_hash=True, weights_only=True)
        if hub == "timm":
            import timm

            overlay = locate_weights(name)
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except Exception as error:  # each hub has kinds of its own for a name that it does not know
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{source}: pretrained weights cannot be fetched ({reason}); "
            "give a file (WEIGHTS=path) or start from random weights (PRETRAINED=0)"
        ) from error
    raise UserError(f"MODEL.WEIGHTS {source}: expected a file, torchvision://NAME or timm://NAME")
