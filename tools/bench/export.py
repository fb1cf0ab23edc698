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
from common.runtime import resolve_precision
from common.weights import save_checkpoint
from detection.checkpoint import convert_resnet
from detection.config import CONFIGS, get_cfg, merge_file
from detection.export import exportable_detector
from detection.modeling import build_model, load_detector
from tools.bench.faster_rcnn import random_resnet, read_samples
from tools.bench.timing import in_turn
from tools.bench.yolov3 import calibrate

CALIBRATION_IMAGES = 8  # the ranges of int8 do not change the time
FORMS = [("OpenVINO", "float32"), ("OpenVINO", "bfloat16"), ("OpenVINO", "int8"), ("ONNX Runtime", "float32")]


def speed(root: Path, repetitions: int = 5) -> pd.DataFrame:
    """Milliseconds of one image, from the pixels that the network takes to its findings; random weights.

    Args:
        root: data root; its first training images are taken, and calibrate int8.
        repetitions: rounds that count.
    """
    try:
        for name in ("openvino", "onnx", "onnxruntime", "nncf"):
            import_runtime(name)
    except UserError as error:
        return pd.DataFrame([{"network": f"not measured: {error}"}])
    rows: list[dict] = []
    for network, build in (
        ("ResNet-18, 224 x 224", _resnet18),
        ("YOLOv3 Darknet-53, 416 x 416", partial(_detector, "yolov3_darknet53", (416, 416))),
        ("Faster R-CNN R50-FPN, 600 x 800", partial(_detector, "faster_rcnn_R_50_FPN", (600, 800))),
    ):
        with tempfile.TemporaryDirectory() as folder:
            precision, ours, model, image = build(root, Path(folder))
            few = model.training_images(str(root))[:CALIBRATION_IMAGES]
            model = replace(model, training_images=partial(_same, few))
            runs: dict[tuple[str, str], Callable[[], object]] = {("PyTorch", precision): ours}
            for runtime, exported in FORMS:
                form = "onnx" if runtime == "ONNX Runtime" else "openvino"
                path = write_exported(model, form, exported, str(root), Path(folder) / f"{form}-{exported}")
                runs[runtime, exported] = partial(ExportedModel(path), image)
            names = {" ".join(key): key for key in runs}
            seconds = in_turn({name: torch.inference_mode()(runs[key]) for name, key in names.items()}, repetitions)
        for name, (runtime, exported) in names.items():
            milliseconds = 1000 * seconds[name]
            rows.append({"network": network, "runtime": runtime, "precision": exported, "ms": milliseconds})
    return pd.DataFrame(rows)


def _same(images: Sequence[Any], data: str | None) -> Sequence[Any]:
    """These images, whatever the data."""
    return images


Built = tuple[str, Callable[[], object], Exportable, Tensor]


def _resnet18(root: Path, folder: Path) -> Built:
    """The classifier as `make predict` runs it, in float32."""
    torch.manual_seed(0)
    model = classification.build_model("resnet18", 200)
    card = classification.describe("resnet18", model, [str(number) for number in range(200)], 224, 0.875)
    save_checkpoint(folder / "model_best.pth", {**card, "model": model.state_dict()})
    image = torch.randn(1, 3, 224, 224).to(memory_format=torch.channels_last)
    loaded, _ = classification.load_classifier(folder / "model_best.pth")
    return "float32", partial(loaded, image), exportable_classifier(folder), image


def _detector(config: str, size: tuple[int, int], root: Path, folder: Path) -> Built:
    """A detector in the precision that is fastest here, its BatchNorm calibrated so that there are findings."""
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"{config}.yaml")
    cfg.MODEL.DEVICE, cfg.DATASETS.ROOT = "cpu", str(root)
    cfg.MODEL.CLASSES = [str(number) for number in range(20)]
    samples = read_samples(root, 4, size)
    model = _calibrated(cfg, samples)
    (folder / "config.yaml").write_text(cfg.dump())
    save_checkpoint(folder / "model_best.pth", {"model": model.state_dict()})
    _, loaded = load_detector(folder)
    precision = str(resolve_precision(cfg.MODEL.PRECISION, torch.device("cpu"))).removeprefix("torch.")
    image = samples[0]["image"]
    return precision, partial(loaded, [{"image": image}]), exportable_detector(str(folder)), image.float()


def _calibrated(cfg: CfgNode, samples: list[dict]) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "YOLOv3":
        calibrate(model, samples)
    else:
        resnet = random_resnet([sample["image"] for sample in samples], cfg)
        model.load_state_dict(convert_resnet(resnet), strict=False)
    return model
