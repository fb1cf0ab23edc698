"""The three networks in PyTorch, as `make predict` runs them, beside what `make export` makes of them."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from classification import model as classification
from classification.export import exportable_classifier
from common.errors import UserError
from common.export import Exportable, write_exported
from common.exported import ExportedModel, import_runtime
from common.weights import save_checkpoint
from detection.export import exportable_detector
from detection.modeling import load_detector
from tools.bench import faster_rcnn, yolov3
from tools.bench.timing import ROUNDS, Contender, compare, our_precision

CALIBRATION_IMAGES = 8  # the ranges of int8 do not change the time
FORMS = [("OpenVINO", "float32"), ("OpenVINO", "bfloat16"), ("OpenVINO", "int8"), ("ONNX Runtime", "float32")]

# What PyTorch runs, and the same network to be exported with the input that it then takes.
Built = tuple[Contender, Exportable, Tensor]


def speed(root: Path, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times one image, from the pixels that a network takes to its findings; weights are random.

    Args:
        root: data root; its first training images are taken, and a few calibrate int8.
        rounds: that count.
    """
    try:
        for name in ("openvino", "onnx", "onnxruntime", "nncf"):
            import_runtime(name)
    except UserError as error:
        return pd.DataFrame([{"what": f"not measured: {error}"}])
    networks: dict[str, Callable[[Path, Path], Built]] = {
        "ResNet-18, 224 x 224": _resnet18,
        "YOLOv3 Darknet-53, 416 x 416": _yolov3,
        "Faster R-CNN R50-FPN, 600 x 800": _faster_rcnn,
    }
    rows: list[dict] = []
    for what, build in networks.items():
        with tempfile.TemporaryDirectory() as folder:
            ours, exportable, image = build(root, Path(folder))
            few = exportable.training_images(str(root))[:CALIBRATION_IMAGES]
            exportable = replace(exportable, training_images=partial(_same, few))
            contenders = [ours]
            for runtime, precision in FORMS:
                form = "onnx" if runtime == "ONNX Runtime" else "openvino"
                path = write_exported(exportable, form, precision, str(root), Path(folder) / f"{form}-{precision}")
                run = torch.inference_mode()(partial(ExportedModel(path), image))
                contenders.append(Contender(runtime, run, precision))
            rows += compare(what, contenders, rounds, images=1)
    return pd.DataFrame(rows)


def _same(images: Sequence[Any], data: str | None) -> Sequence[Any]:
    """These images, whatever the data."""
    return images


def _resnet18(root: Path, folder: Path) -> Built:
    """The classifier as `make predict-bird` runs it, in float32."""
    torch.manual_seed(0)
    model = classification.build_model("resnet18", 200)
    card = classification.describe("resnet18", model, [str(number) for number in range(200)], 224, 0.875)
    save_checkpoint(folder / "model_best.pth", {**card, "model": model.state_dict()})
    image = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    loaded, _ = classification.load_classifier(folder / "model_best.pth")
    ours = Contender("PyTorch", torch.inference_mode()(partial(loaded, image)), "float32")
    return ours, exportable_classifier(folder), image


def _yolov3(root: Path, folder: Path) -> Built:
    samples = faster_rcnn.read_samples(root, 4, (416, 416))
    return _detector(samples, root, folder, *yolov3.build_network(samples, "cpu"))


def _faster_rcnn(root: Path, folder: Path) -> Built:
    samples = faster_rcnn.read_samples(root, 4, (600, 800))
    cfg, _, network = faster_rcnn.build_ours(samples, "cpu")
    return _detector(samples, root, folder, cfg, network)


def _detector(samples: Sequence[dict], root: Path, folder: Path, cfg: CfgNode, network: nn.Module) -> Built:
    """A detector as `make predict` runs it, in the precision that is fastest here."""
    cfg.DATASETS.ROOT = str(root)
    cfg.MODEL.CLASSES = [str(number) for number in range(20)]
    (folder / "config.yaml").write_text(cfg.dump())
    save_checkpoint(folder / "model_best.pth", {"model": network.state_dict()})
    _, loaded = load_detector(folder)
    image = samples[0]["image"]
    ours = Contender("PyTorch", torch.inference_mode()(partial(loaded, [{"image": image}])), our_precision("cpu"))
    return ours, exportable_detector(str(folder)), image.float()
