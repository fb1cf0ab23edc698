"""Neck and prediction layers of YOLOv3."""

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from torch import Tensor, nn
from torch.nn import functional as F

from detection.meta_arch import Float32Conv2d
from detection.timm_backbone import with_norm
from detection.yolov3.darknet import conv_norm_act

# Objects expected in an image of this size, before anything is learned.
PRIOR_OBJECTS = 8
PRIOR_IMAGE_SIZE = 608


class YOLOv3Level(nn.Module):
    """One level: takes the coarser level's features in, refines its own, predicts.

    The modules stand in the order of Darknet's cfg files.
    """

    def __init__(self, in_channels: int, coarser_dim: int, dim: int, num_convs: int, num_outputs: int, norm_eps: float):
        super().__init__()
        if coarser_dim:
            self.lateral = conv_norm_act(coarser_dim, dim, 1, norm_eps)
            in_channels += dim
        convs = []
        for index in range(num_convs):
            kernel_size, out_channels = (3, 2 * dim) if index % 2 else (1, dim)
            convs.append(conv_norm_act(in_channels, out_channels, kernel_size, norm_eps))
            in_channels = out_channels
        self.convs = nn.Sequential(*convs)
        self.expand = conv_norm_act(in_channels, 2 * dim, 3, norm_eps)
        self.prediction = Float32Conv2d(2 * dim, num_outputs, 1)

    def forward(self, feature: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the raw predictions in float32 and the features for the next finer level."""
        if coarser is not None:
            feature = torch.cat([F.interpolate(self.lateral(coarser), scale_factor=2, mode="nearest"), feature], dim=1)
        feature = self.convs(feature)
        return self.prediction(self.expand(feature)), feature


class YOLOv3Head(nn.Module):
    """Darknet's feature pyramid from the coarsest level to the finest, with one prediction layer a level."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        num_convs: list[int],
        norm: str = "BN",
        norm_eps: float = 1e-5,
        prior_prob: float = 0.01,
    ):
        """All lists have one entry a level, finest first.

        Args:
            input_shape: channels and stride of the features.
            num_classes: number of foreground classes K.
            num_anchors: anchors a cell, A.
            conv_dims: channels of the refined features; the 3x3 convolutions have twice as many.
            num_convs: number of alternating 1x1 and 3x3 convolutions that refine.
            norm: "BN", or "SyncBN" for statistics over all GPUs.
            norm_eps: epsilon of every BatchNorm.
            prior_prob: probability of each class before anything is learned; the objectness starts at 8 objects in
                an image of 608 x 608, spread evenly over the cells of every level.
        """
        super().__init__()
        self.levels = nn.ModuleList()  # coarsest first, the order of Darknet's files
        coarser_dim = 0
        for shape, dim, count in reversed(list(zip(input_shape, conv_dims, num_convs, strict=True))):
            level = YOLOv3Level(shape.channels, coarser_dim, dim, count, num_anchors * (5 + num_classes), norm_eps)
            objectness = PRIOR_OBJECTS / (PRIOR_IMAGE_SIZE / shape.stride) ** 2
            nn.init.normal_(level.prediction.weight, std=0.01)
            bias = torch.zeros(num_anchors, 5 + num_classes)
            bias[:, 4] = math.log(objectness / (1 - objectness))
            bias[:, 5:] = math.log(prior_prob / (1 - prior_prob))
            level.prediction.bias = nn.Parameter(bias.flatten())
            self.levels.append(level)
            coarser_dim = dim
        self.levels = with_norm(self.levels, norm, "MODEL.YOLOV3.NORM")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        """Reads `MODEL.YOLOV3`."""
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.YOLOV3.NUM_CLASSES,
            "num_anchors": build_anchor_generator(cfg, input_shape).num_anchors[0],
            "conv_dims": cfg.MODEL.YOLOV3.CONV_DIMS,
            "num_convs": cfg.MODEL.YOLOV3.NUM_CONVS,
            "norm": cfg.MODEL.YOLOV3.NORM,
            "norm_eps": cfg.MODEL.YOLOV3.NORM_EPS,
            "prior_prob": cfg.MODEL.YOLOV3.PRIOR_PROB,
        }

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Raw predictions, in float32 also under autocast.

        Args:
            features: (N, C, H, W) for each level, finest first.

        Returns:
            (N, A * (5 + K), H, W) for each level, finest first; for each anchor x, y, w, h, objectness and the K
            classes, all logits (w and h: logarithms).
        """
        predictions, coarser = [], None
        for level, feature in zip(self.levels, reversed(features), strict=True):
            prediction, coarser = level(feature, coarser)
            predictions.append(prediction)
        return predictions[::-1]
