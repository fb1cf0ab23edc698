"""Pickles of arrays come back as they were; whatever else a pickle may ask for is refused and not run."""

import os
import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.zoo_pickle import read_zoo_pickle

ARRAYS = OrderedDict(
    matrix=np.arange(6, dtype=np.float32).reshape(2, 3),
    columns=np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    counter=np.array(7),
    foreign=np.arange(3, dtype=">f4"),
    flags=np.array([1, 0], dtype=np.uint8),
)


def write(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_come_back_as_tensors(tmp_path: Path, protocol: int) -> None:
    content = {"model": ARRAYS, "__author__": "somebody", "iteration": np.float64(3), "notes": [(1, 2.5), None, True]}
    found = read_zoo_pickle(write(tmp_path / "zoo.pkl", content, protocol))
    assert (found["__author__"], found["matching_heuristics"]) == ("somebody", False)
    assert list(found["model"]) == list(ARRAYS)
    for name, value in found["model"].items():
        assert value.shape == ARRAYS[name].shape
        assert value.tolist() == ARRAYS[name].tolist()
    assert [found["model"][name].dtype for name in ("matrix", "columns", "flags")] == [
        torch.float32,
        torch.float64,
        torch.uint8,
    ]


def test_layout_of_caffe2(tmp_path: Path) -> None:
    blobs = {"conv1_w": np.ones((2, 2), np.float32), "conv1_w_momentum": np.ones((2, 2), np.float32)}
    for content in ({"blobs": blobs, "cfg": "some text"}, blobs):
        found = read_zoo_pickle(write(tmp_path / "caffe2.pkl", content))
        assert (list(found["model"]), found["__author__"], found["matching_heuristics"]) == (
            ["conv1_w"],
            "Caffe2",
            True,
        )


def test_a_file_of_python_2(tmp_path: Path) -> None:
    """There bytes are a text, 1.0 and 2.0 are eight of them; written down by hand."""
    content = (
        b"(dS'conv1_w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
        b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntbs."
    )
    assert pickle.loads(content, encoding="latin1")["conv1_w"].tolist() == [1, 2]  # it is one
    assert read_zoo_pickle(write(tmp_path / "old.pkl", content))["model"]["conv1_w"].tolist() == [1, 2]


class Calls:
    """Asks for a function to be called when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class Plain:
    """A class that pickle would make an instance of."""


def hostile(name: str, marker: Path) -> tuple[object, str]:
    """A pickle that would do something, in the first case make a file; and what is to be said of it."""
    touch = f"touch '{marker}'"
    system = f"S{touch!r}\n".encode()
    return {
        "system": ({"model": {"w": Calls(os.system, touch)}, "__author__": "x"}, r"posix\.system"),
        "a class": ({"w": Plain()}, r"copyreg|Plain"),
        "eval": (Calls(eval, f"open({str(marker)!r}, 'w')"), r"builtins\.eval"),
        "getattr": (Calls(getattr, "text", "upper"), r"builtins\.getattr"),
        "stacked": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", r"os\.system"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", r"numpy\.dtype\.__init__"),
        "numpy's loader": (Calls(np.load, str(marker), None, True), r"numpy\.load"),
        "numpy's files": (b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x08fromfile\x93.", "fromfile"),
        "other arrays": (b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x05array\x93.", "array"),
        "instruction INST": (b"(" + system + b"ios\nsystem\n.", "cannot be read"),
        "instruction OBJ": (b"(cos\nsystem\n" + system + b"o.", r"os\.system"),
        "instruction NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "cannot be read"),
        "instruction PERSID": (b"Pid\n.", "cannot be read"),
        "instruction EXT1": (b"\x80\x02\x82\x01.", "cannot be read"),
        "state of a container": (b"\x80\x02}}b.", "cannot be read"),
        "objects in an array": ({"w": np.array([{}, None], dtype=object)}, "an array of 'O8'"),
        "records": ({"w": np.zeros(2, dtype=[("a", "f4")])}, "an array of 'V4'"),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("system", "a class", "eval", "getattr", "stacked", "dotted", "numpy's loader", "numpy's files"),
        *("other arrays", "instruction INST", "instruction OBJ", "instruction NEWOBJ", "instruction PERSID"),
        *("instruction EXT1", "state of a container", "objects in an array", "records"),
    ],
)
def test_whatever_else_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "was run"
    content, reason = hostile(name, marker)
    protocol = 2 if name == "a class" else 4
    with pytest.raises(UserError, match=reason) as error:
        read_zoo_pickle(write(tmp_path / "hostile.pkl", content, protocol))
    assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b".",  # a bytearray
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",  # bytes
        b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b".",  # a frame
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a place in the memory of two thousand millions
        pickle.dumps({"w": np.zeros(4, np.float32)}, 2).replace(b"K\x04\x85", b"J\x00\x00\x00\x7f\x85"),  # a long array
        pickle.dumps({"w": np.zeros(4, np.float32)}, 4)[:-9],
        b"no pickle",
        b"",
    ],
)
def test_large_sizes_and_broken_files_take_no_memory(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "broken.pkl", content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"broken\.pkl: (cannot be read|holds no arrays)") as error:
            read_zoo_pickle(path)
        assert "\n" not in str(error.value)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"model": {}, "__author__": "x"}, {"model": {"w": "text"}, "__author__": "x"}, {"blobs": 3}]
)
def test_no_arrays(tmp_path: Path, content: object) -> None:
    with pytest.raises(UserError, match=r"none.pkl: (holds no arrays|cannot be read)"):
        read_zoo_pickle(write(tmp_path / "none.pkl", content))
    with pytest.raises(UserError, match="no such weights file"):
        read_zoo_pickle(tmp_path / "missing.pkl")
