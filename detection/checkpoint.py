"""Weights in and out: checkpoints of a run, and weights of torchvision, timm or Darknet for the backbones.

Nothing is ever unpickled: `.pth` files are read with `weights_only=True`, and `.pkl` files are refused.
"""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from common.errors import UserError
from detection.yolov3.darknet import Darknet
from detection.yolov3.darknet_weights import read_darknet_weights
from tools.hub import locate_weights
from tools.run_folder import write_atomically

logger = logging.getLogger(__name__)

BACKBONE = "backbone.bottom_up."
CLASSIFIER = r"(head|fc|classifier)\."  # of timm's networks


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint aside and renames it: `path` is always a whole file."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.pth` or `.safetensors` file to the CPU.

    Returns:
        What was saved; a bare state dict is wrapped as `{"model": state dict}`.

    Raises:
        UserError: the file is missing, a pickle, or not readable as tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; expected a .pth or .safetensors file")
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(f"{path}: is a pickle, which can run code when read; expected .pth or .safetensors: convert it")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"model": load_file(path)}
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: is no whole file of weights, or holds more than tensors and plain values, which is never run; "
            "expected .pth or .safetensors"
        ) from error
    except Exception as error:  # torch raises a dozen kinds for broken archives
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); expected a whole .pth or .safetensors file"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}; expected a dict of tensors")
    if "model" not in checkpoint:
        checkpoint = {"model": checkpoint.get("state_dict", checkpoint)}
    state = checkpoint["model"]
    if not (isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values())):
        raise UserError(f"{path}: holds no weights; expected names with tensors, by themselves or under 'model'")
    return checkpoint


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
        found = read_darknet_weights(Path(source), model.backbone, partly=True)
        logger.info(
            "Loaded the backbone from %s: %d values, %d left over. To keep a whole detector: tools.convert_darknet",
            source, found.values_read, found.values_left,
        )  # fmt: skip
        return
    state = _fetch(source) if "://" in source else load_checkpoint(source)["model"]
    if isinstance(model.backbone, Darknet) and not any(name.startswith("backbone.") for name in state):
        missing = _load(model, convert_classifier(model.backbone, state), source, only="backbone.")
        logger.info("Loaded the backbone from %s; %d tensors of the other parts are random", source, missing)
        return
    if "layer1.0.conv1.weight" in state:
        missing = _load(model, convert_resnet(state), source, only=BACKBONE)
        logger.info("Loaded the backbone from %s; %d tensors of the other parts are random", source, missing)
        return
    own = model.state_dict()
    other_classes = [
        name for name, value in state.items() if name in own and value.shape != own[name].shape and is_class_layer(name)
    ]
    # Those stay as they are.
    _load(model, {**state, **{name: own[name] for name in other_classes}}, source)
    logger.info(
        "Loaded the detector from %s; random, since the classes are others: %s", source, other_classes or "none"
    )


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Loads a trained detector; every tensor must fit. Returns the checkpoint.

    Raises:
        UserError: the file is not a checkpoint of this model and number of classes.
    """
    checkpoint = load_checkpoint(path)
    _load(model, checkpoint["model"], str(path))
    return checkpoint


def is_class_layer(name: str) -> bool:
    """Whether a parameter's shape depends on the number of classes."""
    return "box_predictor" in name or ".prediction" in name


def convert_classifier(backbone: Darknet, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of a timm classifier to those of `backbone`; only the classifying layers are dropped.

    Raises:
        UserError: another tensor has no place in the backbone.
    """
    converted = backbone.convert_timm(state)
    kept = {id(value) for value in converted.values()}
    strangers = [name for name, value in state.items() if id(value) not in kept and not re.match(CLASSIFIER, name)]
    if strangers:
        raise UserError(
            f"weights: {len(strangers)} tensors ({strangers[0]}, ...) have no place in this backbone; expected the "
            "network that MODEL.DARKNET.NAME names"
        )
    return {f"backbone.{name}": value for name, value in converted.items()}


def convert_resnet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the tensors of torchvision's and timm's ResNet to Detectron2's `backbone.bottom_up`.

    `conv1`, `bn1` become the stem; `layer1` to `layer4` become `res2` to `res5`; a block's `bnK` becomes `convK.norm`
    and its `downsample` the `shortcut`. The classifier (`fc`) and BatchNorm's step counters are the only ones dropped.

    Raises:
        UserError: a tensor has a name that no ResNet has.
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
            raise UserError(f"weights: tensor {name} belongs to no plain ResNet; expected conv1, bn1, layer1-4, fc")
        converted[BACKBONE + new] = value
    return converted


def _load(model: nn.Module, state: dict[str, torch.Tensor], source: str, only: str = "") -> int:
    """Loads `state`, which must hold every tensor of `model` below the prefix `only`; returns the number of others.

    BatchNorm's step counters may be absent: a frozen BatchNorm has none.
    """
    own = model.state_dict()
    wanted = {name for name in own if name.startswith(only) and not name.endswith("num_batches_tracked")}
    wrong = {
        "missing": sorted(wanted - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(
            f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ),
    }
    faults = [f"{len(names)} tensors {kind} ({names[0]}, ...)" for kind, names in wrong.items() if names]
    if faults:
        raise UserError(
            f"{source}: does not fit the model: {'; '.join(faults)}; expected weights of the same network and classes"
        )
    model.load_state_dict(state, strict=False)
    return len(own.keys() - state.keys())


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
