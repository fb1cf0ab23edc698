"""Faster R-CNN R50-FPN beside stock Detectron2 and torchvision: the same network three times."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.transforms.v2.functional import resize

from common.images import read_image
from detection.checkpoint import convert_resnet, load_weights
from detection.config import CONFIGS, get_cfg, merge_file
from detection.experiment import newest_detector
from detection.modeling import build_model, load_detector
from detection.trainer import Evaluator
from detection.voc import default_test, default_train, register_voc
from tools.bench.timing import ROUNDS, Contender, at_precision, compare, on_devices, our_precision, rival_precisions


class Detector:
    """A detector, its optimizer, and what turns Detectron2's inputs into its own, where these differ."""

    def __init__(
        self,
        name: str,
        precision: str,
        model: nn.Module,
        inputs: Callable[[Sequence[dict]], tuple] = lambda batch: (batch,),
    ) -> None:
        self.name, self.precision, self.model, self.inputs = name, precision, model, inputs
        # The rate is so low that the network, and so the work, stays the same.
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-7, momentum=0.9)

    def detect(self, batch: Sequence[dict]) -> None:
        """Detects on a batch."""
        self.model.eval()
        with torch.inference_mode():
            self.model(*self.inputs(batch))

    def step(self, batch: Sequence[dict]) -> None:
        """Takes one training step on a batch."""
        self.model.train()
        with EventStorage():
            losses = self.model(*self.inputs(batch))
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()


def speed(root: Path, size: tuple[int, int] = (600, 800), rounds: int = ROUNDS) -> pd.DataFrame:
    """Times inference and a training step, on the CPU and on a GPU where there is one.

    Args:
        root: data root; its first training images are resized and taken.
        size: height and width of the images.
        rounds: timed ones, after one of warm-up.
    """
    samples = read_samples(root, 4, size)
    return pd.DataFrame(on_devices(lambda device: _speed_on(device, samples, rounds)))


def _speed_on(device: str, samples: Sequence[dict], rounds: int) -> list[dict]:
    detectors = build_detectors(samples, device)
    height, width = samples[0]["image"].shape[1:]
    table = []
    for what, count, task in (("inference", 1, Detector.detect), ("training step", 2, Detector.step)):
        contenders = [Contender(each.name, partial(task, each, samples[:count]), each.precision) for each in detectors]
        table += compare(f"{what}, {count} x {height} x {width}, {device}", contenders, rounds, count)
    return table


def accuracy(root: Path) -> pd.DataFrame:
    """Average precision of the same weights in our network and in stock Detectron2's, in percent.

    Args:
        root: data root whose test split is taken; the weights are those of the newest run in `output/`.
    """
    weights = newest_detector(Path("output"), "faster_rcnn")
    if weights is None:
        return pd.DataFrame([{"what": "not measured: no trained weights in output/; see `make train-frcnn`"}])
    cfg, ours = load_detector(weights)
    stock = GeneralizedRCNN(cfg).to(cfg.MODEL.DEVICE).eval()
    load_weights(stock, weights)
    register_voc(root)
    cfg.DATASETS.TEST = default_test(root)
    evaluator = Evaluator(cfg)
    points = pd.DataFrame(
        {name: evaluator.evaluate(model) for name, model in (("ours", ours), ("stock Detectron2", stock))}
    )
    points *= 100
    points["difference"] = points["ours"] - points["stock Detectron2"]
    return points.rename_axis("what").reset_index()


def read_samples(root: Path, count: int, size: tuple[int, int]) -> list[dict]:
    """The first training images of a data root that show an object, resized, as Detectron2's models take them.

    Returns:
        Dicts of `image` (uint8, (3, H, W), RGB), `height`, `width`, and `instances` with `gt_boxes` and `gt_classes`.
    """
    register_voc(root)
    records = (record for record in DatasetCatalog.get(default_train(root)[0]) if record["annotations"])
    height, width = size
    samples = []
    for record, _ in zip(records, range(count), strict=False):
        scale = torch.tensor([width / record["width"], height / record["height"]] * 2)
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.tensor([box["bbox"] for box in record["annotations"]]) * scale)
        instances.gt_classes = torch.tensor([box["category_id"] for box in record["annotations"]])
        image = resize(read_image(record["file_name"]), list(size))
        samples.append({"image": image, "height": height, "width": width, "instances": instances})
    return samples


def build_detectors(samples: Sequence[dict], device: str) -> list[Detector]:
    """Ours, then stock Detectron2's and torchvision's Faster R-CNN R50-FPN for VOC's classes, as they come and as ours.

    All have the same random ResNet, its first two stages frozen, and ours and Detectron2's the same random weights
    altogether. Each image keeps its size.
    """
    cfg, resnet, ours = build_ours(samples, device)
    stock = GeneralizedRCNN(cfg).to(device)
    stock.load_state_dict(ours.state_dict())

    height, width = samples[0]["image"].shape[1:]
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    backbone.body.load_state_dict({name: value for name, value in resnet.items() if not name.startswith("fc.")})
    rival = FasterRCNN(backbone, num_classes=21, min_size=min(height, width), max_size=max(height, width)).to(device)
    detectors = [Detector("ours", our_precision(device), ours)]
    for precision in rival_precisions(device):
        model = at_precision(stock, precision, device)
        detectors.append(Detector("stock Detectron2", precision, model))
        model, inputs = at_precision(rival, precision, device), partial(_torchvision_inputs, device=device)
        detectors.append(Detector("torchvision", precision, model, inputs))
    return detectors


def build_ours(samples: Sequence[dict], device: str) -> tuple[CfgNode, dict[str, Tensor], nn.Module]:
    """The configuration, the tensors of a random ResNet calibrated on samples, and our detector with them."""
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / "faster_rcnn_R_50_FPN.yaml")
    cfg.MODEL.DEVICE = device
    resnet = random_resnet([sample["image"] for sample in samples], cfg)
    model = build_model(cfg)
    model.load_state_dict(convert_resnet(resnet), strict=False)
    return cfg, resnet, model


def random_resnet(images: Sequence[Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Tensors of a random ResNet-50 whose BatchNorm statistics are those of the images (each uint8, (3, H, W))."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    calibrate(resnet, torch.stack([(image - mean) / std for image in images]))
    return resnet.state_dict()


@torch.no_grad()
def calibrate(network: nn.Module, inputs: object) -> None:
    """Gives each BatchNorm the statistics of the inputs: with those of its start activations fade or explode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches, not a moving one
    network.train()(inputs)


def _torchvision_inputs(batch: Sequence[dict], device: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [sample["image"].to(device) / 255 for sample in batch]
    instances = [sample["instances"].to(device) for sample in batch]
    targets = [{"boxes": each.gt_boxes.tensor, "labels": each.gt_classes + 1} for each in instances]
    return images, targets
