"""YOLOv3 Darknet-53 beside OpenCV, which runs the same network from Darknet's files, and ultralytics' own version."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import pandas as pd
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from common.weights import save_checkpoint
from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model, load_detector
from detection.yolov3.anchors import YOLOAnchorGenerator, YOLOBox2BoxTransform
from detection.yolov3.darknet_weights import NEGATIVE_SLOPE, NORM_EPS, write_darknet_weights
from detection.yolov3.head import YOLOv3Level
from detection.yolov3.targets import Grid, assign_targets, match_anchors
from tools.bench.faster_rcnn import calibrate, read_samples
from tools.bench.rivals import MISSING, has_ultralytics
from tools.bench.timing import ROUNDS, Contender, at_precision, compare, on_devices, our_precision, rival_precisions

SCORE_THRESH, NMS_THRESH = 0.25, 0.45
# Images that are detected on at once, and images of a training step.
BATCHES = {"cpu": (1, 4), "cuda": (64, 64)}


@dataclass(frozen=True)
class Detector:
    """What a library does with a batch of Detectron2's inputs; OpenCV does not train."""

    name: str
    precision: str
    detect: Callable[[Sequence[dict]], object]
    step: Callable[[Sequence[dict]], object] | None = None
    threads: int | None = None


def speed(root: Path, size: int = 416, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times inference and a training step, on the CPU and on a GPU where there is one.

    Inference is the whole way from pixels to boxes, non-maximum suppression included, at the same thresholds for all.

    Args:
        root: data root; its first training images are resized and taken.
        size: height and width of the images, a multiple of 32.
        rounds: timed ones, after one of warm-up.
    """
    return pd.DataFrame(on_devices(lambda device: _speed_on(device, root, size, rounds)))


def _speed_on(device: str, root: Path, size: int, rounds: int) -> list[dict]:
    samples = read_samples(root, max(BATCHES[device]), (size, size))
    table = []
    with tempfile.TemporaryDirectory() as folder:
        detectors = build_detectors(samples, device, Path(folder))
        for what, name, count in zip(("inference", "training step"), ("detect", "step"), BATCHES[device], strict=True):
            batch = samples[:count]
            what = f"{what}, {len(batch)} x {size} x {size}, {device}"
            contenders = [
                Contender(each.name, partial(task, batch), each.precision, each.threads)
                for each in detectors
                if (task := getattr(each, name))
            ]
            table += compare(what, contenders, rounds, len(batch))
            if not has_ultralytics():
                table.append({"what": what, "by": f"not measured: {MISSING}"})
    return table


def targets(root: Path, images: int = 64, objects: int = 20, rounds: int = 9) -> pd.DataFrame:
    """Times assigning targets to random predictions at 416 x 416, beside a loop over images and objects.

    Args:
        root: not used.
        images: images in the batch.
        objects: objects in each.
        rounds: timed ones, after one of warm-up.
    """
    scenes = random_scenes(images, objects)
    contenders = [
        Contender("ours", partial(assign_targets, *scenes), "float32"),
        Contender("a loop over objects", partial(assign_in_a_loop, *scenes), "float32"),
    ]
    return pd.DataFrame(compare(f"assigning targets, {images} images of {objects} objects", contenders, rounds))


def build_detectors(samples: Sequence[dict], device: str, folder: Path) -> list[Detector]:
    """Ours; OpenCV with our weights, on the CPU; and ultralytics, where it is there, as it comes and as ours.

    All weights are random, and the statistics of all BatchNorms those of the samples.

    Args:
        samples: as `read_samples` gives them, of one square size.
        device: "cpu" or "cuda".
        folder: where files are written.
    """
    cfg, network = build_network(samples, device)
    detectors = [ours(cfg, network, folder)]
    if device == "cpu":
        detector = opencv_detector(cfg, network, samples[0]["image"].shape[1], folder)
        detectors.append(Detector("OpenCV", "float32", detector, threads=cv2.getNumThreads()))
    if has_ultralytics():
        for precision in rival_precisions(device):
            detectors.append(ultralytics(samples, device, cfg.MODEL.YOLOV3.NUM_CLASSES, precision))
    return detectors


def build_network(samples: Sequence[dict], device: str) -> tuple[CfgNode, nn.Module]:
    """Our random network, calibrated on samples, with enough detections to suppress, and its configuration."""
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / "Base-YOLOv3.yaml")
    cfg.MODEL.DEVICE = device
    cfg.MODEL.TIMM.NORM_EPS = cfg.MODEL.YOLOV3.NORM_EPS = NORM_EPS
    cfg.MODEL.TIMM.NEGATIVE_SLOPE = NEGATIVE_SLOPE
    cfg.MODEL.YOLOV3.SCORE_THRESH_TEST, cfg.MODEL.YOLOV3.NMS_THRESH_TEST = SCORE_THRESH, NMS_THRESH
    torch.manual_seed(0)
    network = build_model(cfg)
    for module in network.modules():
        if isinstance(module, YOLOv3Level):
            nn.init.normal_(module.prediction.weight, std=0.1)
    calibrate(network, samples[:4])
    return cfg, network


def ours(cfg: CfgNode, network: nn.Module, folder: Path) -> Detector:
    """Our network, which is loaded for detection as that of any run is."""
    (folder / "config.yaml").write_text(cfg.dump())
    save_checkpoint(folder / "model_best.pth", {"model": network.state_dict()})
    _, detector = load_detector(folder / "model_best.pth")
    optimizer = _sgd(network)

    def step(batch: Sequence[dict]) -> None:
        loss = sum(network.train()(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Detector("ours", our_precision(cfg.MODEL.DEVICE), torch.inference_mode()(detector), step)


def opencv_detector(cfg: CfgNode, network: nn.Module, size: int, folder: Path) -> Callable[[Sequence[dict]], list]:
    """The network in OpenCV, read from the files in which Darknet would have left it."""
    (folder / "yolov3.cfg").write_text(darknet_cfg(cfg, size))
    write_darknet_weights(folder / "yolov3.weights", network)
    net = cv2.dnn.readNetFromDarknet(str(folder / "yolov3.cfg"), str(folder / "yolov3.weights"))
    model = cv2.dnn.DetectionModel(net)
    model.setInputParams(scale=1 / 255, size=(size, size))

    def detect(batch: Sequence[dict]) -> list[tuple]:
        images = [sample["image"].permute(1, 2, 0).contiguous().numpy() for sample in batch]
        return [model.detect(image, SCORE_THRESH, NMS_THRESH) for image in images]

    return detect


def darknet_cfg(cfg: CfgNode, size: int) -> str:
    """Darknet's description of YOLOv3 with Darknet-53, for a square input (Redmon and Farhadi, 2018, table 1)."""
    classes = cfg.MODEL.YOLOV3.NUM_CLASSES
    anchors = ", ".join(f"{w},{h}" for level in cfg.MODEL.YOLOV3.ANCHORS for w, h in level)
    text = _section("net", width=size, height=size, channels=3) + _unit(32, 3)
    for dim, blocks in zip((32, 64, 128, 256, 512), (1, 2, 8, 8, 4), strict=True):
        text += _unit(2 * dim, 3, stride=2)
        text += (
            _unit(dim, 1) + _unit(2 * dim, 3) + _section("shortcut", **{"from": -3, "activation": "linear"})
        ) * blocks
    for dim, mask, skip in ((512, "6,7,8", 61), (256, "3,4,5", 36), (128, "0,1,2", None)):
        text += (_unit(dim, 1) + _unit(2 * dim, 3)) * 3
        text += _section("convolutional", filters=3 * (5 + classes), size=1, stride=1, pad=1, activation="linear")
        text += _section("yolo", mask=mask, anchors=anchors, classes=classes, num=9)
        if skip:
            text += _section("route", layers=-4) + _unit(dim // 2, 1) + _section("upsample", stride=2)
            text += _section("route", layers=f"-1,{skip}")
    return text


def _unit(filters: int, size: int, stride: int = 1) -> str:
    return _section(
        "convolutional", batch_normalize=1, filters=filters, size=size, stride=stride, pad=1, activation="leaky"
    )


def _section(name: str, **values: object) -> str:
    return "\n".join([f"[{name}]", *(f"{key}={value}" for key, value in values.items())]) + "\n\n"


def ultralytics(samples: Sequence[dict], device: str, num_classes: int, precision: str) -> Detector:
    """Ultralytics' `yolov3.yaml`, with the loss that it trains with; for detection fused, as its predictor fuses it."""
    threads = cv2.getNumThreads()
    from ultralytics import __version__
    from ultralytics.cfg import get_cfg as get_ultralytics_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.nms import non_max_suppression

    cv2.setNumThreads(threads)  # ultralytics turns them off, for everybody
    network = DetectionModel("yolov3.yaml", nc=num_classes, verbose=False).to(device)
    network.args = get_ultralytics_cfg()
    calibrate(network, _stacked(samples[:4], device))
    detector = DetectionModel("yolov3.yaml", nc=num_classes, verbose=False).to(device)
    detector.load_state_dict(network.state_dict())
    detector = at_precision(detector.eval().fuse(verbose=False), precision, device)
    network = at_precision(network, precision, device)
    optimizer = _sgd(network)

    @torch.inference_mode()
    def detect(batch: Sequence[dict]) -> list[Tensor]:
        return non_max_suppression(detector(_stacked(batch, device))[0], SCORE_THRESH, NMS_THRESH)

    def step(batch: Sequence[dict]) -> None:
        instances = [sample["instances"].to(device) for sample in batch]
        boxes = Boxes.cat([each.gt_boxes for each in instances])
        height, width = batch[0]["image"].shape[1:]
        sizes = boxes.tensor[:, 2:] - boxes.tensor[:, :2]
        labels = {
            "img": _stacked(batch, device),
            "cls": torch.cat([each.gt_classes for each in instances])[:, None].float(),
            "bboxes": torch.cat([boxes.get_centers(), sizes], dim=1) / boxes.tensor.new_tensor([width, height] * 2),
            "batch_idx": torch.cat([torch.full((len(each),), i, device=device) for i, each in enumerate(instances)]),
        }
        loss, _ = network.train()(labels)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()

    return Detector(f"ultralytics {__version__}", precision, detect, step)


def _sgd(network: nn.Module) -> torch.optim.Optimizer:
    """The rate is so low that the network, and so the work, stays the same."""
    return torch.optim.SGD(network.parameters(), lr=1e-7, momentum=0.9, nesterov=True)


def _stacked(batch: Sequence[dict], device: str) -> Tensor:
    return torch.stack([sample["image"].to(device) for sample in batch]) / 255


Scenes = tuple[Tensor, Grid, YOLOBox2BoxTransform, list[Instances], float]


def random_scenes(images: int, objects: int, size: int = 416) -> Scenes:
    """Arguments of `assign_targets`: random predictions and random objects for images of a square size."""
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / "Base-YOLOv3.yaml")
    strides = [8, 16, 32]
    generator = YOLOAnchorGenerator(sizes=cfg.MODEL.YOLOV3.ANCHORS, strides=strides)
    grid = Grid.of(generator, [torch.empty(1, 1, size // stride, size // stride) for stride in strides])
    torch.manual_seed(0)
    predictions = torch.randn(images, len(grid.anchors), 5 + cfg.MODEL.YOLOV3.NUM_CLASSES)
    corners = torch.rand(images, objects, 2, 2).sort(dim=2).values.flatten(2) * size
    instances = [
        Instances((size, size), gt_boxes=Boxes(boxes), gt_classes=torch.arange(objects) % cfg.MODEL.YOLOV3.NUM_CLASSES)
        for boxes in corners
    ]
    return predictions[..., :4], grid, YOLOBox2BoxTransform(), instances, cfg.MODEL.YOLOV3.IGNORE_THRESH


def assign_in_a_loop(
    deltas: Tensor, grid: Grid, transform: YOLOBox2BoxTransform, gt_instances: list[Instances], ignore_thresh: float
) -> tuple[dict[tuple[int, int], int], Tensor]:
    """What `assign_targets` does, one object after the other, each against all predictions of its image.

    Returns:
        By image and prediction, the class of the object assigned to it, and the mask (N, R) of predictions to ignore.
    """
    classes: dict[tuple[int, int], int] = {}
    ignored = torch.zeros(deltas.shape[:2], dtype=torch.bool)
    for image, instances in enumerate(gt_instances):
        predicted = Boxes(transform.decode(deltas[image], grid.anchors, grid.anchor_strides))
        for index, label in enumerate(instances.gt_classes.tolist()):
            box = instances.gt_boxes[index]
            ignored[image] |= pairwise_iou(predicted, box)[:, 0] > ignore_thresh
            classes[image, int(match_anchors(box.tensor, grid))] = label
    return classes, ignored
