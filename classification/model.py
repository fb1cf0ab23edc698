"""Networks by name with a head for the birds, their weights, and the two groups of their parameters."""

import difflib
import logging
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import resolve_model_data_config
from torch import nn

from common.errors import UserError, first_line
from common.exported import ExportedModel, is_exported
from common.runtime import leave_cores
from common.weights import (
    LOCAL_WEIGHTS,
    load_state,
    local_file,
    local_place,
    locate_weights,
    read_checkpoint,
    weights_of,
)

logger = logging.getLogger(__name__)

ALEXNET = "alexnet"  # timm has none
CARD = ("model_name", "class_names", "image_size", "crop_pct", "mean", "std")  # of a checkpoint, beside its weights
KIND = "classifier"  # in an exported file


class PretrainedWeightsUnavailable(UserError):
    """ImageNet weights were asked for, no file was named, and the hub cannot be reached."""


def build_model(
    name: str, num_classes: int, pretrained: bool = False, weights: Path | None = None, drop_rate: float | None = None
) -> nn.Module:
    """Builds a network whose last layer has `num_classes` outputs.

    Args:
        name: a timm model, with or without a weights tag (`resnet18`, `resnet18.tv_in1k`), or `alexnet`.
        num_classes: outputs of the head, which starts at random unless `weights` holds one of that size.
        pretrained: start from the ImageNet weights of timm's or torchvision's hub.
        weights: take them from this file instead.
        drop_rate: dropout before the head; None keeps the model's own.

    Raises:
        UserError: no such model, or `weights` is of another model.
        PretrainedWeightsUnavailable: the hub has no answer.
    """
    from_hub = pretrained and weights is None
    try:
        if name == ALEXNET:
            model = _build_alexnet(num_classes, from_hub, drop_rate)
        else:
            model = _build_timm(name, num_classes, from_hub, drop_rate)
    except OSError as error:
        logger.debug("The hub said: %s", error)
        url = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url
        file = local_place(url) if name == ALEXNET else LOCAL_WEIGHTS / f"{name}.safetensors"
        raise PretrainedWeightsUnavailable(
            f"{name}: its ImageNet weights cannot be had from the hub ({type(error).__name__});"
            f" put the file here as {file}, name one (WEIGHTS=<path of a .pth or .safetensors>),"
            " or start at random, PRETRAINED=0"
        ) from None
    if weights is not None:
        load_weights(model, weights)
    leave_cores(model)
    return model


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [ALEXNET, *timm.list_models()], n=3) or ["resnet18"]
        raise UserError(f"MODEL={name}: timm has no such model; did you mean {' or '.join(close)}?")
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"MODEL={name}: timm has no weights {tag!r} of {architecture}; expected {' or '.join(tags)}")


def check_image_size(name: str, model: nn.Module, image_size: int) -> None:
    """Refuses an image size that a network cannot take: some have a fixed one, a smallest one, or whole windows.

    Raises:
        UserError: the network does not take this size.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    expected = config.get("input_size", (3, 224, 224))[-1]
    if config.get("fixed_input_size") and expected != image_size:
        raise UserError(
            f"image_size={image_size}: {name} takes images of {expected} pixels only: image_size={expected}"
        )
    was_training = model.training
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(parameter.new_zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(
            f"image_size={image_size}: {name} takes none of this size ({reason}); expected another, such as {expected}"
        ) from error
    finally:
        model.train(was_training)


def _build_timm(name: str, num_classes: int, from_hub: bool, drop_rate: float | None) -> nn.Module:
    _check_name(name)
    try:
        overlay = locate_weights(name) if from_hub else None
    except LookupError as error:
        raise UserError(f"MODEL={name}: {error}; give WEIGHTS=<file> or PRETRAINED=0") from None
    model = timm.create_model(
        name, pretrained=from_hub, pretrained_cfg_overlay=overlay, num_classes=num_classes, drop_rate=drop_rate
    )
    is_trained = from_hub and num_classes == (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    for head in head_modules(model):
        # EfficientNet's own initialisation is wider the fewer the classes, and would start out sure of a wrong class.
        if isinstance(head, nn.Linear) and not is_trained and head.weight.abs().max() > head.in_features**-0.5:
            head.reset_parameters()
    return model


def _build_alexnet(num_classes: int, from_hub: bool, drop_rate: float | None) -> nn.Module:
    weights = torchvision.models.AlexNet_Weights.IMAGENET1K_V1
    local = local_file(weights.url) if from_hub else None
    dropout = 0.5 if drop_rate is None else drop_rate  # 0.5 is torchvision's own
    model = torchvision.models.alexnet(weights=weights if from_hub and local is None else None, dropout=dropout)
    if local is not None:
        load_state(model, weights_of(read_checkpoint(local)), local)
    model.classifier[6] = nn.Linear(model.classifier[6].in_features, num_classes)
    return model


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The last layer (layers, for models with several heads): what a new set of classes replaces."""
    if isinstance(model, torchvision.models.AlexNet):
        return [model.classifier[6]]
    head = model.get_classifier()  # type: ignore[operator] # every model of timm has it, but has nn.Module for its type
    return list(head) if isinstance(head, tuple | list) else [head]


def head_names(model: nn.Module) -> set[str]:
    """Names in the state dict of the parameters of the head."""
    ours = {id(parameter) for head in head_modules(model) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ours}


def parameter_groups(model: nn.Module, backbone_lr_scale: float) -> list[dict]:
    """Groups for timm's optimizer and scheduler factories: the head at the full rate, all else at a part of it.

    timm's schedulers multiply a group's rate by its `lr_scale`.
    """
    heads = head_names(model)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trained if name in heads], "lr_scale": 1.0},
        {"params": [parameter for name, parameter in trained if name not in heads], "lr_scale": backbone_lr_scale},
    ]


def mean_and_std(model: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, in RGB on a range of 0 to 1, of the images that the model's weights expect."""
    config = resolve_model_data_config(model)  # of AlexNet, which has none of timm's, the default: ImageNet's
    return list(config["mean"]), list(config["std"])


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads weights from a file, every tensor accounted for.

    If the file's head is missing or has another size, the model keeps its own, and the log says so. Nothing else may
    be missing or left over.

    Raises:
        UserError: the file's tensors are not those of this model.
    """
    left_out = load_state(model, weights_of(read_checkpoint(path)), path, replaceable=head_names(model))
    logger.info("%s: %d tensors loaded", path, len(model.state_dict()) - len(left_out))
    if left_out:
        logger.info("%s: left out, the head of other classes: %s", path, ", ".join(sorted(left_out)))


def describe(name: str, model: nn.Module, class_names: list[str], image_size: int, crop_pct: float) -> dict[str, Any]:
    """What a checkpoint says about its network beside the weights, so that the file alone is enough to use it."""
    return dict(zip(CARD, (name, class_names, image_size, crop_pct, *mean_and_std(model)), strict=True))


def load_classifier(path: Path) -> tuple[nn.Module, dict]:
    """Rebuilds the network of a `model_best.pth` or `model_last.pth`, or opens an exported file.

    Returns:
        The model in evaluation mode, and its description (see `describe`).

    Raises:
        UserError: the file is not such a checkpoint, nor such an exported file.
    """
    if is_exported(path):
        exported = ExportedModel(path, KIND)
        return exported.eval(), exported.card
    checkpoint = read_checkpoint(path)
    if missing := [key for key in CARD if key not in checkpoint]:
        raise UserError(
            f"{path}: holds no classifier of this project (no {missing[0]} among "
            f"{', '.join(list(checkpoint)[:3])}, ...); expected model_best.pth of a run of `make finetune`"
        )
    model = build_model(checkpoint["model_name"], len(checkpoint["class_names"]))
    load_state(model, weights_of(checkpoint), path)
    return model.eval(), checkpoint
