"""Writes a PyTorch model to a file of another runtime: see `common.exported`."""

import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError, last_line
from common.exported import SECTION, SUFFIXES, import_runtime
from common.results import reserve_results

PRECISIONS = ("float32", "bfloat16", "int8")
OPSET = 16  # the first with a ROIAlign that counts pixels from their corners
CALIBRATION_IMAGES, CALIBRATION_SEED = 300, 0


@dataclass(frozen=True)
class Exportable:
    """A model on its way to a file.

    Attributes:
        network: maps one tensor to one or several: all that the file computes.
        example: an input.
        free: axes of the input that may have any length, with their names.
        outputs: names of the outputs.
        card: what the file is to say of the model.
        training_images: gives the training images of a data root; None is the root that the model was trained on.
        prepare: turns one of these images into an input.
        quantised: names of the modules that may be quantised to int8; empty: all.
        kept: names of modules inside these that stay in floating point: the prediction layers.
    """

    network: nn.Module
    example: Tensor
    free: Mapping[int, str]
    outputs: Sequence[str]
    card: dict[str, Any]
    training_images: Callable[[str | None], Sequence[Any]]
    prepare: Callable[[Any], Tensor]
    quantised: Sequence[str] = ()
    kept: Sequence[str] = ()


def write_exported(model: Exportable, form: str, precision: str, data: str | None, folder: Path) -> Path:
    """Writes `model.xml` and `model.bin`, or `model.onnx`; the file appears when it is whole.

    Args:
        model: what is exported.
        form: "openvino" or "onnx".
        precision: one of `PRECISIONS`.
        data: root of the training images that int8 is calibrated on; None: that of the model.
        folder: of the file, made where it is missing.

    Returns:
        The file.

    Raises:
        UserError: a package is not installed, a file is there that is none of ours, or the runtime lacks the precision.
    """
    if form == "onnx" and precision == "bfloat16":
        raise UserError(
            "PRECISION=bfloat16: ONNX Runtime computes none on a CPU; expected float32 or int8, or FORMAT=openvino"
        )
    suffix = SUFFIXES[form]
    files = ["model.bin", "model.xml"] if form == "openvino" else ["model.onnx"]
    reserve_results(folder, files, [])
    card = {**model.card, "precision": precision}
    metadata = {name: json.dumps(value) for name, value in card.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as aside, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, about every size that the network looks at
        unfinished = Path(aside) / f"model{suffix}"
        write = _write_openvino if form == "openvino" else _write_onnx
        calibration = _calibration(model, data) if precision == "int8" else ()
        try:
            with torch.no_grad():
                write(model, metadata, calibration, unfinished)
        except UserError:
            raise
        except Exception as error:  # each converter has kinds of its own for what it cannot express
            raise UserError(
                f"{folder}: the model cannot be written for {form} ({last_line(error)}); give another SIZE or FORMAT"
            ) from error
        for name in files:
            (Path(aside) / name).replace(folder / name)
    return folder / f"model{suffix}"


def _calibration(model: Exportable, data: str | None) -> list[Any]:
    """Training images drawn with a fixed seed, or all where there are few."""
    images = model.training_images(data)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(CALIBRATION_SEED))
    return [images[index] for index in chosen[:CALIBRATION_IMAGES]]


def _write_openvino(model: Exportable, metadata: dict[str, str], calibration: Sequence[Any], path: Path) -> None:
    openvino = import_runtime("openvino")
    shape = [-1 if axis in model.free else length for axis, length in enumerate(model.example.shape)]
    converted = openvino.convert_model(model.network, example_input=model.example, input=[shape])
    for output, name in zip(converted.outputs, model.outputs, strict=True):
        output.get_tensor().set_names({name})
    if calibration:
        # Read from a file, its operations have the names that NNCF expects.
        unquantised = path.with_name("unquantised.xml")
        openvino.save_model(converted, unquantised, compress_to_fp16=False)
        converted = openvino.Core().read_model(unquantised)
        converted = _quantised(converted, calibration, model, lambda image: image.numpy())
    for name, value in metadata.items():
        converted.set_rt_info(value, [SECTION, name])
    openvino.save_model(converted, path, compress_to_fp16=False)


def _write_onnx(model: Exportable, metadata: dict[str, str], calibration: Sequence[Any], path: Path) -> None:
    onnx = import_runtime("onnx")
    torch.onnx.export(
        model.network,
        (model.example,),
        path,
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=list(model.outputs),
        dynamic_axes={"image": dict(model.free), **{name: {0: "found"} for name in model.outputs}},
    )
    if calibration:
        # NNCF trips over casts that change nothing, which ONNX Runtime takes away.
        onnxruntime = import_runtime("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    converted = onnx.load(path)
    if calibration:
        converted = _quantised(converted, calibration, model, lambda image: {"image": image.numpy()})
    onnx.helper.set_model_props(converted, metadata)
    onnx.save(converted, path)


def _quantised(converted: Any, calibration: Sequence[Any], model: Exportable, feed: Callable[[Tensor], Any]) -> Any:
    """The converted model with layers in int8, their ranges those of the calibration images."""
    nncf = import_runtime("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    within, without = ("|".join(map(re.escape, names)) for names in (model.quantised, model.kept))
    # A convolution that OpenVINO has fused with its normalisation has lost its name, and the "/" in it.
    kept = [rf".*[./]({without})[./]", *([rf"(?!.*[./]({within})[./]).*/"] if within else [])]
    return nncf.quantize(
        converted,
        nncf.Dataset(calibration, lambda image: feed(model.prepare(image))),
        subset_size=len(calibration),
        ignored_scope=nncf.IgnoredScope(patterns=kept, validate=False),
        # Weights of seven bits: processors without VNNI add two products of eight bits in sixteen, which overflows.
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
    )
