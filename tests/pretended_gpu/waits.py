"""What the host waits for, and which lines of the program ask for it."""

import contextlib
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

TORCH = str(Path(torch.__file__).parent)
LIBRARIES = str(Path(torch.__file__).parent.parent)
HERE = str(Path(__file__).parent)


class Wait(NamedTuple):
    """Something that the host would wait for."""

    kind: str  # "number", "size", "copy to the GPU", "copy to the host" or "synchronize"
    operator: str
    line: str  # file:line that asked for it, in whatever library
    caller: str  # the innermost file:line outside the installed libraries


@dataclass
class PretendedGpu:
    """The GPUs of this machine, and what was waited for since `waits` was last cleared."""

    count: int
    bfloat16: bool
    current: int = 0
    waits: list[Wait] = field(default_factory=list)
    nccl: set[str] = field(default_factory=set)  # names of the process groups that believe to run on NCCL

    def wait(self, kind: str, operator: str) -> None:
        """Writes down that the host waits for `operator`."""
        self.waits.append(Wait(kind, operator, *_lines()))

    def index(self, device: "torch.device | int | str | None") -> int:
        """The number of a GPU, by default the current one; refuses one that isn't there."""
        number = device if device is None or isinstance(device, int) else torch.device(device).index
        number = self.current if number is None else number
        if number >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({number} of {self.count})")
        return number


ACTIVE: list[PretendedGpu] = []  # the innermost is last


def _lines() -> tuple[str, str]:
    """Where the running operator was asked for: the innermost line outside torch, and outside all libraries."""
    line = caller = ""
    frames = [sys._getframe()]
    if threading.current_thread() is not threading.main_thread():  # autograd's engine: `backward` waits in the main one
        frames.append(sys._current_frames()[threading.main_thread().ident])
    for frame in frames:
        while frame is not None and not caller:
            file = frame.f_code.co_filename
            if not file.startswith((TORCH, "<", HERE)) and file not in (contextlib.__file__, threading.__file__):
                where = f"{file.removeprefix(LIBRARIES + '/')}:{frame.f_lineno}"
                line = line or where
                caller = "" if file.startswith((LIBRARIES, sys.base_prefix)) else where
            frame = frame.f_back
    return line, caller
