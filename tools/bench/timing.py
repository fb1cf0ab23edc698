"""Timing several ways to do one thing side by side."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from common.runtime import PRECISIONS, fastest_precision

ROUNDS = 5
NOISE = 0.05  # a difference of less says nothing
LEAST_SECONDS = 0.5  # of a turn: in a shorter one, the previous contender's cold caches and waiting threads count


@dataclass(frozen=True)
class Contender:
    """One way to do a job.

    Attributes:
        name: who does it; ours come first wherever there are several.
        run: does it once.
        precision: in which a network computes; empty where there is none.
        threads: that compute; None for those of torch.
    """

    name: str
    run: Callable[[], object]
    precision: str = ""
    threads: int | None = None


def our_precision(device: str) -> str:
    """The precision that our networks choose for themselves."""
    return fastest_precision(torch.device(device))


def rival_precisions(device: str) -> list[str]:
    """Those that a rival is measured in: float32, as it comes, and ours."""
    return list(dict.fromkeys(["float32", our_precision(device)]))


def at_precision(model: nn.Module, precision: str, device: str) -> nn.Module:
    """A rival's model as it is for float32; else a copy of it, channels last, that runs under autocast."""
    if precision == "float32":
        return model
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    model.forward = torch.autocast(device, PRECISIONS[precision])(model.forward)
    return model


def in_turn(contenders: Sequence[Contender], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each contender in each round, preceded by those of a warm-up.

    Every round takes each contender in turn, so that a machine that grows busy slows all of them. In its turn a short
    run is repeated, and the mean counts.
    """
    seconds = [[seconds_of(contender.run)] for contender in contenders]
    counts = [
        1 if first >= LEAST_SECONDS else repeats(contender.run, LEAST_SECONDS)
        for contender, [first] in zip(contenders, seconds, strict=True)
    ]
    for _ in range(rounds):
        for contender, times, count in zip(contenders, seconds, counts, strict=True):
            times.append(seconds_of(partial(several, contender.run, count)) / count)
    return seconds


def several(run: Callable[[], object], count: int) -> None:
    """Runs so many times."""
    for _ in range(count):
        run()


def repeats(run: Callable[[], object], least: float) -> int:
    """How often a run has to be repeated to take so many seconds; runs it once to see."""
    return max(1, round(least / seconds_of(run)))


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one run takes, the work that it leaves to a GPU included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(what: str, contenders: Sequence[Contender], rounds: int = ROUNDS, images: int = 0) -> list[dict]:
    """Times contenders in turn; rows of a table, one a contender.

    Args:
        what: they all do.
        contenders: ours first.
        rounds: timed ones, after one of warm-up.
        images: that a run deals with; with 0 the table has no rate.
    """
    return rows(what, contenders, [times[1:] for times in in_turn(contenders, rounds)], images)


def rows(what: str, contenders: Sequence[Contender], seconds: Sequence[Sequence[float]], images: int = 0) -> list[dict]:
    """Rows of a table from the seconds of each contender.

    `s` is the median, `± %` half of the range from the fastest round to the slowest in per cent of it, and `ours is`
    tells what `times as fast` means: differences below 5 % are noise.
    """
    table = []
    ours = statistics.median(seconds[0])
    for contender, times in zip(contenders, seconds, strict=True):
        median = statistics.median(times)
        row: dict[str, str | float] = {"what": what, "by": contender.name, "precision": contender.precision}
        row["threads"] = torch.get_num_threads() if contender.threads is None else contender.threads
        row |= {"s": median, "± %": 50 * (max(times) - min(times)) / median}
        if images:
            row["images/s"] = images / median
        if contender is not contenders[0]:
            ratio = median / ours
            is_noise = 1 - NOISE < ratio < 1 + NOISE
            row |= {"times as fast": ratio, "ours is": "noise" if is_noise else "faster" if ratio > 1 else "slower"}
        table.append(row)
    return table


def on_devices(measure: Callable[[str], list[dict]]) -> list[dict]:
    """Rows of what is measured on the CPU and, where there is one, on a GPU."""
    if torch.cuda.is_available():
        return measure("cpu") + measure("cuda")
    return [*measure("cpu"), {"what": "the same on an NVIDIA GPU", "by": "not measured: none here"}]
