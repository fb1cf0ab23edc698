"""Files of Detectron2's model zoo and of Caffe2's: pickles of arrays, read by an unpickler that runs nothing.

A pickle is a program. Only its instructions that make numbers, texts and containers are known here, and the only
functions that it can call are stand-ins for the few that build numpy's arrays. numpy's own functions are not reached,
and no array is larger than the bytes that the file holds for it.
"""

import io
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

# Everything but what makes instances of classes, or takes objects from elsewhere.
INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
)
TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
PYTHON_UNPICKLER: Any = vars(pickle)["_Unpickler"]  # the one in C grows its memory by what a file says


class _DType:
    """In place of `numpy.dtype`: a kind of number, and its order of bytes."""

    def __init__(self, name: str, *options: object) -> None:
        if not re.fullmatch(r"[fiub][1248]", name):
            raise ValueError(f"an array of {name!r}")
        self.value = np.dtype(name)

    def build(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """In place of `numpy.ndarray` and the function that begins one."""

    def __init__(self, *options: object) -> None:
        self.value = np.empty(0)

    def build(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.value = _values(content, dtype).reshape(shape, order="F" if is_fortran else "C")


def _values(content: str | bytes, dtype: _DType) -> np.ndarray:
    """The numbers in some bytes; files of Python 2 have a text of them."""
    return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype.value)


def _frombuffer(content: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.build((1, shape, dtype, order == "F", content))
    return array


def _scalar(dtype: _DType, content: str | bytes) -> int | float:
    return _values(content, dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Callable] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _Refused(Exception):
    """A file asks for something that arrays do not need."""


class _ArrayUnpickler(PYTHON_UNPICKLER):
    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in STAND_INS:
            raise _Refused(f"{module}.{name}")
        return STAND_INS[module, name]

    def load_build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].build(state)

    def load_bytearray8(self) -> None:
        self.append(self.read(struct.unpack("<Q", self.read(8))[0]))

    dispatch: ClassVar = {
        **{getattr(pickle, name)[0]: PYTHON_UNPICKLER.dispatch[getattr(pickle, name)[0]] for name in INSTRUCTIONS},
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, but not in torch's legacy format."""
    with path.open("rb") as file:
        head = file.read(20)
    return head.startswith(b"\x80") and TORCH_MAGIC not in head


def read_zoo_pickle(path: Path) -> dict[str, Any]:
    """Reads a `.pkl` of weights without running anything.

    Layouts: Detectron2's, `{"model": arrays by name, "__author__": ...}` with or without `matching_heuristics`; and
    Caffe2's, arrays by name, by themselves or under "blobs", beside momenta, which are left out.

    Returns:
        `model`, tensors by name; `__author__`, "Caffe2" where the file says none; `matching_heuristics`, whether the
        names are others than the network's.

    Raises:
        UserError: the file is missing, broken, holds no arrays by name, or asks for anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; expected a .pkl of Detectron2's model zoo")
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except _Refused as refused:
        raise UserError(
            f"{path}: is a pickle that asks for {str(refused)!r}, which was not run; expected arrays by name alone, as "
            "in Detectron2's model zoo: take the file from where it was published"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a broken program can fail anywhere
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{path}: cannot be read as a pickle of arrays ({reason[:200]}); expected a whole file of Detectron2's "
            "model zoo: fetch it again"
        ) from error
    content = content if isinstance(content, dict) else {}
    if "model" in content and "__author__" in content:
        author, is_other = str(content["__author__"]), bool(content.get("matching_heuristics", False))
        state = content["model"]
    else:
        author, is_other = "Caffe2", True
        state = content.get("blobs", content)
    if not (isinstance(state, dict) and state and all(isinstance(value, _Array) for value in state.values())):
        raise UserError(f"{path}: holds no arrays by name; expected a .pkl of Detectron2's model zoo")
    model = {str(name): _tensor(cast(_Array, value)) for name, value in state.items()}
    if author == "Caffe2":
        model = {name: value for name, value in model.items() if not name.endswith("_momentum")}
    return {"model": model, "__author__": author, "matching_heuristics": is_other}


def _tensor(array: _Array) -> Tensor:
    value = array.value
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
