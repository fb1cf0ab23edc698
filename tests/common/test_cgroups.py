"""Limits of memory and cores, from folders such as SLURM, systemd and containers leave them."""

import math
from pathlib import Path

import pytest

from common import cgroups


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroups, "GROUPS_OF_PROCESS", tmp_path / "groups")
    return tmp_path / "cgroup"


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_without_limits_there_are_none(root: Path) -> None:
    assert cgroups.memory_left() == cgroups.cores() == math.inf
    write(root, {"memory.max": "max", "memory.current": "5", "cpu.max": "max 100000"})
    write(root / "cpu", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"})
    assert cgroups.memory_left() == cgroups.cores() == math.inf


@pytest.mark.parametrize(
    ("statistics", "left"), [("anon 1\ninactive_file 700\nslab 3", 800), ("anon 1", 100), (None, 100)]
)
def test_files_that_a_container_has_read_leave_its_memory_free(root: Path, statistics: str | None, left: int) -> None:
    write(root, {"memory.max": "1000", "memory.current": "900", "cpu.max": "250000 100000"})
    if statistics:
        write(root, {"memory.stat": statistics})
    assert (cgroups.memory_left(), cgroups.cores()) == (left, 2.5)


def test_limits_of_a_job_and_of_what_it_is_part_of_count(root: Path) -> None:
    """Version 2, as SLURM and systemd set it: the root has no limits of its own."""
    (root.parent / "groups").write_text("0::/system.slice/job_7/step_0\n")
    job = root / "system.slice/job_7"
    write(job / "step_0", {"memory.max": "max", "memory.current": "5", "cpu.max": "400000 100000"})
    write(job, {"memory.max": "8000", "memory.current": "6000", "cpu.max": "max 100000"})
    write(root / "system.slice/job_8", {"memory.max": "10", "memory.current": "1", "cpu.max": "1000 100000"})
    assert (cgroups.memory_left(), cgroups.cores()) == (2000, 4)


def test_the_first_version_has_a_tree_for_each_controller(root: Path) -> None:
    (root.parent / "groups").write_text("12:cpu,cpuacct:/job/a:b\n5:memory:/job\n1:name=systemd:/other\n0::/\n")
    write(root / "cpu/job/a:b", {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"})
    unlimited = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "10"}
    write(root / "memory", unlimited)
    limited = {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "400"}
    write(root / "memory/job", {**limited, "memory.stat": "inactive_file 1\ntotal_inactive_file 30"})
    assert (cgroups.memory_left(), cgroups.cores()) == (130, 1.5)


def test_what_this_machine_has_is_understood() -> None:
    assert cgroups.memory_left() > 0 and cgroups.cores() > 0
