"""Darknet's `.weights` files: a header, then the float32 values of every convolution in the order of the cfg."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from tools.errors import UserError

logger = logging.getLogger(__name__)


def convolutions(model: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.Module | None]]:
    """The convolutions of `model` in the order of its modules, each with its BatchNorm or None.

    Our networks register their modules in the order of Darknet's cfg files, so this is the order of a `.weights` file.
    """
    modules = [m for m in model.modules() if isinstance(m, nn.Conv2d) or hasattr(m, "running_mean")]
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, nn.Conv2d):
            yield module, None if isinstance(following, nn.Conv2d) else following


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of `model` as they follow one another in a file."""
    for conv, norm in convolutions(model):
        if norm is None:
            yield conv.bias.data
        else:
            yield from (norm.bias.data, norm.weight.data, norm.running_mean, norm.running_var)
        yield conv.weight.data


def read_darknet_weights(path: Path, model: nn.Module, partly: bool = False) -> int:
    """Fills `model` with the values of a `.weights` file.

    Layout (Darknet, src/parser.c): int32 major, minor and revision; the number of images seen, as int64 from version
    0.2 on and int32 before; then for each convolution its bias, or shift, scale, mean and variance of its BatchNorm,
    and its kernel (out, in, height, width).

    Args:
        path: file to read.
        model: network whose modules stand in the file's order.
        partly: accept values that are left over, as when a backbone is filled from a whole detector.

    Returns:
        Number of images that the network had seen.

    Raises:
        UserError: the file is missing, or has fewer or (unless `partly`) more values than the model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected Darknet's .weights")
    with path.open("rb") as file:
        header = file.read(12)
        if len(header) < 12:
            raise UserError(f"{path}: {len(header)} bytes, too short for a Darknet .weights file")
        major, minor, _ = np.frombuffer(header, "<i4")
        wide = major * 10 + minor >= 2
        seen = int(np.frombuffer(file.read(8 if wide else 4), "<i8" if wide else "<i4")[0])
        values = torch.from_numpy(np.fromfile(file, "<f4"))
    tensors = list(_tensors(model))
    needed = sum(tensor.numel() for tensor in tensors)
    if len(values) < needed or (len(values) > needed and not partly):
        raise UserError(
            f"{path}: {len(values):,} values, expected {needed:,}; is the config that of this network, "
            "with its number of classes?"
        )
    for tensor, part in zip(tensors, values[:needed].split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    logger.info(f"{path}: {needed:,} of {len(values):,} values read, {seen:,} images seen")
    return seen


def write_darknet_weights(file: BinaryIO, model: nn.Module, seen: int = 0) -> int:
    """Writes `model` as a `.weights` file of version 0.2; the inverse of `read_darknet_weights`.

    Args:
        file: binary file open for writing.
        model: network whose modules stand in the order of the cfg.
        seen: number of images that the network has seen.

    Returns:
        Number of values written.
    """
    file.write(np.array([0, 2, 0], "<i4").tobytes() + np.array([seen], "<i8").tobytes())
    tensors = list(_tensors(model))
    for tensor in tensors:
        file.write(tensor.detach().cpu().contiguous().numpy().astype("<f4").tobytes())
    return sum(tensor.numel() for tensor in tensors)
