"""Weights into a detector: those of a run, third-party detectors, and classifiers for the backbones."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import nn

from common.errors import UserError
from common.weights import load_state, local_file, local_place, locate_weights, read_checkpoint, weights_of
from common.zoo_pickle import is_pickle, read_zoo_pickle
from detection.classes import carry_over, is_class_layer, pair_classes
from detection.config import read_run_cfg
from detection.starts import darknet_file, identify, run_of, unfetched
from detection.timm_backbone import TimmBackbone
from detection.torchvision_detectors import BACKBONE, convert_resnet, convert_torchvision, is_torchvision
from detection.yolov3.darknet_weights import is_darknet_file, read_darknet_weights
from detection.yolov3.meta_arch import YOLOv3
from detection.zoo import convert_zoo

logger = logging.getLogger(__name__)


def load_initial_weights(model: nn.Module, cfg: CfgNode) -> None:
    """Loads `cfg.MODEL.WEIGHTS` into a fresh model before training.

    The source is a file, or `torchvision://ResNet50_Weights.IMAGENET1K_V1`, `timm://darknet53.c2ns_in1k`,
    `darknet://yolov3.weights` or another name of these hubs; the empty string leaves the random weights. It may hold
    the classifier that the backbone is made of, or a whole detector. From a detector of other classes, the classes that
    both name are carried over; the outputs for the rest stay random, and the log says so.

    Raises:
        UserError: the weights cannot be fetched or read, or do not fit tensor for tensor.
    """
    source = cfg.MODEL.WEIGHTS
    if not source:
        logger.info("Training starts from random weights")
        return
    try:
        state, prefix, classes = _read(source, model)
    except ValueError as error:  # raised by code that does not know where the tensors come from
        raise UserError(f"{source}: {error}") from error
    if prefix:
        load_state(model, state, source, prefix)
        others = len(model.state_dict().keys() - state.keys())
        logger.info("Loaded the backbone from %s; %d tensors of the other parts are random", source, others)
        return
    own, wanted = model.state_dict(), cfg.MODEL.CLASSES
    class_layers = [name for name in own if name in state and is_class_layer(name)]
    if classes and wanted and classes != wanted:
        for name in class_layers:
            carried = carry_over(name, state[name], own[name].cpu(), classes, wanted)
            state[name] = state[name] if carried is None else carried
    random = load_state(model, state, source, replaceable=class_layers)
    if not classes or classes == wanted or random:
        logger.info("Loaded the detector from %s; random, since the classes are others: %s", source, random or "none")
        return
    known = [wanted[new] for _, new in pair_classes(classes, wanted)]
    fresh = [name for name in wanted if name not in known]
    logger.info(
        "Loaded the detector from %s. Classes carried over by name: %s; random: %s",
        *(source, ", ".join(known) or "none", ", ".join(fresh) or "none"),
    )


def _read(source: str, model: nn.Module) -> tuple[dict[str, torch.Tensor], str, Sequence[str] | None]:
    """Reads weights for a model, whatever they are.

    Returns:
        The tensors under the model's names; the part of it that they are for, "" for all of it; and the classes that
        they detect, where that is known.

    Raises:
        UserError: they cannot be had.
        ValueError: they belong to another network.
    """
    hub, _, name = source.rpartition("://")
    path = darknet_file(name) if hub == "darknet" else Path(source)
    if path.is_file() and is_darknet_file(path):
        return _read_darknet(path, model)
    if path.is_file() and is_pickle(path):
        state, part = convert_zoo(read_zoo_pickle(path), model)
        found = identify(str(path))
        return state, part, list(found.classes) if found else None
    state = weights_of(read_checkpoint(path)) if not hub else _fetch(source)
    prefix, network = next(((f"{n}.", m) for n, m in model.named_modules() if isinstance(m, TimmBackbone)), ("", None))
    if network and not any(name.startswith("backbone.") for name in state):
        return {f"{prefix}{name}": value for name, value in network.convert_timm(state).items()}, prefix, None
    if "layer1.0.conv1.weight" in state:
        return convert_resnet(state), BACKBONE, None
    if is_torchvision(state):
        state = convert_torchvision(state)
    if found := identify(source):
        return state, "", list(found.classes)
    run = run_of(source)
    return state, "", read_run_cfg(run).MODEL.CLASSES if run else None


def _read_darknet(path: Path, model: nn.Module) -> tuple[dict[str, torch.Tensor], str, Sequence[str] | None]:
    """Reads one of Darknet's files, a whole detector where it is a known one, else its backbone; see `_read`."""
    found = identify(str(path))
    if found is None:
        backbone = model.get_submodule("backbone")
        read = read_darknet_weights(path, backbone, partly=True)
        logger.info("%s: %d values, %d left over beyond the backbone", path, read.values_read, read.values_left)
        return {f"backbone.{name}": value for name, value in backbone.state_dict().items()}, "backbone.", None
    if not isinstance(model, YOLOv3):
        raise UserError(f"{path}: is a YOLOv3 of Darknet, expected weights of the network that is configured")
    whole = copy.deepcopy(model).cpu()
    for level in whole.get_submodule("head.levels").children():
        layer = level.get_submodule("prediction")
        assert isinstance(layer, nn.Conv2d)
        num_anchors = layer.out_channels // (5 + model.num_classes)
        level.prediction = nn.Conv2d(layer.in_channels, num_anchors * (5 + len(found.classes)), 1)
    read_darknet_weights(path, whole)
    return whole.state_dict(), "", list(found.classes)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a trained detector, the average of its weights where there is one; every tensor must fit.

    Raises:
        UserError: the file is not a checkpoint of this model and number of classes.
    """
    load_state(model, weights_of(read_checkpoint(path)), path)


def _fetch(source: str) -> dict[str, torch.Tensor]:
    hub, name = source.split("://", 1)
    file = f"{name}.safetensors"
    try:
        if hub == "torchvision":
            from torchvision.models import get_weight

            weights = get_weight(name)
            file = local_place(weights.url).name
            if local := local_file(weights.url):
                return weights_of(read_checkpoint(local))
            return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        if hub == "timm":
            import timm

            overlay = locate_weights(name)
            return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except UserError:  # of a file in weights/
        raise
    except Exception as error:  # each hub has kinds of its own for a name that it does not know
        raise unfetched(source, file, error) from error
    raise UserError(f"MODEL.WEIGHTS {source}: expected a file, torchvision://NAME, timm://NAME or darknet://NAME")
