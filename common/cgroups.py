"""What the kernel lets this process have: SLURM, systemd and containers limit groups of processes, in folders.

Needs the standard library alone, since the threads are settled before torch is loaded.
"""

import math
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
# Of either version: the limit, what is used, and, in `memory.stat`, how much of it are files that the kernel can drop.
MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# The time that may be used of a period, in one file or in two.
CORES = (("cpu.max", "cpu.max"), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def memory_left() -> float:
    """Bytes that this process may still take; infinite without a limit."""
    return min(_memory_left(folder, *names) for folder in _folders("memory") for names in MEMORY)


def cores() -> float:
    """Cores that this process may keep busy, which need not be a whole number; infinite without a limit."""
    return min(_cores(folder, *names) for folder in _folders("cpu") for names in CORES)


def _folders(controller: str) -> set[Path]:
    """The folders that may limit this process: those of its groups and all above, as cgroups(7) has it.

    A container takes its own group for the root.
    """
    folders = {ROOT, ROOT / controller}
    for line in _read(GROUPS_OF_PROCESS).splitlines():
        _, controllers, group = line.split(":", 2)
        root = ROOT / controller if controllers else ROOT  # version 2 has one tree for all controllers
        if controller in controllers.split(",") or not controllers:
            folder = root / group.lstrip("/")
            folders |= {each for each in (folder, *folder.parents) if each.is_relative_to(root)}
    return folders


def _memory_left(folder: Path, limit: str, used: str, droppable: str) -> float:
    if not _read(folder / limit).strip().isdecimal():  # "max" is no limit
        return math.inf
    counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return int(_read(folder / limit)) - int(_read(folder / used)) + int(counts.get(droppable, 0))


def _cores(folder: Path, quota: str, period: str) -> float:
    of_quota, of_period = _read(folder / quota).split(), _read(folder / period).split()
    if not of_quota or not of_quota[0].isdecimal():  # "max" and -1 are no limit
        return math.inf
    return int(of_quota[0]) / int(of_period[-1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
