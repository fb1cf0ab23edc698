"""The losses of YOLOv3, from logits in float32."""

from dataclasses import dataclass

import torch
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss

from detection.yolov3.anchors import YOLOBox2BoxTransform
from detection.yolov3.targets import Grid, Targets

BOX_IOU_LOSSES = {"giou": generalized_box_iou_loss, "ciou": complete_box_iou_loss}


@dataclass(kw_only=True)
class YOLOv3Loss:
    """Sums over predictions, divided by the number of images.

    - Box: binary cross-entropy on the centre's place in its cell (`loss_xy`) and L1 on the logarithm of the size
      (`loss_wh`); or 1 - GIoU or CIoU of the decoded box (`loss_box_reg`). Each object weighs 2 - w h, its sides
      relative to the image's, so that small ones count more. The cross-entropy is counted from its lowest value, the
      entropy of the place itself: a perfect box costs nothing, and the gradient is the same.
    - `loss_objectness`: binary cross-entropy, or focal loss, of all predictions that are an object's or not ignored.
    - `loss_cls`: binary cross-entropy of each class, for the predictions that are an object's.

    Where images are mixed, all that an object adds is multiplied by its share of the mixture.

    Attributes:
        transform: encodes and decodes boxes.
        box_reg_loss_type: "l1", "giou" or "ciou".
        box_reg_loss_weight: factor of all box losses.
        focal_loss_alpha: weight of objects against background in the objectness; below 0, none.
        focal_loss_gamma: exponent of the focal loss (Lin et al., 2017); 0 is cross-entropy.
        label_smoothing: e turns the class targets t into t (1 - e) + e / K (Szegedy et al., 2016).

    Raises:
        ValueError: there is no such box loss.
    """

    transform: YOLOBox2BoxTransform
    box_reg_loss_type: str = "l1"
    box_reg_loss_weight: float = 1.0
    focal_loss_alpha: float = -1.0
    focal_loss_gamma: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.box_reg_loss_type not in {"l1", *BOX_IOU_LOSSES}:
            raise ValueError(f"box regression loss {self.box_reg_loss_type!r}, expected l1, giou or ciou")

    def __call__(self, predictions: Tensor, grid: Grid, targets: Targets) -> dict[str, Tensor]:
        """The losses by name, scalars.

        Args:
            predictions: (N, R, 5 + K) x, y, w, h, objectness and classes; w and h are logarithms, all others logits.
            grid: the anchors.
            targets: what should have been predicted.
        """
        matched = predictions[targets.images, targets.predictions]
        one_hot = F.one_hot(targets.classes, matched.shape[1] - 5).to(matched)
        soft = one_hot * (1 - self.label_smoothing) + self.label_smoothing / one_hot.shape[1]
        objectness = sigmoid_focal_loss(
            predictions[..., 4], targets.objectness, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        losses = self._box_losses(matched[:, :4], grid, targets)
        slots = targets.images * predictions.shape[1] + targets.predictions
        shares = torch.zeros_like(objectness).view(-1).scatter_add_(0, slots, targets.weights.to(objectness))
        shares = shares.view_as(objectness)
        weights = torch.where(targets.objectness > 0, shares, (~targets.ignored).to(predictions))
        losses["loss_objectness"] = (objectness * weights).sum()
        losses["loss_cls"] = F.binary_cross_entropy_with_logits(
            matched[:, 5:], soft, targets.weights[:, None], reduction="sum"
        )
        return {name: loss / len(predictions) for name, loss in losses.items()}

    def _box_losses(self, logits: Tensor, grid: Grid, targets: Targets) -> dict[str, Tensor]:
        anchors, strides = grid.anchors[targets.predictions], grid.anchor_strides[targets.predictions]
        image_area = (grid.cells[0] * grid.strides[0]).prod()
        sizes = targets.boxes[:, 2:] - targets.boxes[:, :2]
        weights = self.box_reg_loss_weight * targets.weights * (2 - sizes.prod(1) / image_area)
        if self.box_reg_loss_type in BOX_IOU_LOSSES:
            boxes = self.transform.decode(logits, anchors, strides)
            return {"loss_box_reg": (weights * BOX_IOU_LOSSES[self.box_reg_loss_type](boxes, targets.boxes)).sum()}
        deltas = self.transform.get_deltas(anchors, targets.boxes, strides)
        # An object whose centre lies beyond the far edge was given to the last cell.
        places = deltas[:, :2].clamp(0, 1)
        xy = F.binary_cross_entropy_with_logits(logits[:, :2], places, reduction="none")
        xy = xy - F.binary_cross_entropy(places, places, reduction="none")
        wh = (logits[:, 2:] - deltas[:, 2:]).abs()
        return {"loss_xy": (weights[:, None] * xy).sum(), "loss_wh": (weights[:, None] * wh).sum()}
