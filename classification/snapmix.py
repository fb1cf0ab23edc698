"""SnapMix: a region of one photograph pasted into another, labels shared by what the network sees in the regions."""

import numpy as np
import torch
from timm.data.mixup import rand_bbox
from torch import Tensor, nn
from torch.nn import functional

from classification.model import head_modules
from common.errors import UserError
from common.processes import share_buffers
from common.runtime import autocast

Box = tuple[int, int, int, int]  # top, bottom, left, right; bottom and right beyond it


class SnapMix:
    """Mixes a batch as timm's `Mixup` does, but weights labels by how much of their class activation maps is shown.

    Weights by area, as in CutMix, label a patch of sky as bird: noise where classes differ in details. The weights of
    the two labels need not add up to 1. Source: S. Huang et al. SnapMix: Semantically Proportional Mixing for
    Augmenting Fine-grained Data. AAAI 2021, equations 2 to 5.

    Args:
        model: the network that is trained; its maps are taken in evaluation mode, without gradients.
        num_classes: of the head.
        alpha: the areas of both regions, as shares of the image, are drawn from Beta(alpha, alpha).
        prob: probability that a batch is mixed at all.
        precision: see `common.runtime.autocast`.

    Raises:
        UserError: the network has no such maps: its head is not one linear layer over pooled features.
    """

    def __init__(self, model: nn.Module, num_classes: int, alpha: float, prob: float, precision: str = "auto") -> None:
        self.model, self.num_classes, self.alpha, self.prob, self.precision = model, num_classes, alpha, prob, precision
        heads = head_modules(model)
        if len(heads) != 1 or not isinstance(heads[0], nn.Linear) or not hasattr(model, "forward_features"):
            raise _no_maps(model)
        self.head = heads[0]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pastes into each image a region of another one of the batch.

        Args:
            images: (B, 3, S, S), left as they are.
            labels: int64, (B,).

        Returns:
            The mixed images, and targets (B, num_classes): the shares of both labels, 0 elsewhere.
        """
        # In every process, whether or not it mixes: a resumed run has only the first process's buffers.
        share_buffers(self.model)
        kept = functional.one_hot(labels, self.num_classes).to(images.dtype)
        if np.random.random() >= self.prob:
            return images, kept
        order = torch.from_numpy(np.random.permutation(len(images))).to(images.device, non_blocking=True)
        into, out_of = (rand_bbox(images.shape, 1 - np.random.beta(self.alpha, self.alpha)) for _ in range(2))
        return self.mix(images, kept, self.maps(images, labels), order, into, out_of)

    @staticmethod
    def mix(
        images: Tensor, one_hot: Tensor, maps: Tensor, order: Tensor, into: Box, out_of: Box
    ) -> tuple[Tensor, Tensor]:
        """The mixing itself, with everything drawn.

        Args:
            images: (B, 3, S, S).
            one_hot: labels, (B, C).
            maps: (B, S, S), each with the sum 1.
            order: for each image the index of the one that a region comes from.
            into: the region that is replaced.
            out_of: the region that replaces it, resized.
        """
        patch, mixed = _cut(images, out_of)[order], images.clone()
        replaced = _cut(mixed, into)
        if not patch.numel() or not replaced.numel():
            return images, one_hot
        size = replaced.shape[-2:]
        replaced.copy_(functional.interpolate(patch, size, mode="bilinear", align_corners=False))
        covered = _cut(maps, into).sum((1, 2))
        pasted = _cut(maps, out_of).sum((1, 2))[order]
        return mixed, one_hot * (1 - covered)[:, None] + one_hot[order] * pasted[:, None]

    @torch.no_grad()
    def maps(self, images: Tensor, labels: Tensor) -> Tensor:
        """Class activation maps of the labels at the size of the images, (B, S, S), from 0, each with the sum 1.

        Source: B. Zhou et al. Learning Deep Features for Discriminative Localization. CVPR 2016.
        """
        was_training = self.model.training
        self.model.eval()
        with autocast(images.device, self.precision):
            features = self.model.forward_features(images)  # type: ignore[operator] # timm's, looked for above
        self.model.train(was_training)
        if features.dim() != 4 or features.shape[1] != self.head.in_features:
            raise _no_maps(self.model)
        maps = torch.einsum("bchw,bc->bhw", features.float(), self.head.weight[labels].float())
        maps = functional.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        maps = maps - maps.amin((1, 2), keepdim=True) + torch.finfo(maps.dtype).eps  # one that is flat is shared evenly
        return maps / maps.sum((1, 2), keepdim=True)


def _cut(images: Tensor, box: Box) -> Tensor:
    """The region of each image, (..., H, W), as a view."""
    top, bottom, left, right = box
    return images[..., top:bottom, left:right]


def _no_maps(model: nn.Module) -> UserError:
    return UserError(
        f"snapmix: {type(model).__name__} has no class activation maps; expected a network whose head is one linear"
        " layer over pooled features, such as resnet18: leave snapmix out"
    )
