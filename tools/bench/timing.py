"""Timing several ways to do one thing side by side."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def in_turn(runs: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each run.

    After one round that does not count, every round takes each run in turn, so that a machine that grows busy slows all
    of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + repetitions):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one run takes, the work that it leaves to a GPU included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def against_rivals(what: str, seconds: Mapping[str, float]) -> list[dict]:
    """Rows of a table, one a rival, from the seconds of all; the first is ours."""
    (_, ours), *rivals = seconds.items()
    return [
        {"what": what, "ours, s": ours, "rival": name, "rival, s": theirs, "times as fast": theirs / ours}
        for name, theirs in rivals
    ]
