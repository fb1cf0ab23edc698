"""New run folders of the three networks, as a training leaves them, with random weights."""

from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import nn

from classification.model import build_model, describe
from common.weights import save_checkpoint
from tools.bench import faster_rcnn, yolov3

SIDE = 224  # of the images that ResNet-18 sees
CLASSES = [str(number) for number in range(20)]  # of the detectors


def save_resnet18(root: Path, folder: Path) -> None:
    """ResNet-18 of 200 classes at 224 pixels; the data is not looked at."""
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model("resnet18", 200)
    card = describe("resnet18", model, [str(number) for number in range(200)], SIDE, 0.875)
    save_checkpoint(folder / "model_best.pth", {**card, "model": model.state_dict()})


def save_yolov3(root: Path, folder: Path) -> None:
    """YOLOv3 Darknet-53 at 416 pixels, calibrated on the first training images of a data root."""
    samples = faster_rcnn.read_samples(root, 4, (416, 416))
    cfg, network = yolov3.build_network(samples, "cpu")
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 416
    _save_detector(folder, root, cfg, network)


def save_faster_rcnn(root: Path, folder: Path) -> None:
    """Faster R-CNN R50-FPN at 640 pixels, as in its recipe, calibrated on the first training images of a data root."""
    samples = faster_rcnn.read_samples(root, 4, (600, 800))
    cfg, _, network = faster_rcnn.build_ours(samples, "cpu")
    _save_detector(folder, root, cfg, network)


def _save_detector(folder: Path, root: Path, cfg: CfgNode, network: nn.Module) -> None:
    folder.mkdir()
    cfg.DATASETS.ROOT = str(root)
    cfg.MODEL.CLASSES = CLASSES
    (folder / "config.yaml").write_text(cfg.dump())
    save_checkpoint(folder / "model_best.pth", {"model": network.state_dict()})
