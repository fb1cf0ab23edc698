"""The three networks in PyTorch, as `make predict` runs them, beside what `make export` makes of them."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from classification.export import exportable_classifier
from common.errors import UserError
from common.export import Exportable, write_exported
from common.exported import ExportedModel, import_runtime
from common.runtime import default_device
from detection.export import exportable_detector
from detection.predict import Detector
from tools.bench import faster_rcnn
from tools.bench.runs import SIDE, save_faster_rcnn, save_resnet18, save_yolov3
from tools.bench.timing import ROUNDS, Contender, compare, our_precision
from tools.predict import load_model

CALIBRATION_IMAGES = 8  # the ranges of int8 do not change the time
FORMS = [("OpenVINO", "float32"), ("OpenVINO", "bfloat16"), ("OpenVINO", "int8"), ("ONNX Runtime", "float32")]


def speed(root: Path, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times one image, from the pixels that a network takes to its findings; weights are random.

    Args:
        root: data root; its first training images are taken, and a few calibrate int8.
        rounds: timed ones, after one of warm-up.
    """
    try:
        for name in ("openvino", "onnx", "onnxruntime", "nncf"):
            import_runtime(name)
    except UserError as error:
        return pd.DataFrame([{"what": f"not measured: {error}"}])
    networks: dict[str, tuple[Callable[[Path, Path], None], tuple[int, int]]] = {
        "ResNet-18": (save_resnet18, (SIDE, SIDE)),
        "YOLOv3 Darknet-53": (save_yolov3, (416, 416)),
        "Faster R-CNN R50-FPN": (save_faster_rcnn, (600, 800)),
    }
    rows: list[dict] = []
    for what, (save, size) in networks.items():
        with tempfile.TemporaryDirectory() as folder:
            run_folder = Path(folder) / "run"
            save(root, run_folder)
            ours, exportable, image = _built(run_folder, faster_rcnn.read_samples(root, 1, size)[0]["image"])
            few = exportable.training_images(str(root))[:CALIBRATION_IMAGES]
            exportable = replace(exportable, training_images=partial(_same, few))
            contenders = [ours]
            for runtime, precision in FORMS:
                form = "onnx" if runtime == "ONNX Runtime" else "openvino"
                path = write_exported(exportable, form, precision, str(root), Path(folder) / f"{form}-{precision}")
                run = torch.inference_mode()(partial(ExportedModel(path), image))
                contenders.append(Contender(runtime, run, precision))
            rows += compare(f"{what}, {size[0]} x {size[1]}", contenders, rounds, images=1)
    return pd.DataFrame(rows)


def _built(folder: Path, image: Tensor) -> tuple[Contender, Exportable, Tensor]:
    """The network of a run as PyTorch runs it, the same ready to be exported, and the exported model's input."""
    model, device = load_model(str(folder)), default_device()
    if isinstance(model, Detector):
        run = torch.inference_mode()(partial(model.model, [{"image": image}]))
        return (
            Contender("PyTorch", run, our_precision(device)),
            exportable_detector(str(folder)),
            image.float(),
        )
    normal = torch.randn(1, *image.shape).to(memory_format=torch.channels_last)
    run = torch.inference_mode()(partial(model.model, normal.to(device)))
    return Contender("PyTorch", run, "float32"), exportable_classifier(folder), normal


def _same(images: Sequence[Any], data: str | None) -> Sequence[Any]:
    """These images, whatever the data."""
    return images
