"""What a user can mend is one line and an exit code: memory that is not there, disks, other processes, Ctrl-C."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.errors import ArgumentParser, Interrupted, UserError, exits_on_user_error

PEBIBYTE = 1 << 50


def ended(capsys: pytest.CaptureFixture, main: Callable[[], None]) -> tuple[int, str]:
    """The exit code of a command line and what it said on stderr."""
    with pytest.raises(SystemExit) as end:
        exits_on_user_error(main)()
    printed = capsys.readouterr()
    assert not printed.out
    return end.value.code, printed.err


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_a_wrong_command_line_is_one_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        parser = ArgumentParser()
        parser.add_argument("--topk", type=int)
        parser.parse_args(["--topk", "many"])

    assert ended(capsys, main) == (2, "error: argument --topk: invalid int value: 'many'\n")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEBUG", raising=False)
    monkeypatch.delenv("RANK", raising=False)


CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.06 GiB is "
    "free. Including non-PyTorch memory, this process has 76.04 GiB memory in use."
)


@pytest.mark.parametrize(
    ("main", "asked"),
    [
        (lambda: torch.empty(PEBIBYTE, dtype=torch.uint8), f"you tried to allocate {PEBIBYTE} bytes"),
        (
            lambda: np.empty(PEBIBYTE, np.uint8),
            "Unable to allocate 1.00 PiB for an array with shape (1125899906842624,)",
        ),
        (raising(torch.OutOfMemoryError(CUDA)), "Tried to allocate 20.50 GiB"),
        (raising(RuntimeError("CUDA error: out of memory")), "out of memory"),
        (raising(MemoryError()), "nothing is left"),
    ],
    ids=["torch", "numpy", "CUDA", "CUDA without a size", "Python"],
)
def test_without_memory_one_line_says_what_was_asked_and_what_to_lower(
    capsys: pytest.CaptureFixture, main: Callable[[], None], asked: str
) -> None:
    code, printed = ended(capsys, main)
    assert code == 2
    assert printed.startswith("error: out of memory (")
    assert printed.count("\n") == 1
    assert asked in printed
    for key in ("SOLVER.IMS_PER_BATCH", "INPUT.MIN_SIZE_TRAIN", "batch_size"):
        assert key in printed


class WithoutMemory(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.empty(PEBIBYTE, dtype=torch.uint8)


def test_without_memory_in_a_worker_it_is_the_same_line(capsys: pytest.CaptureFixture) -> None:
    loader = torch.utils.data.DataLoader(WithoutMemory(), num_workers=1)
    code, printed = ended(capsys, lambda: list(loader))
    assert code == 2
    assert printed.startswith("error: out of memory (")
    assert f"you tried to allocate {PEBIBYTE} bytes" in printed
    assert printed.count("\n") == 1


def test_killed_worker_is_one_line(capsys: pytest.CaptureFixture) -> None:
    """The system kills the process that takes the most when memory is short."""
    error = RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
    code, printed = ended(capsys, raising(error))
    assert code == 2
    assert printed.startswith("error: a loading process was killed")
    assert printed.count("\n") == 1


def test_killed_worker_is_the_reason_for_what_it_leaves_half_done(capsys: pytest.CaptureFixture) -> None:
    """The handler of a signal tells of it, in the midst of a checkpoint say, whose archive then cannot be closed."""

    def save() -> None:
        try:
            raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. ")
        finally:
            raise RuntimeError("unexpected pos 1122816 vs 1122712")

    code, printed = ended(capsys, save)
    assert code == 2
    assert printed.startswith("error: a loading process was killed")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("a.txt: mend it"), 2, "error: a.txt: mend it\n"),
        (PermissionError(13, "Permission denied", "a.txt"), 2, "error: a.txt: Permission denied; check the path"),
        (OSError(28, "No space left on device", "a.txt"), 2, "error: a.txt: No space left on device; check the path"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (Interrupted("a run is saved; RESUME=1 goes on"), 130, "interrupted: a run is saved; RESUME=1 goes on\n"),
    ],
)
def test_one_line_and_a_code(capsys: pytest.CaptureFixture, error: BaseException, code: int, expected: str) -> None:
    found, printed = ended(capsys, raising(error))
    assert found == code
    assert printed.startswith(expected)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("shapes (2, 3) and (4, 5) do not match")])
def test_faults_of_the_program_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as found:
        exits_on_user_error(raising(error))()
    assert found.value is error


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(UserError):
        exits_on_user_error(raising(UserError("a line")))()


def test_other_ranks_leave_an_interrupt_to_the_first(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert ended(capsys, raising(Interrupted("saved"))) == (130, "")


def test_needs_the_standard_library_alone() -> None:
    """Set-up imports it on a bare machine."""
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import sys; sys.path.insert(0, '.'); import common.errors"], check=True
    )
