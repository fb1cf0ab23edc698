"""Darknet's `.weights` files: a header, then the float32 values of every convolution in the order of the cfg."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_atomically

NORM_EPS = 1e-6
NEGATIVE_SLOPE = 0.1


class DarknetFile(NamedTuple):
    """What reading a file found.

    Attributes:
        images_seen: number of images that the network was trained on.
        values_read: number of values that the model took.
        values_left: number of values after them.
    """

    images_seen: int
    values_read: int
    values_left: int


def convolutions(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module | None]]:
    """The convolutions of `model` in the order of its modules, each with its BatchNorm or None.

    Our networks register their modules in the order of Darknet's cfg files, so this is the order of a `.weights` file.
    """
    modules = [m for m in model.modules() if isinstance(m, nn.Conv2d) or hasattr(m, "running_mean")]
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, nn.Conv2d):
            yield module, None if isinstance(following, nn.Conv2d) else following


def is_darknet_file(path: Path) -> bool:
    """Whether a file begins as Darknet's do, with a version of 0.1 or 0.2, whatever its name."""
    with path.open("rb") as file:
        header = np.frombuffer(file.read(12).ljust(12, b"\xff"), "<i4").tolist()
    return header[0] == 0 and header[1] in (1, 2) and 0 <= header[2] < 10


def count_values(path: Path) -> int:
    """How many float32 values follow a file's header."""
    with path.open("rb") as file:
        return (path.stat().st_size - _header_size(file.read(8))) // 4


def _header_size(version: bytes) -> int:
    major, minor = np.frombuffer(version.ljust(8, b"\0"), "<i4").tolist()
    return 20 if major * 10 + minor >= 2 else 16


def read_darknet_weights(path: Path, model: nn.Module, partly: bool = False) -> DarknetFile:
    """Fills `model` with the values of a `.weights` file.

    Layout (Darknet, src/parser.c): int32 major, minor and revision; the number of images seen, as int64 from version
    0.2 on and int32 before; then for each convolution its bias, or shift, scale, mean and variance of its BatchNorm,
    and its kernel (out, in, height, width).

    Args:
        path: file to read.
        model: network whose modules stand in the file's order, with the arithmetic of Darknet.
        partly: accept values that are left over, as when a backbone is filled from a whole detector.

    Raises:
        UserError: the file is missing or broken, has fewer or (unless `partly`) more values than the model, or the
            model computes otherwise than Darknet.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected Darknet's .weights")
    _check_arithmetic(path, model)
    content = path.read_bytes()
    start = _header_size(content[:8])
    if len(content) < start or (len(content) - start) % 4:
        raise UserError(f"{path}: {len(content):,} bytes are no header and whole values; is the file complete?")
    seen = int.from_bytes(content[12:start], "little")
    values = torch.from_numpy(np.frombuffer(content, "<f4", offset=start).copy())
    tensors = list(_tensors(model))
    needed = sum(tensor.numel() for tensor in tensors)
    left = len(values) - needed
    if left < 0 or (left and not partly):
        raise UserError(
            f"{path}: {len(values):,} values, but the network has {needed:,}; give the configuration that belongs to "
            "the file, with its number of classes"
        )
    for tensor, part in zip(tensors, values[:needed].split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    return DarknetFile(seen, needed, left)


def write_darknet_weights(path: Path, model: nn.Module, images_seen: int = 0) -> int:
    """Writes `model` as a `.weights` file of version 0.2; the inverse of `read_darknet_weights`.

    Args:
        path: file to write; it is replaced once the new one is whole.
        model: network whose modules stand in the order of the cfg, with the arithmetic of Darknet.
        images_seen: number of images that the network was trained on.

    Returns:
        Number of values written.

    Raises:
        UserError: the model computes otherwise than Darknet.
    """
    _check_arithmetic(path, model)
    header = np.array([0, 2, 0], "<i4").tobytes() + np.array([images_seen], "<i8").tobytes()
    values = [tensor.cpu().contiguous().numpy().astype("<f4") for tensor in _tensors(model)]
    write_atomically(path, lambda file: file.writelines([header, *(value.tobytes() for value in values)]))
    return sum(value.size for value in values)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of `model` as they follow one another in a file."""
    for conv, norm in convolutions(model):
        if norm is None:
            yield conv.state_dict()["bias"]
        else:
            state = norm.state_dict()
            yield from (state[name] for name in ("bias", "weight", "running_mean", "running_var"))
        yield conv.weight.data


def _check_arithmetic(path: Path, model: nn.Module) -> None:
    """Refuses a model with other constants than Darknet's: the file lacks them, so outputs would differ silently."""
    epsilons: set[float] = {vars(module)["eps"] for module in model.modules() if hasattr(module, "running_mean")}
    slopes = {module.negative_slope for module in model.modules() if isinstance(module, nn.LeakyReLU)}
    if epsilons != {NORM_EPS} or slopes != {NEGATIVE_SLOPE}:
        raise UserError(
            f"{path}: Darknet computes with a BatchNorm epsilon of {NORM_EPS} and a LeakyReLU slope of "
            f"{NEGATIVE_SLOPE}, this network with {sorted(epsilons)} and {sorted(slopes)}; set MODEL.TIMM.NORM_EPS "
            f"{NORM_EPS} MODEL.TIMM.NEGATIVE_SLOPE {NEGATIVE_SLOPE} MODEL.YOLOV3.NORM_EPS {NORM_EPS}"
        )
