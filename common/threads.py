"""How many threads compute and how they wait for one another: settled before torch is loaded.

The OpenMP runtime that torch brings lets a thread that waits for the others spin for some 300,000 rounds. On cores that
are free nothing is faster; but where another process keeps the slowest thread from its core, the others spin on the
cores that it could have moved to. Spinning or not, they wait for it at every operator; so a network stays off cores
that others use (`common.runtime.leave_cores`). A training leaves them only to lasting work, since the number of threads
sets the order in which gradients are summed, and with it their last digits.
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path

from common import cgroups

# Half a millisecond: as fast as spinning on, where the cores are free, and less of a loss where they become busy.
SPINS = 10_000
PROBE = 0.05  # seconds for which the cores are watched
INTERVAL = 0.5  # seconds between two looks at them; a tick is a hundredth
TRAINING_INTERVAL = 5.0  # the same while a network trains, so that passing work changes nothing
ENOUGH = 0.4  # of a core: what others take of it, above which they have it
STAT = Path("/proc/stat")
SHARED_OUT = "OMP_NUM_THREADS_SHARED_OUT"  # holds what we set OMP_NUM_THREADS to: any other value is the user's


def available_cores() -> int:
    """Cores that this process may use, by affinity and limits; macOS and Windows know only how many there are."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(cgroups.cores(), sys.maxsize))))


def settle_threads() -> None:
    """Sets `GOMP_SPINCOUNT`, and `OMP_NUM_THREADS` where a container has less than it sees; the user's own stay."""
    if "torch" in sys.modules or not hasattr(os, "sched_getaffinity"):
        return
    cores = os.sched_getaffinity(0)
    if available_cores() < len(cores) and not os.environ.get("OMP_NUM_THREADS"):
        share_cores(1)
    if os.environ.get("OMP_NUM_THREADS") == "1" or {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        return
    before = _read_times()
    time.sleep(PROBE)
    os.environ["GOMP_SPINCOUNT"] = "0" if is_any_busy(before, _read_times(), cores) else str(SPINS)


def share_cores(processes: int) -> None:
    """Gives each of so many processes its part of the cores, unless the user has said how many threads to take."""
    if os.environ.get("OMP_NUM_THREADS") in (None, "", os.environ.get(SHARED_OUT)):
        os.environ["OMP_NUM_THREADS"] = os.environ[SHARED_OUT] = str(max(1, available_cores() // processes))


class LoadWatch:
    """Watches how much of the cores of this process others use."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        self._last = self._now()

    def cores_left(self, interval: float = INTERVAL) -> int | None:
        """How many cores others leave, at least one; None where they were looked at less than `interval` s ago."""
        if time.monotonic() - self._last[0] < interval:
            return None
        now = self._now()
        elapsed, ours, work = (after - before for after, before in zip(now, self._last, strict=True))
        self._last = now
        others = max(0.0, work - ours) / elapsed
        return max(1, len(self._cores) - math.floor(others + 1 - ENOUGH))

    def _now(self) -> tuple[float, float, float]:
        """Seconds: of the clock, of our work on all cores, of work of all processes on the watched ones."""
        ticks = sum(work for core, (work, _) in _busy_and_idle(_read_times()).items() if core in self._cores)
        return time.monotonic(), time.process_time() + _work_of_children(), ticks / os.sysconf("SC_CLK_TCK")


def _work_of_children() -> float:
    """Seconds of work of the processes that this one has started, such as those that load its images."""
    import psutil  # here, since what sets up the threads needs the standard library alone

    ended = os.times()
    work = ended.children_user + ended.children_system
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            times = child.cpu_times()
            work += times.user + times.system
    return work


def is_any_busy(before: str, after: str, cores: set[int]) -> bool:
    """Whether one of the cores worked more than half of the time between two readings of /proc/stat."""
    first, last = _busy_and_idle(before), _busy_and_idle(after)
    for core in cores & first.keys() & last.keys():
        busy, idle = (now - then for now, then in zip(last[core], first[core], strict=True))
        if busy > idle:
            return True
    return False


def _busy_and_idle(stat: str) -> dict[int, tuple[int, int]]:
    """Ticks of each core in which it worked, and in which it idled or waited for a disk; see proc(5)."""
    times = {}
    for line in stat.splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdecimal():
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
            times[int(name[3:])] = (user + nice + system + irq + softirq + steal, idle + iowait)
    return times


def _read_times() -> str:
    try:
        return STAT.read_text()
    except OSError:
        return ""  # a sandbox may hide it
