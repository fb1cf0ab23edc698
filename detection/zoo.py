"""Detectron2's model zoo: its files into our network, which sees images in RGB."""

import re

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

# In files of old, and set by the configuration here.
CONFIGURED = re.compile(r"(^|\.)(pixel_mean|pixel_std)$|anchor_generator\.cell_anchors")
CLASSIFIER = re.compile(r"(linear|fc1000|fc)\.")  # of networks that were trained on ImageNet
STEM = re.compile(r"(^|\.)stem\.conv1\.weight$")


def zoo_leaf(state: dict[str, Tensor]) -> str | None:
    """The configuration in `detection/configs` of a whole detector of the zoo; None if it is of no known one."""
    stages = {
        "faster_rcnn_R_101_FPN_zoo": "backbone.bottom_up.res4.22.conv1.weight",
        "faster_rcnn_R_50_FPN_zoo": "backbone.bottom_up.res4.5.conv1.weight",
        "faster_rcnn_R_50_C4_zoo": "roi_heads.res5.2.conv1.weight",
    }
    if "proposal_generator.rpn_head.objectness_logits.weight" not in state:
        return None
    return next((leaf for leaf, name in stages.items() if name in state), None)


def convert_zoo(checkpoint: dict, model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file of the zoo under the names of a model.

    The input channels of the first convolution are reversed: the zoo's networks see images in BGR, except those whose
    author is "torchvision". Names in files of Caffe2 or of a backbone alone are matched by Detectron2's own rules. A
    backbone whose BatchNorm is folded into scale and shift has no statistics; those of the model, which change nothing,
    take their place.

    Args:
        checkpoint: of `common.zoo_pickle.read_zoo_pickle`.
        model: built with random weights.

    Returns:
        Tensors by name, and the part of the model that they fill: "" for all of it.

    Raises:
        ValueError: no name in the file fits the model.
    """
    state = {name: value for name, value in checkpoint["model"].items() if not CONFIGURED.search(name)}
    part = ""
    if checkpoint["matching_heuristics"]:
        own = model.state_dict()
        try:
            state = align_and_update_state_dicts(own, state, c2_conversion=checkpoint["__author__"] == "Caffe2")
        except (AssertionError, ValueError) as error:
            raise ValueError(f"their names fit no network ({error}); expected a backbone of the zoo") from error
        if not own.keys() & state.keys():
            raise ValueError("none of their names fits the network; expected a ResNet of Detectron2's zoo")
        state = {name: value for name, value in state.items() if not CLASSIFIER.match(name)}
        if "roi_heads.box_predictor.cls_score.weight" not in state:
            part = "backbone.bottom_up." if any(name.startswith("backbone.bottom_up.") for name in own) else "backbone."
        norms = {name.rpartition(".")[0] for name in state if name.endswith("norm.bias")}
        statistics = [f"{norm}.{name}" for norm in norms for name in ("running_mean", "running_var")]
        state.update({name: own[name] for name in statistics if name in own and name not in state})
    if checkpoint["__author__"] != "torchvision":
        state = {name: value.flip(1) if STEM.search(name) else value for name, value in state.items()}
    return {
        name: value.to(torch.float32) if value.is_floating_point() else value for name, value in state.items()
    }, part
