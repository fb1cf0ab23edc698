"""From a dataset dict to what a model eats: the image decoded, augmented together with its boxes, and resized."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torchvision import tv_tensors
from torchvision.transforms import v2

from common.errors import UserError
from common.images import read_image
from common.stream import seeded
from detection.augmentation import build_augmentations, mixup, mosaic

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")

T = TypeVar("T")


class DatasetMapper:
    """Detectron2's mapper contract with torchvision's box-aware transforms; all randomness from torch's generator.

    In order: mosaic and mixup with other images, the transforms, the resize, and the padding to a square.

    Args:
        augmentations: transforms of an image and its boxes, applied in order, before the resize.
        min_sizes: lengths of the short side to choose from; one of them for inference.
        max_size: the long side is never longer.
        with_annotations: whether `instances` are made of the annotations.
        square_sizes: sides to choose from, one for each batch, of the square that an image is fitted into, with
            padding right and below; they replace `min_sizes` and `max_size`. Empty: no square.
        closing_size: the only side from `closing_batch` on.
        closing_batch: from this batch on nothing is mixed any more; None: never.
        interpolations: of the resize, one for each image.
        fill: colour of the padding, RGB from 0 to 255.
        mixup_prob: share of the images that are mixed with another one; `instances` then have `gt_weights`.
        mixup_beta: the mixture is drawn from Beta(b, b).
        mosaic_prob: share of the images that become a quarter of a mosaic.
        dataset_dicts: where the other images are drawn from.
        seed: with the number of a batch, decides its `square_sizes`.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: Sequence[v2.Transform],
        min_sizes: Sequence[int],
        max_size: int,
        with_annotations: bool,
        square_sizes: Sequence[int] = (),
        closing_size: int = 0,
        closing_batch: int | None = None,
        interpolations: Sequence[str] = ("bilinear",),
        fill: Sequence[float] = (0, 0, 0),
        mixup_prob: float = 0.0,
        mixup_beta: float = 1.5,
        mosaic_prob: float = 0.0,
        dataset_dicts: Sequence[dict] = (),
        seed: int = 0,
    ) -> None:
        unknown = set(interpolations) - set(INTERPOLATIONS)
        if unknown or not interpolations:
            raise UserError(
                f"INPUT.INTERPOLATIONS {list(interpolations)}: expected some of {', '.join(INTERPOLATIONS)}"
            )
        for key, prob in (("MIXUP_PROB", mixup_prob), ("MOSAIC_PROB", mosaic_prob)):
            if not 0 <= prob <= 1:
                raise UserError(f"INPUT.{key} {prob}: expected a share from 0 to 1")
        if (mixup_prob or mosaic_prob) and not dataset_dicts:
            raise ValueError("mixup and mosaic need dataset_dicts to draw the other images from")
        self.augmentations = augmentations
        self.min_sizes = list(min_sizes)
        self.max_size = max_size
        self.with_annotations = with_annotations
        self.square_sizes = square_sizes
        self.closing_size = closing_size
        self.closing_batch = closing_batch
        self.interpolations = interpolations
        self.fill = [round(value) for value in fill]
        self.mixup_prob = mixup_prob
        self.mixup_beta = mixup_beta
        self.mosaic_prob = mosaic_prob
        self.dataset_dicts = dataset_dicts
        self.seed = seed
        # Clamped first: by rounding, a resized box on the border may leave the image, and would be dropped.
        self.sanitize = v2.Compose(
            [
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_labels),
            ]
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool, augment: bool | None = None, dataset_dicts: Sequence[dict] = ()
    ) -> dict:
        """Training reads the `_TRAIN` keys and augments, unless told otherwise; inference reads the `_TEST` keys."""
        if not (is_train if augment is None else augment):
            return {
                "augmentations": [],
                "min_sizes": [cfg.INPUT.MIN_SIZE_TEST],
                "max_size": cfg.INPUT.MAX_SIZE_TEST,
                "with_annotations": is_train,
            }
        # A key that another one replaces is not read, so that it is refused when it is given.
        squares = cfg.INPUT.SQUARE_SIZES_TRAIN
        has_closing = squares or cfg.INPUT.MIXUP_PROB or cfg.INPUT.MOSAIC_PROB
        close = cfg.INPUT.CLOSE_ITERS if has_closing else 0
        return {
            "augmentations": build_augmentations(cfg.INPUT.AUGMENTATIONS, cfg.MODEL.PIXEL_MEAN),
            "min_sizes": [] if squares else cfg.INPUT.MIN_SIZE_TRAIN,
            "max_size": 0 if squares else cfg.INPUT.MAX_SIZE_TRAIN,
            "with_annotations": is_train,
            "square_sizes": squares,
            "closing_size": cfg.INPUT.MIN_SIZE_TEST,
            "closing_batch": cfg.SOLVER.MAX_ITER - close if close else None,
            "interpolations": cfg.INPUT.INTERPOLATIONS,
            "fill": cfg.MODEL.PIXEL_MEAN,  # zero for the model, as the padding that makes a batch of images
            "mixup_prob": cfg.INPUT.MIXUP_PROB,
            "mixup_beta": cfg.INPUT.MIXUP_BETA,
            "mosaic_prob": cfg.INPUT.MOSAIC_PROB,
            "dataset_dicts": dataset_dicts,
            "seed": cfg.SEED,
        }

    def __call__(self, dataset_dict: dict, batch: int = 0) -> dict:
        """Maps one dataset dict.

        Args:
            dataset_dict: `file_name`, or `image` already decoded, uint8 (3, H, W), RGB; and, for training,
                `annotations` (XYXY, pixels, 0-based), `height`, `width`.
            batch: number of the batch the sample goes into.

        Returns:
            The dict without annotations, with `image` (uint8, (3, H', W'), RGB), `height` and `width` of the original
            image and, for training, `instances` with `gt_boxes` (XYXY in pixels of `image`) and `gt_classes`.

        Raises:
            UserError: the image cannot be read, or its size is not the annotated one.
        """
        entry = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        sample = self._read(dataset_dict)
        height, width = sample["image"].shape[1:]
        entry.setdefault("height", height)
        entry.setdefault("width", width)
        if not self._is_closing(batch):
            sample = self._mix(sample)
        for transform in self.augmentations:
            if isinstance(transform, v2.RandomIoUCrop) and not len(sample["boxes"]):
                continue  # it needs a box to choose a crop by
            sample = self.sanitize(transform(sample))
        sample = self._resize(sample, batch)
        if self.with_annotations:
            sample = self.sanitize(sample)
            instances = Instances(tuple(sample["image"].shape[1:]))
            instances.gt_boxes = Boxes(sample["boxes"].as_subclass(torch.Tensor))
            instances.gt_classes = sample["labels"]
            if self.mixup_prob:
                instances.gt_weights = sample["weights"]
            entry["instances"] = instances
        entry["image"] = sample["image"].as_subclass(torch.Tensor).contiguous()
        return entry

    def square_size(self, batch: int) -> int:
        """Side of the square of this batch, a function of the seed and the batch alone; needs `square_sizes`."""
        if self._is_closing(batch):
            return self.closing_size
        with seeded("square_size", self.seed, batch):
            return _choose(self.square_sizes)

    def _is_closing(self, batch: int) -> bool:
        return self.closing_batch is not None and batch >= self.closing_batch

    def _read(self, dataset_dict: dict) -> dict:
        """The sample as `detection.augmentation` describes it."""
        path = dataset_dict.get("file_name")
        image = dataset_dict["image"] if "image" in dataset_dict else read_image(path)
        height, width = image.shape[1:]
        expected = (dataset_dict.get("height", height), dataset_dict.get("width", width))
        if (height, width) != expected:
            raise UserError(
                f"{path}: image is {width}x{height}, its annotation says {expected[1]}x{expected[0]}; "
                "mend <size> in the annotation or replace the image"
            )
        annotations = dataset_dict.get("annotations", []) if self.with_annotations else []
        boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32)
        return {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64),
            "weights": torch.ones(len(annotations)),
        }

    def _mix(self, sample: dict) -> dict:
        if torch.rand(()) < self.mosaic_prob:
            sample = mosaic([sample, *(self._read(_choose(self.dataset_dicts)) for _ in range(3))])
        if torch.rand(()) < self.mixup_prob:
            share = float(torch.distributions.Beta(self.mixup_beta, self.mixup_beta).sample())
            sample = mixup(sample, self._read(_choose(self.dataset_dicts)), share)
        return sample

    def _resize(self, sample: dict, batch: int) -> dict:
        interpolation = _choose(self.interpolations)
        if not self.square_sizes:
            return v2.RandomShortestSize(self.min_sizes, self.max_size, interpolation)(sample)
        size = self.square_size(batch)
        sample = v2.RandomShortestSize(size, size, interpolation)(sample)
        height, width = sample["image"].shape[1:]
        return v2.Pad([0, 0, size - width, size - height], fill=self.fill)(sample)


def _labels(sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return sample["labels"], sample["weights"]


def _choose(choices: Sequence[T]) -> T:
    return choices[int(torch.randint(len(choices), ()))]
