"""Any network of timm as a Detectron2 backbone, by itself or below a feature pyramid, and its weights."""

from collections.abc import Sequence
from typing import TypeVar

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from timm.layers import convert_sync_batchnorm
from timm.models import FeatureInfo
from timm.utils import freeze
from torch import Tensor, nn

from common.errors import UserError

M = TypeVar("M", bound=nn.Module)

# Height and width of an image that a network must take to take every size: sides are padded to multiples of 32.
PROBE = (64, 96)


def with_norm(module: M, norm: str, key: str) -> M:
    """The module with its BatchNorms made to what a configuration's `key` says: "BN" or "SyncBN".

    Raises:
        UserError: it says something else.
    """
    if norm not in ("BN", "SyncBN"):
        raise UserError(f"{key} {norm}: expected BN or SyncBN")
    return convert_sync_batchnorm(module) if norm == "SyncBN" else module


class TimmBackbone(Backbone):
    """A timm network by name, with random weights, as a Detectron2 backbone.

    `forward` maps images (N, 3, H, W) whose sides are multiples of 32 to one feature (N, C, H / s, W / s) for each of
    `out_features`. The digit at the end of a feature's name says its stride, as everywhere in Detectron2: s is 4 for
    `res2` or `dark2`, 32 for `res5` or `dark5`.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str],
        norm: str = "BN",
        norm_eps: float | None = None,
        negative_slope: float | None = None,
        freeze_at: int = 0,
    ):
        """Builds the network.

        Args:
            name: timm's name of the network.
            out_features: names of the features, finest first.
            norm: "BN", or "SyncBN" for statistics over all GPUs.
            norm_eps: epsilon of every BatchNorm; None keeps the network's own.
            negative_slope: slope of every LeakyReLU; None keeps the network's own.
            freeze_at: parameters up to the features with stride 2 ** freeze_at are not trained; 0 trains all.

        Raises:
            UserError: timm does not know the network, or it lacks a stride, takes images of one size only, or lacks
                the layers that a setting is for.
        """
        super().__init__()
        self.name = name
        self._out_features = list(out_features)
        strides = [2 ** int(feature[-1]) for feature in out_features]
        self._out_feature_strides = dict(zip(out_features, strides, strict=True))
        out_indices, frozen, unused = _examine(name, strides, freeze_at)
        self.bottom_up = timm.create_model(name, features_only=True, out_indices=out_indices)
        self._out_feature_channels = dict(zip(out_features, _feature_info(self.bottom_up).channels(), strict=True))
        _set(self.bottom_up, nn.BatchNorm2d, "eps", norm_eps, f"MODEL.TIMM.NORM_EPS of {name}")
        _set(self.bottom_up, nn.LeakyReLU, "negative_slope", negative_slope, f"MODEL.TIMM.NEGATIVE_SLOPE of {name}")
        self.bottom_up = with_norm(self.bottom_up, norm, "MODEL.TIMM.NORM")
        for parameter, values in self.bottom_up.named_parameters():
            if parameter in unused:
                values.requires_grad = False  # or several processes would wait for a gradient that never comes
        for parameter in frozen:
            self.bottom_up.get_parameter(parameter).requires_grad = False
        for module in {parameter.rpartition(".")[0] for parameter in frozen}:
            if hasattr(self.bottom_up.get_submodule(module), "running_mean"):
                freeze(self.bottom_up, module)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Reads `MODEL.TIMM` and `MODEL.BACKBONE.FREEZE_AT`."""
        return {
            "name": cfg.MODEL.TIMM.NAME,
            "norm": cfg.MODEL.TIMM.NORM,
            "norm_eps": cfg.MODEL.TIMM.NORM_EPS,
            "negative_slope": cfg.MODEL.TIMM.NEGATIVE_SLOPE,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of the coarsest stride."""
        return 32

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Features of images (N, 3, H, W) whose sides are multiples of 32, by name, finest first."""
        return dict(zip(self._out_features, self.bottom_up(image), strict=True))

    def convert_timm(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a timm classifier's state dict that this backbone has, under this backbone's names.

        What the classifier computes beyond the last feature, as `fc`, `head` or `conv_head`, has no place and is left
        out.

        Raises:
            ValueError: a tensor is none of this network's classifier.
        """
        with torch.device("meta"):
            classifier = timm.create_model(self.name).state_dict()
        if strangers := [name for name in state if name not in classifier]:
            raise ValueError(
                f"{len(strangers)} tensors ({strangers[0]}, ...) are none of {self.name}'s; expected weights "
                "of the network that MODEL.TIMM.NAME names"
            )
        own = self.state_dict()
        converted = {}
        for name, value in state.items():
            # Some feature networks join the first two parts of a name, stages.0.conv_down -> stages_0.conv_down, and
            # some hold the whole network as `model`.
            places = [f"bottom_up.{name}", f"bottom_up.{name.replace('.', '_', 1)}", f"bottom_up.model.{name}"]
            converted.update({place: value for place in places if place in own})
        return converted


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's feature pyramid, `p2` to `p6`, over the timm network of `MODEL.TIMM`.

    `MODEL.FPN.IN_FEATURES` names the network's features: `[res2, res3, res4, res5]` are those with strides 4 to 32.
    """
    return FPN(
        bottom_up=TimmBackbone(cfg, input_shape, out_features=cfg.MODEL.FPN.IN_FEATURES),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def normalisation_of(name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, RGB from 0 to 255, that the weights of a timm network were trained with.

    Args:
        name: timm's name, with or without the tag of its weights.

    Raises:
        UserError: timm does not know the network or the tag.
    """
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise UserError(f"{name}: timm knows no such weights ({error}); see timm.list_pretrained()") from error
    assert config is not None
    return [255 * value for value in config.mean], [255 * value for value in config.std]


def _examine(name: str, strides: Sequence[int], freeze_at: int) -> tuple[list[int], list[str], set[str]]:
    """Runs a network on an image of a size that it was not trained with.

    Returns:
        timm's indices of the features with these strides; the parameters that `freeze_at` freezes; and the parameters
        that none of these features depends on.

    Raises:
        UserError: timm does not know it, or it lacks one of `strides`, or does not take the image.
    """
    try:
        network = timm.create_model(name, features_only=True).eval()
    except RuntimeError as error:
        raise UserError(
            f"MODEL.TIMM.NAME is {name!r}, which timm does not know ({error}); `darknet53` is the usual one"
        ) from error
    info = _feature_info(network)
    reductions, (height, width) = info.reduction(), PROBE
    if not set(strides) <= set(reductions):
        raise UserError(f"MODEL.TIMM.NAME is {name!r} with strides {reductions}, expected {strides} among them")
    expected = [(1, dim, height // s, width // s) for dim, s in zip(info.channels(), reductions, strict=True)]
    try:
        with torch.enable_grad():
            features = network(torch.zeros(1, 3, height, width))
        shapes = [tuple(feature.shape) for feature in features]
        reason = "" if shapes == expected else f"shapes {shapes}, expected {expected}"
    except Exception as error:  # each network has its own way to fail
        reason = " ".join(str(error).split()) or type(error).__name__
    if reason:
        raise UserError(
            f"MODEL.TIMM.NAME is {name!r}, which has no features of images of any size, here {height} x {width} "
            f"({reason}); expected a network of convolutions, or a transformer for all sizes"
        )
    indices = [info.out_indices[reductions.index(stride)] for stride in strides]
    parameters = dict(network.named_parameters())

    def reached(output: Tensor) -> list[str]:
        gradients = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
        return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]

    chosen = [feature.sum() for feature, stride in zip(features, reductions, strict=True) if stride in strides]
    unused = parameters.keys() - set(reached(torch.stack(chosen).sum()))
    if not freeze_at:
        return indices, [], unused
    stages = [feature for feature, stride in zip(features, reductions, strict=True) if stride <= 2**freeze_at]
    if not stages:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: the first features of {name} have stride {reductions[0]}; expected "
            f"0, or {reductions[0].bit_length() - 1} and more"
        )
    return indices, reached(stages[-1].sum()), unused


def _set(network: nn.Module, layer: type[nn.Module], attribute: str, value: float | None, key: str) -> None:
    """Sets an attribute of all layers of a type, of which there must be some, unless the value is None."""
    if value is None:
        return
    layers = [module for module in network.modules() if isinstance(module, layer)]
    if not layers:
        raise UserError(f"{key}: {value} is given, but the network has no {layer.__name__}: leave it out")
    for module in layers:
        setattr(module, attribute, value)


def _feature_info(features: nn.Module) -> FeatureInfo:
    """Channels and strides of a network that timm made with `features_only`."""
    info = features.feature_info
    assert isinstance(info, FeatureInfo)
    return info
