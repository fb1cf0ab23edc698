"""What processes share, and how they end: one process here, several in the tests of the two halves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import Interrupted, UserError
from common.processes import (
    ENDS_WITH_PARENT,
    deferred_interrupt,
    ignore_interrupt,
    is_main_process,
    on_main_process,
    rank,
    share_buffers,
    world_size,
)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_first_ctrl_c_waits_for_the_end_of_a_step(capsys: pytest.CaptureFixture) -> None:
    before = signal.getsignal(signal.SIGINT)
    steps = 0
    with deferred_interrupt() as interrupt:
        assert not interrupt.is_set()
        while not interrupt.is_set():
            press_ctrl_c()
            steps += 1  # the rest of the step is done
    assert steps == 1
    assert capsys.readouterr().err == "\nStopping after this step, with a checkpoint, Ctrl-C again ends at once\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted), deferred_interrupt():
        press_ctrl_c()
        press_ctrl_c()
        time.sleep(10)
        pytest.fail("it went on")
    assert signal.getsignal(signal.SIGINT) is before


def test_in_several_processes_the_first_decides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The others go on, whatever comes, until they lose it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (rank(), world_size(), is_main_process()) == (1, 2, False)
    before = signal.getsignal(signal.SIGINT)
    lost = RuntimeError("Connection closed by peer")
    with pytest.raises(Interrupted) as stop, deferred_interrupt():
        press_ctrl_c()
        press_ctrl_c()  # the launcher's
        raise lost
    assert stop.value.__cause__ is lost
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # the launcher's own may come as late as this
    signal.signal(signal.SIGINT, before)
    with pytest.raises(RuntimeError) as error, deferred_interrupt():
        raise lost  # nobody pressed Ctrl-C
    assert error.value is lost
    assert not capsys.readouterr().err


def test_errors_in_the_block_are_what_they_were() -> None:
    with pytest.raises(UserError, match="mend it"), deferred_interrupt():
        press_ctrl_c()
        raise UserError("mend it")


def test_loading_processes_leave_ctrl_c_to_the_training() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupt()
        press_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)


def test_alone_nothing_is_sent() -> None:
    assert (rank(), world_size(), is_main_process()) == (0, 1, True)
    assert on_main_process(max, 3, 5) == 5
    norm = nn.BatchNorm2d(2)
    norm.running_mean += 1
    share_buffers(norm)
    assert torch.equal(norm.running_mean, torch.ones(2))


@pytest.mark.skipif(sys.platform != "linux", reason="only the kernel of Linux ends a process with its parent")
def test_child_ends_with_its_parent() -> None:
    code = (
        "import subprocess, sys, time\n"
        "from common.processes import ENDS_WITH_PARENT\n"
        "print(subprocess.Popen(['sleep', '600'], **ENDS_WITH_PARENT).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    assert ENDS_WITH_PARENT
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # dead, but nobody has asked for its exit code
            return
        time.sleep(0.01)
    pytest.fail("the child lives on")
