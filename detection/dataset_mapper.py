"""From a dataset dict to what a model eats: the image decoded, augmented together with its boxes, and resized."""

from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torchvision.transforms import v2

from common.errors import UserError
from common.images import read_image, read_shrunk_image
from common.stream import seeded
from detection.augmentation import augment, build_augmentations, mixup, mosaic
from detection.config import at_least_one
from detection.scene import INTERPOLATIONS, Scene, map_boxes, open_scene, paint
from detection.voc_pictures import wrong_size


class DatasetMapper:
    """Detectron2's mapper contract with torchvision's box-aware transforms; all randomness from torch's generator.

    In order: mosaic and mixup with other images, the transforms, the resize, and the padding to a square.

    Args:
        augmentations: transforms of an image and its boxes, applied in order, before the resize.
        min_sizes: lengths of the short side to choose from; one of them for inference.
        max_size: the long side is never longer.
        exif: "auto", images are turned as their EXIF tag says, or "stored", they are not; where only the other gives
            the annotated size, that one is used.
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
        exif: str = "auto",
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
        unknown = set(interpolations) - INTERPOLATIONS.keys()
        if unknown or not interpolations:
            raise UserError(
                f"INPUT.INTERPOLATIONS {list(interpolations)}: expected some of {', '.join(INTERPOLATIONS)}"
            )
        if exif not in ("auto", "stored"):
            raise UserError(f"INPUT.EXIF {exif}: expected auto or stored")
        for key, prob in (("MIXUP_PROB", mixup_prob), ("MOSAIC_PROB", mosaic_prob)):
            if not 0 <= prob <= 1:
                raise UserError(f"INPUT.{key} {prob}: expected a share from 0 to 1")
        if (mixup_prob or mosaic_prob) and not dataset_dicts:
            raise ValueError("mixup and mosaic need dataset_dicts to draw the other images from")
        self.augmentations = augmentations
        self.min_sizes = list(min_sizes)
        self.max_size = max_size
        self.exif = exif
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

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict:
        """Training augments, has annotations and reads the `_TRAIN` keys; inference does neither and reads `_TEST`.

        Raises:
            UserError: a size is below 1, or limited by another one, or an augmentation is unknown.
        """
        if not is_train:
            min_size, max_size = (at_least_one(cfg, f"INPUT.{end}_SIZE_TEST") for end in ("MIN", "MAX"))
            if min_size > max_size:
                raise UserError(
                    f"INPUT.MIN_SIZE_TEST {min_size}: more than INPUT.MAX_SIZE_TEST {max_size}, which would limit it; "
                    "give both"
                )
            return {
                "augmentations": [],
                "min_sizes": [min_size],
                "max_size": max_size,
                "with_annotations": False,
                "exif": cfg.INPUT.EXIF,
            }
        # A key that another one replaces is not read, so that it is refused when it is given.
        squares = at_least_one(cfg, "INPUT.SQUARE_SIZES_TRAIN")
        has_closing = squares or cfg.INPUT.MIXUP_PROB or cfg.INPUT.MOSAIC_PROB
        close = cfg.INPUT.CLOSE_ITERS if has_closing else 0
        return {
            "augmentations": build_augmentations(cfg.INPUT.AUGMENTATIONS, cfg.MODEL.PIXEL_MEAN),
            "min_sizes": [] if squares else at_least_one(cfg, "INPUT.MIN_SIZE_TRAIN"),
            "max_size": 0 if squares else at_least_one(cfg, "INPUT.MAX_SIZE_TRAIN"),
            "with_annotations": True,
            "exif": cfg.INPUT.EXIF,
            "square_sizes": squares,
            "closing_size": at_least_one(cfg, "INPUT.MIN_SIZE_TEST"),
            "closing_batch": cfg.SOLVER.MAX_ITER - close if close else None,
            "interpolations": cfg.INPUT.INTERPOLATIONS,
            "fill": cfg.MODEL.PIXEL_MEAN,  # zero for the model, as the padding that makes a batch of images
            "mixup_prob": cfg.INPUT.MIXUP_PROB,
            "mixup_beta": cfg.INPUT.MIXUP_BETA,
            "mosaic_prob": cfg.INPUT.MOSAIC_PROB,
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
        rng = np.random.default_rng(int(torch.randint(2**63 - 1, ())))
        scene = self._open(dataset_dict)
        entry.setdefault("height", scene.size[0])
        entry.setdefault("width", scene.size[1])
        if not self._is_closing(batch):
            scene = self._mix(scene, rng)
        for transform in self.augmentations:
            scene = augment(transform, scene, rng)

        side = self.square_size(batch) if self.square_sizes else None
        height, width = _fit(*scene.size, side or rng.choice(self.min_sizes), side or self.max_size)
        image = paint(scene, height, width, str(rng.choice(self.interpolations)))
        if side:
            image = cv2.copyMakeBorder(image, 0, side - height, 0, side - width, cv2.BORDER_CONSTANT, value=self.fill)
        if self.with_annotations:
            boxes = map_boxes(scene, height, width)
            seen = (boxes[:, 2:] - boxes[:, :2] >= 1).all(axis=1)
            instances = Instances(image.shape[:2])
            instances.gt_boxes = Boxes(torch.from_numpy(boxes[seen]).float())
            instances.gt_classes = torch.from_numpy(scene.labels[seen])
            if self.mixup_prob:
                instances.gt_weights = torch.from_numpy(scene.weights[seen]).float()
            entry["instances"] = instances
        channels = np.empty((3, *image.shape[:2]), np.uint8)
        cv2.split(image, list(channels))
        entry["image"] = torch.from_numpy(channels)
        return entry

    def read(self, dataset_dict: dict) -> torch.Tensor:
        """The whole image of a file that a dataset dict names: uint8 (3, H, W), RGB, with the pixels of its boxes.

        Raises:
            UserError: the image cannot be read, or its size is not the annotated one.
        """
        if "height" not in dataset_dict:
            return read_image(dataset_dict["file_name"])
        return _read(dataset_dict, (dataset_dict["height"], dataset_dict["width"]), self.exif == "auto", shrink=1)

    def test_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that inference resizes an image of this height and width to."""
        return _fit(height, width, self.min_sizes[0], self.max_size)

    def square_size(self, batch: int) -> int:
        """Side of the square of this batch, a function of the seed and the batch alone; needs `square_sizes`."""
        if self._is_closing(batch):
            return self.closing_size
        with seeded("square_size", self.seed, batch):
            return self.square_sizes[int(torch.randint(len(self.square_sizes), ()))]

    def _is_closing(self, batch: int) -> bool:
        return self.closing_batch is not None and batch >= self.closing_batch

    def _open(self, dataset_dict: dict) -> Scene:
        if "height" not in dataset_dict and "image" not in dataset_dict:
            dataset_dict = dataset_dict | {"image": self.read(dataset_dict)}
        height, width = dataset_dict["image"].shape[1:] if "image" in dataset_dict else (0, 0)
        size = dataset_dict.get("height", height), dataset_dict.get("width", width)
        annotations = dataset_dict.get("annotations", []) if self.with_annotations else []
        boxes = [annotation["bbox"] for annotation in annotations]
        labels = [annotation["category_id"] for annotation in annotations]
        return open_scene(partial(_read, dataset_dict, size, self.exif == "auto"), size, boxes, labels)

    def _mix(self, scene: Scene, rng: np.random.Generator) -> Scene:
        def another() -> Scene:
            return self._open(self.dataset_dicts[int(rng.integers(len(self.dataset_dicts)))])

        if rng.random() < self.mosaic_prob:
            scene = mosaic([scene, another(), another(), another()], rng)
        if rng.random() < self.mixup_prob:
            scene = mixup(scene, another(), rng.beta(self.mixup_beta, self.mixup_beta))
        return scene


def _read(dataset_dict: dict, expected: tuple[int, int], turned: bool, shrink: int) -> torch.Tensor:
    """The image, shrunk where its decoder can, if it is of the expected height and width, turned or not."""
    if "image" in dataset_dict:
        image = dataset_dict["image"]
        height, width = image.shape[1:]
    else:
        image, (height, width) = read_shrunk_image(dataset_dict["file_name"], shrink, turned)
        if (width, height) == expected != (height, width):
            # The boxes were drawn on the image turned the other way, so it is read that way.
            image, (height, width) = read_shrunk_image(dataset_dict["file_name"], shrink, not turned)
    if (height, width) != expected:
        raise UserError(f"{dataset_dict.get('file_name')}: {wrong_size((height, width), expected)}")
    return image


def _fit(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width with a short side of `min_size`, or a long side of `max_size` where it would exceed that."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    # Truncated to whole pixels, as in torchvision, but so that rounding errors take no pixel from the side that fits.
    return max(int(height * scale + 1e-6), 1), max(int(width * scale + 1e-6), 1)
