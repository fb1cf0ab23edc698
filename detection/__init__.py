"""Object detection on Pascal VOC with Detectron2. In a notebook: `from detection import load`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import common  # noqa: F401 # before torch: how its threads wait is settled there

if TYPE_CHECKING:
    from detection.predict import Detector


def load(weights: str | Path, model: str = "faster_rcnn") -> "Detector":
    """A trained detector: `load("output/faster_rcnn_R_50_FPN").predict("photo.jpg")` gives boxes, scores and names.

    Args:
        weights: a run folder, whose `model_best.pth` is meant, a checkpoint in one, an exported file, or another whole
            detector, such as "coco"; see `detection.starts`.
        model: which detector "coco" means, "faster_rcnn" or "yolov3".

    Raises:
        UserError: weights or configuration are missing, broken, or do not fit each other.
    """
    from detection.predict import Detector  # here, since Detectron2 takes seconds to import

    return Detector(os.path.expanduser(weights), model)  # noqa: PTH111 # the name of a hub is no path
