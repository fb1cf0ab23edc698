"""What a detector starts from: `START=coco | imagenet | random`, a file, a run folder, or a name of a hub.

Weights of a classifier fill a backbone. A third-party detector is one that a leaf of `detection/configs` describes,
`*_coco.yaml` or `*_zoo.yaml`: it can be used and evaluated as it is, and trained further. A file is known by what it
holds, not by its name.
"""

import functools
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torchvision
from detectron2.config import CfgNode

from common.errors import UserError, first_line
from common.exported import is_exported
from common.runtime import default_device
from common.weights import LOCAL_WEIGHTS, read_checkpoint, weights_of
from common.zoo_pickle import is_pickle, read_zoo_pickle
from detection.classes import COCO_CLASSES
from detection.config import CONFIGS, get_cfg, leaf_name, merge_file, merge_options
from detection.timm_backbone import normalisation_of
from detection.torchvision_detectors import is_torchvision, is_torchvision_v2
from detection.voc import VOC_CLASSES
from detection.voc_lists import read_lines
from detection.yolov3.darknet_weights import NEGATIVE_SLOPE, NORM_EPS, count_values, is_darknet_file
from detection.zoo import zoo_leaf

logger = logging.getLogger(__name__)

# Of Darknet's detectors: how many values a file holds that belong to no class, and how many more for each class.
DARKNET_VALUES = {"yolov3_darknet53_coco": (61_570_957, 5_385), "yolov3_tiny_coco": (8_673_934, 2_310)}
TORCHVISION_CLASSES = 91  # of COCO's categories, the unused ones and the background among them
DARKNET_URL = "https://data.pjreddie.com/files/"
DARKNET_MD5 = {
    "yolov3.weights": "c84e5b99d0e52cd466ae710cadf6d84c",
    "yolov3-tiny.weights": "3bcd6b390912c18924b46b26a9e7ff53",
}


class ForeignDetector(NamedTuple):
    """A third-party detector.

    Attributes:
        leaf: name of the configuration that computes as it does.
        classes: what it detects, in the order of its outputs.
    """

    leaf: str
    classes: tuple[str, ...]


def resolve_start(start: str, model: str) -> str | None:
    """The `MODEL.WEIGHTS` that a start means; None leaves those of the recipe.

    Args:
        start: as the user gives it.
        model: the detector, see `detection.config.LEAF`.

    Raises:
        UserError: a run folder holds no trained model.
    """
    if start == "imagenet":
        return None
    if start == "random":
        return ""
    if start == "coco":
        return read_leaf(leaf_name(model, "coco")).MODEL.WEIGHTS
    if Path(start).is_dir():
        if not (Path(start) / "model_best.pth").is_file():
            raise UserError(f"{start}: holds no model_best.pth; expected the folder of a run that has been evaluated")
        return str(Path(start) / "model_best.pth")
    if "://" in start or Path(start).is_file():
        return start
    if start in DARKNET_MD5:
        return f"darknet://{start}"
    if start in torchvision.models.list_models(module=torchvision.models.detection):
        weights = torchvision.models.get_model_weights(start).DEFAULT
        return f"torchvision://{weights}"
    return f"timm://{start}" if timm.is_model(start) else start


def resolve_detector(start: str, model: str) -> str:
    """The `MODEL.WEIGHTS` of the trained detector that a start means; see `resolve_start`.

    Raises:
        UserError: it means none, as `random` and `imagenet`, or a run folder holds no trained model.
    """
    weights = resolve_start(start, model)
    if not weights:
        raise UserError(f"{start}: is no trained detector; expected a run folder, a checkpoint in one, or coco")
    return weights


def run_of(weights: str) -> Path | None:
    """The run folder that `MODEL.WEIGHTS` lies in; None where it is no file of a run of a detector."""
    config = Path(weights).with_name("config.yaml") if weights else Path()
    # That of a classifier, whose weights a backbone starts from, names its model.
    is_of_detector = config.is_file() and not re.search("^model:", config.read_text(errors="replace"), re.MULTILINE)
    return config.parent if is_of_detector else None


def read_leaf(leaf: str, options: Sequence[str] = ()) -> CfgNode:
    """The configuration of that name in `detection/configs`, with KEY VALUE pairs over it."""
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"{leaf}.yaml")
    cfg.MODEL.DEVICE = default_device()
    merge_options(cfg, options)
    return cfg


@functools.cache  # it reads the file, and several ask
def identify(weights: str) -> ForeignDetector | None:
    """Which third-party detector `MODEL.WEIGHTS` names; None where it is none, or one of a run of this project.

    Raises:
        UserError: a file of Darknet's detectors has classes of its own and no list of their names beside it.
    """
    if "://" in weights:
        leaves = sorted(path.stem for path in CONFIGS.glob("*_coco.yaml"))
        leaf = next((leaf for leaf in leaves if weights == read_leaf(leaf).MODEL.WEIGHTS), None)
        return ForeignDetector(leaf, COCO_CLASSES) if leaf else None
    path = Path(weights)
    if not path.is_file() or run_of(weights):
        return None
    if is_pickle(path):
        state = read_zoo_pickle(path)["model"]
        leaf, num_classes = zoo_leaf(state), len(state.get("roi_heads.box_predictor.cls_score.bias", ())) - 1
        classes = _known_classes(num_classes)
        return ForeignDetector(leaf, classes) if leaf and classes else None
    if not is_darknet_file(path):
        state = weights_of(read_checkpoint(path))
        if not is_torchvision(state) or len(state["roi_heads.box_predictor.cls_score.bias"]) != TORCHVISION_CLASSES:
            return None
        version = "_v2" if is_torchvision_v2(state) else ""
        return ForeignDetector(f"faster_rcnn_R_50_FPN{version}_coco", COCO_CLASSES)
    for leaf, (fixed, per_class) in DARKNET_VALUES.items():
        num_classes, rest = divmod(count_values(path) - fixed, per_class)
        if num_classes > 0 and not rest:
            return ForeignDetector(leaf, _darknet_classes(path, num_classes))
    return None


def _darknet_classes(path: Path, num_classes: int) -> tuple[str, ...]:
    """The names in the file's .names, one a line, as Darknet keeps them; else COCO's eighty or VOC's twenty."""
    names = path.with_suffix(".names")
    found = tuple(read_lines(names)) if names.is_file() else _known_classes(num_classes)
    if len(found) != num_classes:
        raise UserError(
            f"{path}: detects {num_classes} classes, {names} has {len(found)} names; expected that file with a name a "
            "line, in Darknet's order"
        )
    return found


def _known_classes(num_classes: int) -> tuple[str, ...]:
    """COCO's eighty or VOC's twenty; none for another number."""
    return next((known for known in (COCO_CLASSES, VOC_CLASSES) if len(known) == num_classes), ())


def is_foreign_file(path: Path) -> bool:
    """Whether a file is in a format of Darknet or of Detectron2's model zoo, which no checkpoint of a run has."""
    return is_darknet_file(path) or is_pickle(path)


def foreign_cfg(weights: str, options: Sequence[str] = ()) -> CfgNode:
    """The configuration of a third-party detector, with its classes.

    Args:
        weights: see `resolve_start`.
        options: KEY VALUE pairs over it.

    Raises:
        UserError: it is none that is known.
    """
    found = identify(weights)
    if found is None:
        is_there = "://" in weights or Path(weights).exists()
        reason = (
            "no whole detector that is known, and no config.yaml of a detector's run lies beside it"
            if is_there
            else "no such file"
        )
        raise UserError(
            f"{weights}: {reason}; expected a run folder or a checkpoint in one, coco, Darknet's yolov3.weights or "
            "yolov3-tiny.weights, torchvision's fasterrcnn_resnet50_fpn or _v2, or one of Detectron2's model zoo"
        )
    cfg = read_leaf(found.leaf, options)
    cfg.MODEL.WEIGHTS = weights
    set_classes(cfg, found.classes)
    return cfg


def set_classes(cfg: CfgNode, classes: Sequence[str]) -> None:
    """Sets names and number of the classes, in the order of their ids."""
    cfg.MODEL.CLASSES = list(classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.YOLOV3.NUM_CLASSES = len(classes)


def folder_of(weights: str, output: Path = Path("output")) -> Path:
    """The folder for a detector's results: its run folder, beside an exported file, or one below `output`."""
    if is_exported(weights):
        return Path(weights).parent
    return run_of(weights) or output / "starts" / Path(weights).stem


def unfetched(source: str, file: str, error: Exception) -> UserError:
    """What to say of weights that a hub does not give, and under which name their file is looked for."""
    reason = first_line(error)
    return UserError(
        f"{source}: pretrained weights cannot be fetched ({reason}); put the file here as {LOCAL_WEIGHTS / file}, name "
        "one (START=path) or train from random weights (START=random)"
    )


def darknet_file(name: str) -> Path:
    """One of Darknet's published files: in `weights/`, or torch's cache, which it is fetched into.

    Raises:
        UserError: it is unknown, cannot be fetched, or is not what was published.
    """
    if name not in DARKNET_MD5:
        raise UserError(f"darknet://{name}: no such file; expected {' or '.join(DARKNET_MD5)}")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = next((path for path in (LOCAL_WEIGHTS / name, cached) if path.is_file()), None)
    if path is None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(DARKNET_URL + name, str(cached))
        except OSError as error:
            raise unfetched(f"darknet://{name}", name, error) from error
        path = cached
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != DARKNET_MD5[name]:
        raise UserError(f"{path}: its md5 is {digest}, expected {DARKNET_MD5[name]}: delete it and fetch it again")
    return path


def compute_as_darknet(cfg: CfgNode) -> None:
    """Takes Darknet's arithmetic and range of pixels, in place, where `MODEL.WEIGHTS` is a file of its backbone."""
    path = Path(cfg.MODEL.WEIGHTS)
    if cfg.MODEL.META_ARCHITECTURE == "YOLOv3" and path.is_file() and is_darknet_file(path):
        cfg.MODEL.TIMM.NORM_EPS = cfg.MODEL.YOLOV3.NORM_EPS = NORM_EPS
        cfg.MODEL.TIMM.NEGATIVE_SLOPE = NEGATIVE_SLOPE
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [255.0] * 3
        logger.info("%s is Darknet's: computing as it does, on images from 0 to 1", path)


def unfreeze_backbone(cfg: CfgNode, given: Sequence[str]) -> None:
    """Has the whole backbone trained, in place, BatchNorm and all, as one from random weights must be.

    Args:
        cfg: the configuration.
        given: keys that the user has set, which stay.
    """
    is_norm_frozen = "resnet" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    for key, value, is_frozen in (
        ("MODEL.BACKBONE.FREEZE_AT", 0, cfg.MODEL.BACKBONE.FREEZE_AT > 0),
        ("MODEL.RESNETS.NORM", "BN", is_norm_frozen),
    ):
        if is_frozen and key not in given:
            cfg.merge_from_list([key, value])
            logger.info("%s is %s: what is random and frozen would stay random", key, value)


def use_backbone(cfg: CfgNode, name: str) -> None:
    """Puts a timm network below a detector: its ImageNet weights, unless it is to be random, and its normalisation.

    Raises:
        UserError: timm does not know it.
    """
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = normalisation_of(name)
    if cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = f"timm://{name}"
    if cfg.MODEL.META_ARCHITECTURE == "YOLOv3":
        cfg.MODEL.BACKBONE.NAME = "Darknet"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
