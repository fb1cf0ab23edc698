"""Test-time augmentation: an image is looked at in several sizes and mirrored, and the findings are merged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.functional import interpolate

from common.errors import UserError

SCALES = (0.75, 1.0, 1.25)  # where TEST.AUG.MIN_SIZES is empty

Detect = Callable[[list[dict]], list[dict[str, Instances]]]


@dataclass(frozen=True)
class TTA:
    """Looks at images in several views. As in Detectron2's, views are made of the image that the model is given.

    The detections of all views together go through non-maximum suppression per class, like those of a single view.

    Attributes:
        scales: factors of the sides of the image, one view each.
        max_size: no view has a longer side, in pixels.
        flip: whether each view is looked at in a mirror too.
        nms_thresh: IoU above which the worse of two detections of one class is suppressed.
        max_detections: number of detections to return at most for an image.
    """

    scales: Sequence[float]
    max_size: int
    flip: bool
    nms_thresh: float
    max_detections: int

    @classmethod
    def from_config(cls, cfg: CfgNode, nms_thresh: float) -> "TTA | None":
        """Reads `TEST.AUG`; None where it is not enabled, and then nothing else of it is read.

        Raises:
            UserError: a size is no positive whole number.
        """
        if not cfg.TEST.AUG.ENABLED:
            return None
        sizes, max_size = cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE
        if not all(isinstance(size, int) and size > 0 for size in [*sizes, max_size]):
            raise UserError(f"TEST.AUG: MIN_SIZES {list(sizes)}, MAX_SIZE {max_size}: expected positive whole numbers")
        scales = [size / cfg.INPUT.MIN_SIZE_TEST for size in sizes] or SCALES
        return cls(scales, max_size, cfg.TEST.AUG.FLIP, nms_thresh, cfg.TEST.DETECTIONS_PER_IMAGE)

    def __call__(self, detect: Detect, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Detects in all views of each image.

        Args:
            detect: the model in evaluation.
            batched_inputs: as the model takes them.

        Returns:
            For each image `instances` as the model returns them, best first.
        """
        found: list[list[Instances]] = [[] for _ in batched_inputs]
        for scale, is_flipped in product(self.scales, (False, True) if self.flip else (False,)):
            views = [self._view(inputs, scale, is_flipped) for inputs in batched_inputs]
            for of_image, output in zip(found, detect(views), strict=True):
                instances = output["instances"]
                of_image.append(_mirrored(instances) if is_flipped else instances)
        return [{"instances": self._merged(of_image)} for of_image in found]

    def _view(self, inputs: dict, scale: float, is_flipped: bool) -> dict:
        image: Tensor = inputs["image"]
        height, width = image.shape[-2:]
        scale = min(scale, self.max_size / max(height, width))
        size = max(round(scale * height), 1), max(round(scale * width), 1)
        if size != (height, width):
            image = interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
        # Detections come back in the frame of the original, or of the image that the model was given.
        frame = {"height": inputs.get("height", height), "width": inputs.get("width", width)}
        return {**inputs, **frame, "image": image.flip(-1) if is_flipped else image}

    def _merged(self, views: list[Instances]) -> Instances:
        merged = Instances.cat(views)
        keep = batched_nms(merged.pred_boxes.tensor, merged.scores, merged.pred_classes, self.nms_thresh)
        return merged[keep[: self.max_detections]]


def _mirrored(instances: Instances) -> Instances:
    x0, y0, x1, y1 = instances.pred_boxes.tensor.unbind(1)
    width = instances.image_size[1]
    instances.pred_boxes = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    return instances
