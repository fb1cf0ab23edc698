"""A detector as one graph, from the pixels of an image to its boxes: what `tools.export` writes for other runtimes."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import ImageList
from torch import Tensor, nn

from common.data_root import OFFICIAL, resolve_data_root
from common.errors import UserError
from common.export import Exportable
from detection.config import at_least_one
from detection.dataset_mapper import DatasetMapper
from detection.evaluation import read_threshold
from detection.exported import KIND
from detection.modeling import load_detector, read_detector_cfg
from detection.starts import resolve_detector
from detection.voc import OFFICIAL_FOLDERS, default_train, register_voc

SMALLEST = 32  # pixels, the coarsest stride
NETWORK = ("backbone", "head", "rpn_head", "box_head", "res5")  # all but decoding and suppression
PREDICTION_LAYERS = ("prediction", "objectness_logits", "anchor_deltas", "cls_score", "bbox_pred")


class DetectorGraph(nn.Module):
    """Detects in one image of any size, using only operators that tracing preserves.

    Args:
        detector: one of our meta-architectures, in inference mode and float32.
    """

    detector: Any  # Detectron2 has no types

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, 5), XYXY in pixels of the image and the score, and labels (N,), best first.

        Args:
            image: float32 (3, H, W), RGB from 0 to 255.
        """
        detector: Any = self.detector  # each meta-architecture has parts of its own
        height, width = image.shape[1:]
        # Detectron2 pads to a quotient rounded down, which OpenVINO rounds to the nearest.
        multiple = max(detector.backbone.size_divisibility, 1)
        normal = (image - detector.pixel_mean) / detector.pixel_std
        padded = F.pad(normal, [0, -width % multiple, 0, -height % multiple])
        images = ImageList(padded[None], [(height, width)])
        features = detector.backbone(images.tensor)
        if isinstance(detector, GeneralizedRCNN):
            with patch_builtin_len():  # which would make a constant of the number of proposals
                proposals, _ = detector.proposal_generator(images, features)
                (found,), _ = detector.roi_heads(images, features, proposals)
        else:
            levels = [features[name] for name in detector.head_in_features]
            (found,) = detector.forward_inference(images, levels, detector.head(levels))
        return torch.cat([found.pred_boxes.tensor, found.scores[:, None]], dim=1), found.pred_classes


def exportable_detector(weights: str, model: str = "faster_rcnn", size: int | None = None) -> Exportable:
    """A trained detector, ready to be exported.

    Args:
        weights: see `detection.modeling.load_detector`.
        model: which detector "coco" means.
        size: `INPUT.MIN_SIZE_TEST` of the images it will see, in pixels; None: as it was trained. The limit of the
            long side grows along; where both are equal, as YOLOv3 has them, it is the long side.

    Raises:
        UserError: weights are missing or broken, or the size is too small.
    """
    options = ["MODEL.PRECISION", "float32", "MODEL.DEVICE", "cpu"]
    if size is not None:
        if size < SMALLEST:
            raise UserError(f"SIZE={size}: expected {SMALLEST} pixels or more")
        cfg = read_detector_cfg(resolve_detector(weights, model))
        longest = round(cfg.INPUT.MAX_SIZE_TEST * size / at_least_one(cfg, "INPUT.MIN_SIZE_TEST"))
        options += ["INPUT.MIN_SIZE_TEST", str(size), "INPUT.MAX_SIZE_TEST", str(longest)]
    cfg, detector = load_detector(weights, options, model)
    threshold = None
    with suppress(UserError):  # not evaluated yet
        threshold = read_threshold(resolve_detector(weights, model))
    card = {
        "kind": KIND,
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "class_names": list(cfg.MODEL.CLASSES),
        "input": "float32 (3, height, width), RGB, 0 to 255; boxes are x0, y0, x1, y1 in its pixels, score",
        "shortest_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "threshold": threshold,
        "config": cfg.dump(),
    }
    mapper = DatasetMapper(cfg, False)
    return Exportable(
        network=DetectorGraph(detector),
        example=torch.rand(3, 2 * SMALLEST, 3 * SMALLEST, generator=torch.Generator().manual_seed(0)) * 255,
        free={1: "height", 2: "width"},
        outputs=["boxes", "labels"],
        card=card,
        training_images=partial(training_images, cfg),
        prepare=lambda record: mapper(record)["image"].float(),
        quantised=NETWORK,
        kept=PREDICTION_LAYERS,
    )


def training_images(cfg: CfgNode, data: str | None) -> list[dict]:
    """The dataset dicts of the images that the detector was trained on, or of those of a data root.

    Raises:
        UserError: the data is not there; no third-party detector is calibrated on the drawn sample unasked.
    """
    is_own = cfg.DATASETS.ROOT and not data
    if not is_own and data is None and not all((OFFICIAL / name).is_dir() for name in OFFICIAL_FOLDERS.values()):
        raise UserError("DATA is not given; expected training images, on which int8 is calibrated")
    root = Path(cfg.DATASETS.ROOT) if is_own else resolve_data_root(data, OFFICIAL_FOLDERS.values())[0]
    register_voc(root)
    return [
        record
        for name in (cfg.DATASETS.TRAIN if is_own else default_train(root))
        for record in DatasetCatalog.get(name)
    ]
