"""How many threads compute and how they wait, as a command line finds itself."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from common import cgroups, threads

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
    return printed(program, **variables)


def printed(program: str, **variables: str) -> list[str]:
    """The words that a program prints, with these variables and none that say how threads compute."""
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


def test_cores_left_are_those_that_others_do_not_work_on(tmp_path, monkeypatch):
    """Four cores of ticks of a hundredth; between two looks a second passes, in which this process works two."""
    stat, clock = tmp_path / "stat", {"monotonic": 100.0, "process_time": 50.0}
    for name in clock:
        monkeypatch.setattr(time, name, partial(clock.get, name))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda name: 100, raising=False)
    monkeypatch.setattr(threads, "STAT", stat)
    monkeypatch.setattr(threads, "_work_of_children", lambda: 0.0)

    def look(*work: int, interval: float = 0.5) -> int | None:
        """After a second in which each core worked so many hundredths, the last of them one that is not ours."""
        totals[:] = (total + ticks for total, ticks in zip(totals, work, strict=True))
        write()
        clock["monotonic"] += 1
        clock["process_time"] += 2
        return watch.cores_left(interval)

    def write() -> None:
        stat.write_text("".join(f"cpu{core} {ticks} 0 0 0 0 0 0 0\n" for core, ticks in enumerate(totals)))

    totals = [7, 0, 90, 0, 0]
    write()
    watch = threads.LoadWatch()
    assert watch.cores_left() is None  # looked at just now
    assert look(50, 50, 50, 50, 0) == 4
    assert look(50, 50, 50, 50, 100) == 4
    assert look(60, 60, 60, 50, 0) == 4  # a third of a core is no reason
    assert look(100, 100, 100, 0, 0) == 3
    assert look(100, 100, 100, 60, 0) == 2
    assert look(0, 0, 0, 0, 0) == 4  # what others did has ended
    assert look(100, 100, 100, 0, 0, interval=3.5) is None
    assert look(100, 100, 100, 0, 0, interval=3.5) is None
    assert look(50, 50, 50, 50, 0, interval=3.5) is None
    assert look(50, 50, 50, 50, 0, interval=3.5) == 3  # half a core in the four seconds


@LINUX
def test_a_network_makes_room_for_others_and_does_so_later_where_it_trains():
    program = """
import time, torch
from common import runtime
for is_training, interval in ((True, 1e9), (True, 0.5), (False, 1e9)):
    torch.set_num_threads(2)
    runtime.TRAINING_INTERVAL = interval
    model = torch.nn.Linear(1, 1).train(is_training)
    runtime.leave_cores(model)
    time.sleep(1)
    model(torch.ones(1, 1))
    print(torch.get_num_threads())
"""
    with busy_cores():
        assert printed(program) == ["2", "1", "1"]
        assert printed(program, OMP_NUM_THREADS="2") == ["2", "2", "2"]


@LINUX
@pytest.mark.parametrize(
    "build_and_run",
    [
        """
from classification.model import build_model
build_model("test_resnet", 5).train()(torch.zeros(2, 3, 32, 32))
""",
        """
from detectron2.structures import Boxes, Instances
from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
cfg = get_cfg()
for name in ("Base-YOLOv3", "Sample-yolov3"):
    merge_file(cfg, CONFIGS / f"{name}.yaml")
cfg.MODEL.DEVICE = "cpu"
nothing = Instances((64, 64), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.long))
build_model(cfg).train()([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "instances": nothing}])
""",
    ],
    ids=["classification", "detection"],
)
def test_the_networks_of_both_halves_make_room_while_they_train(build_and_run):
    program = f"""
import torch
from common import runtime
runtime.LoadWatch.cores_left = lambda self, interval: 1 if interval > 1 else 2
torch.set_num_threads(2)
{build_and_run}
print(torch.get_num_threads())
"""
    assert printed(program) == ["1"]


@LINUX
def test_work_that_passed_during_an_evaluation_leaves_the_training_its_threads():
    program = """
import torch
from common import runtime
runtime.LoadWatch.cores_left = lambda self, interval: 1 if interval < 1 else None
torch.set_num_threads(2)
model = torch.nn.Linear(1, 1)
runtime.leave_cores(model)
for is_training in (True, False, True):
    model.train(is_training)(torch.ones(1, 1))
    print(torch.get_num_threads())
"""
    assert printed(program) == ["2", "1", "2"]


@LINUX
def test_a_process_of_ones_own_is_no_other_one():
    """Those that load the images of an evaluation."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        before = threads._work_of_children()
        time.sleep(1)
        during = threads._work_of_children() - before
        child.kill()
    assert during > 0.2  # beside other tests it may get less than a core
    assert threads._work_of_children() - before > during - 0.005  # also when it has ended; half a tick of rounding


@LINUX
def test_no_more_threads_than_torch_had_before_the_first_network():
    """It has fewer than there are cores where these are hyperthreads, or where the user has told it."""
    program = """
import torch
from common import runtime
left = iter([64, 1, 64])
runtime.LoadWatch.cores_left = lambda self, interval: next(left)
torch.set_num_threads(3)
for _ in range(3):  # the last is loaded while there is one thread
    model = torch.nn.Linear(1, 1).eval()
    runtime.leave_cores(model)
    model(torch.ones(1, 1))
    print(torch.get_num_threads())
"""
    assert printed(program) == ["3", "1", "3"]


@pytest.mark.parametrize(("of_user", "expected"), [(None, ["8", "2"]), ("", ["8", "2"]), ("5", ["5", "5"])])
def test_a_launcher_below_another_command_shares_out_what_that_has_taken(monkeypatch, of_user, expected):
    """As one of a study in a container, whose cores are fewer than the process sees."""
    inside = {} if of_user is None else {"OMP_NUM_THREADS": of_user}
    monkeypatch.setattr(os, "environ", inside)
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    found = []
    for processes in (1, 4):
        threads.share_cores(processes)
        found.append(inside["OMP_NUM_THREADS"])
    assert found == expected


@LINUX
def test_what_the_user_has_set_stays():
    assert settled(GOMP_SPINCOUNT="7") == ["7", "None", "False"]
    assert settled(OMP_WAIT_POLICY="active") == ["None", "None", "False"]
    assert settled(OMP_NUM_THREADS="1") == ["None", "1", "False"]  # nobody to wait for


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 8), ("250000 100000", 3), ("5000 100000", 1), (None, 8)]
)
def test_cores_are_those_that_affinity_and_container_allow(limit, expected, tmp_path, monkeypatch):
    if limit:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert threads.available_cores() == expected
