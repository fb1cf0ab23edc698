"""The configuration of a run: Detectron2's keys, ours beside them, and schedules written in epochs."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from common.errors import UserError
from detection.yolov3.config import add_yolov3_config

CONFIGS = Path(__file__).parent / "configs"
LEAF = {"faster_rcnn": "faster_rcnn_R_50_FPN", "yolov3": "yolov3_darknet53"}


def add_detection_config(cfg: CfgNode) -> None:
    """Adds the keys that both detectors share to Detectron2's."""
    # Mixed precision without a gradient scaler, in training and in inference, on CPU and GPU.
    cfg.MODEL.BF16 = True
    cfg.MODEL.CHANNELS_LAST = True
    # Names of the classes in the order of their ids, taken from the data, and the folder the data came from.
    cfg.MODEL.CLASSES = []
    cfg.DATASETS.ROOT = ""

    # torchvision.transforms.v2 classes by name, in order, applied to the training images with their boxes; arguments
    # other than their defaults as {name: {argument: value}}.
    cfg.INPUT.AUGMENTATIONS = ["RandomHorizontalFlip"]
    # Sides of the squares that training images are fitted and padded into, one for each batch; replaces MIN_SIZE_TRAIN
    # and MAX_SIZE_TRAIN, which are chosen for each image.
    cfg.INPUT.SQUARE_SIZES_TRAIN = []
    # "nearest", "bilinear", "bicubic": one is drawn for each training image.
    cfg.INPUT.INTERPOLATIONS = ["bilinear"]
    # Shares of the training images that are mixed with another one, Beta(b, b) of each, or become part of a mosaic.
    cfg.INPUT.MIXUP_PROB = 0.0
    cfg.INPUT.MIXUP_BETA = 1.5
    cfg.INPUT.MOSAIC_PROB = 0.0
    # Length of the last phase, without mixup and mosaic and, with SQUARE_SIZES_TRAIN, at MIN_SIZE_TEST.
    cfg.INPUT.CLOSE_ITERS = 0

    # Lengths in epochs, one pass over the training images; 0 leaves the count in iterations to Detectron2's key.
    cfg.SOLVER.MAX_EPOCHS = 0.0
    cfg.SOLVER.STEPS_EPOCHS = []
    cfg.SOLVER.WARMUP_EPOCHS = 0.0
    cfg.INPUT.CLOSE_EPOCHS = 0.0
    cfg.TEST.EVAL_EPOCHS = 0.0
    # Exponential moving average of the weights, evaluated and kept in their stead; 0 is off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Iterations between two rows of metrics.json and lines of the log.
    cfg.SOLVER.LOG_PERIOD = 20

    # Evaluations without a rise of AP50_11point by MIN_RISE before training stops; 0 never stops early.
    cfg.TEST.PATIENCE = 0
    cfg.TEST.MIN_RISE = 0.001
    # Images whose losses are averaged into validation_loss at every evaluation; 0 is off.
    cfg.TEST.VALIDATION_LOSS_IMAGES = 500
    cfg.TEST.IMS_PER_BATCH = 4


def get_cfg() -> CfgNode:
    """Detectron2's defaults with the keys of this project."""
    cfg = get_detectron2_cfg()
    add_detection_config(cfg)
    add_yolov3_config(cfg)
    return cfg


def leaf_name(model: str, recipe: str) -> str:
    """Name of the leaf configuration, and of the runs, of a model (see `LEAF`) and a recipe ("best", "study")."""
    return LEAF[model] + ("_study" if recipe == "study" else "")


def default_device() -> str:
    """The device that a model runs on here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_run_cfg(run: Path) -> CfgNode:
    """The configuration of a run folder, for the device that is here.

    Raises:
        UserError: there is none, or it is broken.
    """
    cfg = get_cfg()
    merge_file(cfg, run / "config.yaml")
    cfg.MODEL.DEVICE = default_device()
    return cfg


def merge_file(cfg: CfgNode, path: Path) -> None:
    """Merges a YAML file into `cfg`.

    Raises:
        UserError: the file is missing, is no YAML, or holds a key or type that the configuration does not know.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a configuration of detection/configs or of a run folder")
    try:
        cfg.merge_from_file(str(path))
    except Exception as error:  # yacs and PyYAML raise a dozen kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: {reason}; expected the keys of detection/config.py and Detectron2") from error


def merge_options(cfg: CfgNode, options: Sequence[str]) -> None:
    """Merges `KEY VALUE ...` pairs into `cfg`; a length in iterations replaces the same length in epochs.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or one of them is missing.
    """
    if len(options) % 2:
        raise UserError(f"OPTS: {' '.join(options)!r} has {len(options)} words; expected pairs of KEY VALUE")
    in_epochs = {
        "SOLVER.MAX_ITER": "SOLVER.MAX_EPOCHS",
        "SOLVER.WARMUP_ITERS": "SOLVER.WARMUP_EPOCHS",
        "INPUT.CLOSE_ITERS": "INPUT.CLOSE_EPOCHS",
        "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
    }
    for key, value in zip(options[::2], options[1::2], strict=True):
        try:
            known = functools.reduce(lambda node, part: node.get(part, {}), key.split("."), cfg)
            if value.removeprefix("-").isdecimal() and isinstance(known, float):
                value = f"{value}.0"  # yacs would refuse the integer
            cfg.merge_from_list([key, value])
            if key in in_epochs:
                cfg.merge_from_list([in_epochs[key], 0.0])
            if key == "SOLVER.STEPS":
                cfg.SOLVER.STEPS_EPOCHS = []
        except Exception as error:
            raise UserError(f"OPTS: {key} {value}: {str(error).splitlines()[0]}; see detection/config.py") from error


def resolve_epochs(cfg: CfgNode, num_images: int) -> None:
    """Turns lengths in epochs into iterations, in place, and cuts the schedule to its end.

    Args:
        cfg: a configuration whose batch and rate are already those of the run.
        num_images: images in one pass over the training data.
    """

    def iterations(epochs: float) -> int:
        return max(1, math.ceil(epochs * num_images / cfg.SOLVER.IMS_PER_BATCH))

    if cfg.SOLVER.MAX_EPOCHS:
        cfg.SOLVER.MAX_ITER = iterations(cfg.SOLVER.MAX_EPOCHS)
    if cfg.SOLVER.STEPS_EPOCHS:
        cfg.SOLVER.STEPS = tuple(iterations(epochs) for epochs in cfg.SOLVER.STEPS_EPOCHS)
    cfg.SOLVER.STEPS = tuple(step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER)
    if cfg.SOLVER.WARMUP_EPOCHS:
        cfg.SOLVER.WARMUP_ITERS = iterations(cfg.SOLVER.WARMUP_EPOCHS)
    cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER)
    if cfg.INPUT.CLOSE_EPOCHS:
        cfg.INPUT.CLOSE_ITERS = iterations(cfg.INPUT.CLOSE_EPOCHS)
    if cfg.TEST.EVAL_EPOCHS:
        cfg.TEST.EVAL_PERIOD = iterations(cfg.TEST.EVAL_EPOCHS)
    cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.STEPS_EPOCHS = 0.0, []
    cfg.SOLVER.WARMUP_EPOCHS, cfg.INPUT.CLOSE_EPOCHS, cfg.TEST.EVAL_EPOCHS = 0.0, 0.0, 0.0
