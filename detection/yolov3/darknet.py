"""Backbones: Darknet-53 or any other timm network with strides 8, 16 and 32, and that of yolov3-tiny."""

import itertools
from typing import TypeVar

import timm
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import ConvNormAct, convert_sync_batchnorm
from timm.models import FeatureInfo
from timm.utils import freeze
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.errors import UserError

M = TypeVar("M", bound=nn.Module)


def with_norm(module: M, norm: str, key: str) -> M:
    """The module with its BatchNorms made to what a configuration's `key` says: "BN" or "SyncBN".

    Raises:
        UserError: it says something else.
    """
    if norm not in ("BN", "SyncBN"):
        raise UserError(f"{key} {norm}: expected BN or SyncBN")
    return convert_sync_batchnorm(module) if norm == "SyncBN" else module


def conv_norm_act(in_channels: int, out_channels: int, kernel_size: int, norm_eps: float) -> ConvNormAct:
    """Darknet's unit: a convolution that keeps the image's size, BatchNorm, LeakyReLU with slope 0.1."""
    return ConvNormAct(
        in_channels,
        out_channels,
        kernel_size,
        norm_kwargs={"eps": norm_eps},
        act_layer=nn.LeakyReLU,
        act_kwargs={"negative_slope": 0.1, "inplace": True},
    )


def fold_batch_norm(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Folds each BatchNorm of a model in eval mode into the convolution before it: the same outputs, sooner.

    Works in place. The folded model cannot be trained, and no checkpoint fits it any more.

    Args:
        model: its Darknet units are folded; whatever else it holds stays as it is.
        dtype: what the folded weights are kept in. Autocast would cast them at every call.
    """
    for module in model.modules():
        if isinstance(module, ConvNormAct):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn).to(dtype)
            module.bn = module.bn.act


@BACKBONE_REGISTRY.register()
class Darknet(Backbone):
    """Darknet-53, or another timm network by name, as a Detectron2 backbone with random weights.

    `forward` maps images (N, 3, H, W) to `dark3`, `dark4` and `dark5`: (N, C, H / s, W / s) with strides s of 8, 16
    and 32. Darknet-53 is that of Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, table 1.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str = "darknet53",
        norm: str = "BN",
        norm_eps: float | None = None,
        negative_slope: float | None = None,
        freeze_at: int = 0,
    ):
        """Builds the network.

        Args:
            name: timm's name of the network.
            norm: "BN", or "SyncBN" for statistics over all GPUs.
            norm_eps: epsilon of every BatchNorm; None keeps the network's own.
            negative_slope: slope of every LeakyReLU; None keeps the network's own.
            freeze_at: the stages down to stride 2 ** freeze_at are not trained; 0 trains all.

        Raises:
            UserError: timm does not know the network, or it lacks a stride, or has not what is to be set.
        """
        super().__init__()
        self.bottom_up = _create_features(name)
        _set(self.bottom_up, nn.BatchNorm2d, "eps", norm_eps, f"MODEL.DARKNET.NORM_EPS of {name}")
        _set(self.bottom_up, nn.LeakyReLU, "negative_slope", negative_slope, f"MODEL.DARKNET.NEGATIVE_SLOPE of {name}")
        self.bottom_up = with_norm(self.bottom_up, norm, "MODEL.DARKNET.NORM")
        if freeze_at:
            stages = [stage for stage, _ in self.bottom_up.named_children()]
            last = [f["module"] for f in _feature_info(self.bottom_up).info if f["reduction"] <= 2**freeze_at][-1]
            freeze(self.bottom_up, stages[: stages.index(last.replace(".", "_")) + 1])
        self._out_features = ["dark3", "dark4", "dark5"]
        channels = _feature_info(self.bottom_up).channels()
        self._out_feature_channels = dict(zip(self._out_features, channels, strict=True))
        self._out_feature_strides = {"dark3": 8, "dark4": 16, "dark5": 32}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Reads `MODEL.DARKNET` and `MODEL.BACKBONE.FREEZE_AT`."""
        return {
            "name": cfg.MODEL.DARKNET.NAME,
            "norm": cfg.MODEL.DARKNET.NORM,
            "norm_eps": cfg.MODEL.DARKNET.NORM_EPS,
            "negative_slope": cfg.MODEL.DARKNET.NEGATIVE_SLOPE,
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
        """The tensors of a timm classifier's state dict that this backbone has, under this backbone's names."""
        own = self.state_dict()
        # timm's feature networks join the first two parts of a name: stages.0.conv_down -> stages_0.conv_down.
        names = {name: f"bottom_up.{name}" for name in state}
        joined = {name: f"bottom_up.{name.replace('.', '_', 1)}" for name in state}
        candidates = {name: names[name] if names[name] in own else joined[name] for name in state}
        return {new: state[name] for name, new in candidates.items() if new in own}


@BACKBONE_REGISTRY.register()
class DarknetTiny(Backbone):
    """The backbone of yolov3-tiny: seven convolutions with max-pooling between them.

    `forward` maps images (N, 3, H, W) to `dark4` (N, 256, H / 16, W / 16) and `dark5` (N, 1024, H / 32, W / 32).
    """

    @configurable
    def __init__(self, *, norm: str = "BN", norm_eps: float = 1e-5):
        """Builds the network with random weights.

        Args:
            norm: "BN", or "SyncBN" for statistics over all GPUs.
            norm_eps: epsilon of every BatchNorm.
        """
        super().__init__()
        dims = (3, 16, 32, 64, 128, 256)
        stages: list[nn.Module] = []
        for in_channels, out_channels in itertools.pairwise(dims):
            stages += [conv_norm_act(in_channels, out_channels, 3, norm_eps), nn.MaxPool2d(2)]
        self.dark4 = nn.Sequential(*stages[:-1])
        self.dark5 = nn.Sequential(
            stages[-1],
            conv_norm_act(256, 512, 3, norm_eps),
            nn.ReplicationPad2d((0, 1, 0, 1)),  # the window of the last row and column has nothing beyond the edge
            nn.MaxPool2d(2, stride=1),
            conv_norm_act(512, 1024, 3, norm_eps),
        )
        self.dark4, self.dark5 = (with_norm(part, norm, "MODEL.DARKNET.NORM") for part in (self.dark4, self.dark5))
        self._out_features = ["dark4", "dark5"]
        self._out_feature_channels = {"dark4": 256, "dark5": 1024}
        self._out_feature_strides = {"dark4": 16, "dark5": 32}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Reads `MODEL.DARKNET`."""
        return {"norm": cfg.MODEL.DARKNET.NORM, "norm_eps": cfg.MODEL.DARKNET.NORM_EPS or 1e-5}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of the coarsest stride."""
        return 32

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Features of images (N, 3, H, W) whose sides are multiples of 32, by name, finest first."""
        dark4 = self.dark4(image)
        return {"dark4": dark4, "dark5": self.dark5(dark4)}


def _set(network: nn.Module, layer: type[nn.Module], attribute: str, value: float | None, key: str) -> None:
    """Sets an attribute of all layers of a type, of which there must be some, unless the value is None."""
    if value is None:
        return
    layers = [module for module in network.modules() if isinstance(module, layer)]
    if not layers:
        raise UserError(f"{key}: {value} is given, but the network has no {layer.__name__}: leave it out")
    for module in layers:
        setattr(module, attribute, value)


def _create_features(name: str) -> nn.Module:
    """The timm network as a list of features with strides 8, 16 and 32."""
    if not timm.is_model(name):
        raise UserError(f"MODEL.DARKNET.NAME is {name!r}, which timm does not know; `darknet53` is the usual one")
    reductions = _feature_info(timm.create_model(name, features_only=True)).reduction()
    if not {8, 16, 32} <= set(reductions):
        raise UserError(f"MODEL.DARKNET.NAME is {name!r} with strides {reductions}, expected 8, 16 and 32 among them")
    return timm.create_model(name, features_only=True, out_indices=[reductions.index(s) for s in (8, 16, 32)])


def _feature_info(features: nn.Module) -> FeatureInfo:
    """Channels and strides of a network that timm made with `features_only`."""
    info = features.feature_info
    assert isinstance(info, FeatureInfo)
    return info
