"""Models in files of other runtimes: one file, `model.xml` of OpenVINO or `model.onnx`, with all that its use needs.

What a model is, its `card`, travels in the metadata of the file, each value as JSON: in OpenVINO's `rt_info` below
`model_info`, in `metadata_props` of ONNX. Both halves put what they need there; all files have `kind` and `precision`.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError, last_line
from common.runtime import most_threads

SUFFIXES = {"openvino": ".xml", "onnx": ".onnx"}
SECTION = "model_info"  # OpenVINO's own place for what is known of a model

Runner = Callable[[np.ndarray], list[np.ndarray]]


def is_exported(path: str | Path) -> bool:
    """Whether this is the name of a file of another runtime."""
    return Path(path).suffix in SUFFIXES.values()


def import_runtime(name: str) -> ModuleType:
    """A package of requirements-export.txt, which the project does without until something is exported.

    Raises:
        UserError: it is not installed.
    """
    # Blocks the package through which OpenVINO and NNCF send usage data to Intel as soon as they are imported.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}); expected the packages of requirements-export.txt: make setup-export"
        ) from error


class ExportedModel(nn.Module):
    """A model that another runtime computes, on the CPU.

    Args:
        path: the file.
        kind: what it is to be, "detector" or "classifier"; None: either.

    Raises:
        UserError: the file is missing, cut off, none of ours or of another kind, or its runtime is not installed.

    Attributes:
        card: what the file says of its model.
    """

    def __init__(self, path: Path, kind: str | None = None) -> None:
        super().__init__()
        self.path = path
        self.card, compile_model = _open(path, kind)
        with _told(path, "cannot be compiled"):
            self._run = compile_model(self.card["precision"])

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the model makes of an input of the kind that it was exported for.

        Raises:
            UserError: the runtime refuses it.
        """
        with _told(self.path, f"cannot run on an input of {tuple(images.shape)}"):
            # Not by torch, whose threads would wait on the cores that the runtime computes on.
            outputs = self._run(np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32))
        tensors = tuple(torch.from_numpy(output).to(images.device) for output in outputs)
        return tensors if len(tensors) > 1 else tensors[0]


def read_card(path: Path, kind: str | None = None) -> dict[str, Any]:
    """What an exported file says of its model.

    Raises:
        UserError: see `ExportedModel`.
    """
    return _open(path, kind)[0]


def _open(path: Path, kind: str | None) -> tuple[dict[str, Any], Callable[[str], Runner]]:
    """The card of a file, and what makes it ready to run in a precision."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a model.xml or model.onnx that make export has written")
    open_file = _open_onnx if path.suffix == SUFFIXES["onnx"] else _open_openvino
    metadata, compile_model = open_file(path)
    try:
        card = {name: json.loads(value) for name, value in metadata.items()}
    except ValueError:
        card = {}
    if missing := {"kind", "precision", "class_names", "input"} - card.keys():
        raise UserError(
            f"{path}: does not say which model it holds ({', '.join(sorted(missing))} missing); expected a file that "
            "make export has written"
        )
    if kind not in (None, card["kind"]):
        raise UserError(f"{path}: is a {card['kind']} of this project, expected a {kind}")
    return card, compile_model


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Turns any error of a runtime, each of which has its own types, into a one-line `UserError`."""
    try:
        yield
    except Exception as error:
        beside = "" if path.suffix == SUFFIXES["onnx"] else f", {path.with_suffix('.bin').name} beside it,"
        raise UserError(
            f"{path}: {what} ({last_line(error)}); expected a whole file of make export{beside} and what it was "
            "exported for: export it again"
        ) from error


def _open_openvino(path: Path) -> tuple[dict[str, str], Callable[[str], Runner]]:
    openvino = import_runtime("openvino")
    core = openvino.Core()
    with _told(path, "cannot be read"):
        model = core.read_model(path)

    def compile_model(precision: str) -> Runner:
        # What int8 leaves in floating point is computed as bfloat16 is.
        is_low = precision != "float32" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if is_low else "f32",
            "INFERENCE_NUM_THREADS": most_threads(),
        }
        compiled = core.compile_model(model, "CPU", settings)
        return lambda images: list(compiled(images).to_tuple())

    return model.get_rt_info([SECTION]).value if model.has_rt_info([SECTION]) else {}, compile_model


def _open_onnx(path: Path) -> tuple[dict[str, str], Callable[[str], Runner]]:
    onnxruntime = import_runtime("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = most_threads()
    options.log_severity_level = 4  # what is wrong is said in our own words
    with _told(path, "cannot be read"):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {session.get_inputs()[0].name: images})

    return session.get_modelmeta().custom_metadata_map, lambda precision: run
