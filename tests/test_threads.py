"""How many threads compute and how they wait, as a command line finds itself."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from common import threads

ROOT = Path(__file__).resolve().parent.parent
LINUX = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
# user nice system idle iowait irq softirq steal
BEFORE = "cpu  0 0 0 0 0 0 0 0\ncpu0 100 0 10 500 5 0 0 0\ncpu1 200 0 20 400 5 1 2 3\nintr 5\n"
AFTER = "cpu  0 0 0 0 0 0 0 0\ncpu0 101 0 10 503 6 0 0 0\ncpu1 202 1 21 400 5 1 2 4\nintr 9\n"


@pytest.mark.parametrize(("cores", "expected"), [({0}, False), ({1}, True), ({0, 1}, True), ({7}, False)])
def test_a_core_is_busy_where_its_ticks_went_into_work(cores, expected):
    # Core 0 worked in 1 of 5 ticks, core 1 in all 5; core 7 is not there.
    assert threads.is_any_busy(BEFORE, AFTER, cores) is expected
    assert not threads.is_any_busy("", "", cores)  # where a sandbox hides them


@contextmanager
def busy_cores():
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    time.sleep(0.3)
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def settled(package: str = "common", **variables: str) -> list[str]:
    """The variables that a process which imports a package ends with, and whether torch was loaded by then."""
    names = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    program = f"import sys, os, {package}; print(*map(os.environ.get, {names}), 'torch' in sys.modules)"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=inherited | variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@LINUX
@pytest.mark.parametrize("package", ["common", "detection", "classification", "tools"])
def test_beside_busy_processes_threads_do_not_spin_whatever_is_imported_first(package):
    with busy_cores():
        assert settled(package) == ["0", "None", "False"]


@LINUX
def test_what_the_user_has_set_stays():
    assert settled(GOMP_SPINCOUNT="7") == ["7", "None", "False"]
    assert settled(OMP_WAIT_POLICY="active") == ["None", "None", "False"]
    assert settled(OMP_NUM_THREADS="1") == ["None", "1", "False"]  # nobody to wait for


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 8), ("250000 100000", 3), ("5000 100000", 1), (None, 8)]
)
def test_cores_are_those_that_affinity_and_container_allow(limit, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpu.max"
    if limit:
        file.write_text(f"{limit}\n")
    monkeypatch.setattr(threads, "QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert threads.available_cores() == expected
