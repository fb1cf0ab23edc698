"""The launcher: how many processes, and what happens when one of them fails."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("NGPU", "NNODES", "NODE_RANK", "DIST_URL", "RANK", "DEBUG")

# A module to launch: says who it is, and does what its first argument says.
MODULE = """
import os, pathlib, sys, time
from common.errors import UserError, exits_on_user_error

@exits_on_user_error
def main():
    rank = os.environ.get("RANK", "alone")
    folder = pathlib.Path(sys.argv[1])
    (folder / rank).write_text(" ".join([os.environ.get("WORLD_SIZE", "1"), *sys.argv[2:]]))
    what = sys.argv[2] if len(sys.argv) > 2 else ""
    if what == "mistake" and rank != "1":
        raise UserError("file: wrong")
    if what == "unwritable":
        (folder / "a" / "b").write_text("")
    if what == "bug":
        raise ValueError("a bug")
    if what == "wait":
        from common.processes import join_processes
        join_processes()
    if what in ("wait", "mistake"):
        (folder / f"pid{rank}").write_text(str(os.getpid()))
        time.sleep(600)

main()
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    (tmp_path / "launched_module.py").write_text(MODULE)
    return "launched_module"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tools.launch", *arguments]


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    return {**inherited, **paths, "CUDA_VISIBLE_DEVICES": "", **variables}


def launch(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_one_process_runs_in_place(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "x y", "--flag")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "alone").read_text() == "1 x y --flag"


def test_two_processes_share_the_work(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "x y", NGPU="2")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 x y", "2 x y"]
    assert not (tmp_path / "2").exists()


def test_a_mistake_in_one_of_two_is_one_line(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "mistake", NGPU="2")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line.lower()] == ["error: file: wrong"]
    assert "Traceback" not in done.stderr


def test_an_unwritable_file_is_one_line(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "unwritable")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'a' / 'b'}: No such file or directory")
    assert done.stderr.count("\n") == 1


def test_debug_shows_where(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "mistake", DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_bug_is_no_mistake_of_the_user(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "bug")
    assert done.returncode == 1
    assert "ValueError: a bug" in done.stderr


def test_processes_end_with_their_launcher(tmp_path: Path, module: str) -> None:
    """Killed itself, the launcher cannot stop them any more."""
    started = [tmp_path / "pid0", tmp_path / "pid1"]
    launcher = subprocess.Popen(
        command(module, str(tmp_path), "wait"), cwd=ROOT, env=environment(tmp_path, NGPU="2"), stderr=subprocess.DEVNULL
    )
    wait_until(lambda: all(path.exists() and path.read_text() for path in started))
    pids = [int(path.read_text()) for path in started]
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NGPU": "0"}, "NGPU=0: expected a whole number, 1 or more"),
        ({"NGPU": "two"}, "NGPU=two"),
        ({"NGPU": "-1"}, "NGPU=-1"),
        ({"NNODES": "1.5"}, "NNODES=1.5"),
        ({"NNODES": "2", "NODE_RANK": "2", "DIST_URL": "tcp://a:1"}, "NODE_RANK=2: expected 0 to 1"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: expected 0 to 0"),
        ({"NNODES": "2"}, "DIST_URL=: expected tcp://HOST:PORT"),
        ({"NNODES": "2", "DIST_URL": "host:29500"}, "DIST_URL=host:29500"),
        ({"NNODES": "2", "DIST_URL": "tcp://host"}, "DIST_URL=tcp://host"),
        ({"NNODES": "2", "DIST_URL": "tcp://host:port"}, "DIST_URL=tcp://host:port"),
    ],
    ids=str,
)
def test_wrong_variables_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, variables: dict[str, str], expected: str
) -> None:
    from tools.launch import main

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch", "no_such_module"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {expected}")
    assert printed.count("\n") == 1


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import torch

    from tools.launch import main

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # a machine with two
    monkeypatch.setenv("NGPU", "4")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch", "no_such_module"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == ("error: NGPU=4: this machine has 2 GPU(s); expected at most that: give NGPU=2\n")
