"""A trained detector in use: what it finds in photographs."""

from pathlib import Path
from typing import cast

import torch
from detectron2.modeling import Backbone
from detectron2.structures import Instances
from torch import Tensor

from common.prediction import Prediction, Predictor
from detection.config import NAMES
from detection.dataset_mapper import DatasetMapper
from detection.exported import ExportedDetector
from detection.meta_arch import padded_size
from detection.modeling import load_detector
from detection.starts import resolve_detector


class Detector(Predictor):
    """A trained detector, with the name that tables and pictures give it.

    Args:
        weights: a run folder, whose `model_best.pth` is meant, a checkpoint in one, an exported file, or another whole
            detector, such as "coco"; see `detection.starts`.
        model: which detector "coco" means.

    Raises:
        UserError: weights or configuration are missing, broken, or do not fit each other.

    Attributes:
        name: a short name.
        weights: the file of its weights, or their name in a hub.
        cfg: its configuration.
        model: the model in inference mode.
    """

    min_score = 0.5

    def __init__(self, weights: str | Path, model: str = "faster_rcnn") -> None:
        self.cfg, self.model = load_detector(weights, model=model)
        self.weights = resolve_detector(str(weights), model)
        self.name: str = NAMES[self.cfg.MODEL.META_ARCHITECTURE]
        self.class_names: list[str] = list(self.cfg.MODEL.CLASSES)
        self.batch_size: int = self.cfg.TEST.IMS_PER_BATCH
        self._mapper = DatasetMapper(self.cfg, False)

    def read(self, dataset_dict: dict) -> Tensor:
        """The image of a dataset dict, or of a photograph that no annotation tells of; see `DatasetMapper.read`."""
        return self._mapper.read(dataset_dict)

    def prepare(self, pixels: Tensor) -> dict:
        """The resized image, and `height` and `width` of the original one."""
        return self._mapper({"image": pixels})

    def size_of(self, sample: dict) -> tuple[int, ...]:
        """Height and width of the image once it is padded."""
        if isinstance(self.model, ExportedDetector):  # which pads by itself
            return tuple(sample["image"].shape[1:])
        return padded_size(sample["image"].shape[1:], cast(Backbone, self.model.backbone).size_divisibility)

    @torch.inference_mode()
    def run(self, samples: list[dict]) -> list[Prediction]:
        """The objects that the detector finds, whatever their scores."""
        return [self._prediction(output["instances"].to("cpu")) for output in self.model(samples)]

    def _prediction(self, found: Instances) -> Prediction:
        found = found[found.scores.argsort(descending=True, stable=True)]
        names = [self.class_names[label] for label in found.pred_classes]
        return Prediction(names, found.scores.double().numpy(), found.pred_boxes.tensor.double().numpy())
