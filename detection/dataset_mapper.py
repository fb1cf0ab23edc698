"""From a dataset dict to what a model eats: the image decoded, augmented together with its boxes, and resized."""

from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from tools.errors import UserError

# Parameters are those of the SSD recipe (Liu et al. 2016), which torchvision's classes implement.
AUGMENTATIONS = {
    "RandomHorizontalFlip": v2.RandomHorizontalFlip,
    "RandomPhotometricDistort": v2.RandomPhotometricDistort,
    "RandomZoomOut": v2.RandomZoomOut,
    "RandomIoUCrop": v2.RandomIoUCrop,
}


def read_image(path: str | Path) -> torch.Tensor:
    """Decodes an image file to RGB, turned as its EXIF tag says.

    Returns:
        uint8 tensor of shape (3, H, W), RGB, 0 to 255.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    try:
        image = decode_image(str(path), ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, OSError) as error:
        # torchvision's message starts with the place in its source.
        reason = "no such file" if not Path(path).exists() else str(error).splitlines()[0].split(", ", 2)[-1]
        raise UserError(f"{path}: cannot be read as an image ({reason}); expected JPEG, PNG, GIF or WebP") from error
    if image.dim() == 4:  # an animation: its first frame
        image = image[0]
    return v2.functional.to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits


def build_augmentations(names: Sequence[str]) -> list[v2.Transform]:
    """The torchvision transforms of these names.

    Raises:
        UserError: a name is not in `AUGMENTATIONS`.
    """
    unknown = sorted(set(names) - set(AUGMENTATIONS))
    if unknown:
        raise UserError(
            f"INPUT.AUGMENTATIONS: unknown {', '.join(unknown)}; expected some of {', '.join(AUGMENTATIONS)}"
        )
    return [AUGMENTATIONS[name]() for name in names]


class DatasetMapper:
    """Detectron2's mapper contract with torchvision's box-aware transforms; all randomness from torch's generator.

    Args:
        augmentations: transforms of an image and its boxes, applied in order, before the resize.
        min_sizes: lengths of the short side to choose from; one of them for inference.
        max_size: the long side is never longer.
        with_annotations: whether `instances` are made of the annotations.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[v2.Transform],
        min_sizes: Sequence[int],
        max_size: int,
        with_annotations: bool,
    ) -> None:
        self.augmentations = augmentations
        self.resize = v2.RandomShortestSize(list(min_sizes), max_size)
        # Clamped first: by rounding, a resized box on the border may leave the image, and would be dropped.
        self.sanitize = v2.Compose(
            [
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda sample: sample["labels"]),
            ]
        )
        self.with_annotations = with_annotations

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool, augment: bool | None = None) -> dict:
        """Training reads the `_TRAIN` keys and augments, unless told otherwise; inference reads the `_TEST` keys."""
        augment = is_train if augment is None else augment
        return {
            "augmentations": build_augmentations(cfg.INPUT.AUGMENTATIONS) if augment else [],
            "min_sizes": cfg.INPUT.MIN_SIZE_TRAIN if augment else [cfg.INPUT.MIN_SIZE_TEST],
            "max_size": cfg.INPUT.MAX_SIZE_TRAIN if augment else cfg.INPUT.MAX_SIZE_TEST,
            "with_annotations": is_train,
        }

    def __call__(self, dataset_dict: dict, batch: int = 0) -> dict:
        """Maps one dataset dict.

        Args:
            dataset_dict: `file_name` and, for training, `annotations` (XYXY, pixels, 0-based), `height`, `width`.
            batch: number of the batch the sample goes into.

        Returns:
            The dict without annotations, with `image` (uint8, (3, H', W'), RGB), `height` and `width` of the original
            image and, for training, `instances` with `gt_boxes` (XYXY in pixels of `image`) and `gt_classes`.

        Raises:
            UserError: the image cannot be read, or its size is not the annotated one.
        """
        entry = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        image = read_image(entry["file_name"])
        height, width = image.shape[1:]
        expected = (entry.setdefault("height", height), entry.setdefault("width", width))
        if (height, width) != expected:
            raise UserError(
                f"{entry['file_name']}: image is {width}x{height}, its annotation says {expected[1]}x{expected[0]}; "
                "mend <size> in the annotation or replace the image"
            )
        annotations = dataset_dict.get("annotations", []) if self.with_annotations else []
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).reshape(-1, 4),
                format="XYXY",
                canvas_size=(height, width),
            ),
            "labels": torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64),
        }
        for transform in self.augmentations:
            if isinstance(transform, v2.RandomIoUCrop) and not len(sample["boxes"]):
                continue  # it needs a box to choose a crop by
            sample = self.sanitize(transform(sample))
        sample = self.resize(sample)
        if self.with_annotations:
            sample = self.sanitize(sample)
            instances = Instances(tuple(sample["image"].shape[1:]))
            instances.gt_boxes = Boxes(sample["boxes"].as_subclass(torch.Tensor))
            instances.gt_classes = sample["labels"]
            entry["instances"] = instances
        entry["image"] = sample["image"].as_subclass(torch.Tensor).contiguous()
        return entry
