"""Backbones: Darknet-53 or any other timm network with strides 8, 16 and 32, and that of yolov3-tiny."""

import itertools
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import ConvNormAct, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detection.timm_backbone import TimmBackbone, with_norm

# Norms that are one scale and shift per channel in evaluation; others cannot be folded into a convolution.
BATCH_NORMS: tuple[Any, ...] = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNormAct2d)


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
        model: its convolutions of timm's ConvNormAct with BatchNorm are folded; whatever else it holds stays as it is.
        dtype: what the folded weights are kept in. Autocast would cast them at every call.
    """
    for module in model.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.bn, BATCH_NORMS):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn).to(dtype)
            module.bn = module.bn.act


@BACKBONE_REGISTRY.register()
class Darknet(TimmBackbone):
    """Darknet-53, or another timm network by name, with the features `dark3`, `dark4` and `dark5`: strides 8, 16, 32.

    Darknet-53 is that of Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018, table 1.
    """

    @configurable
    def __init__(self, *, name: str = "darknet53", **settings: Any):
        """Builds the network; see `TimmBackbone`."""
        super().__init__(name=name, out_features=["dark3", "dark4", "dark5"], **settings)


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
        self.dark4, self.dark5 = (with_norm(part, norm, "MODEL.TIMM.NORM") for part in (self.dark4, self.dark5))
        self._out_features = ["dark4", "dark5"]
        self._out_feature_channels = {"dark4": 256, "dark5": 1024}
        self._out_feature_strides = {"dark4": 16, "dark5": 32}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        """Reads `MODEL.TIMM`."""
        return {"norm": cfg.MODEL.TIMM.NORM, "norm_eps": cfg.MODEL.TIMM.NORM_EPS or 1e-5}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of the coarsest stride."""
        return 32

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Features of images (N, 3, H, W) whose sides are multiples of 32, by name, finest first."""
        dark4 = self.dark4(image)
        return {"dark4": dark4, "dark5": self.dark5(dark4)}
