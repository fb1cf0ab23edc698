"""The launcher: how many processes, and what happens when one of them fails."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.launch import _take_from_slurm

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("NGPU", "NNODES", "NODE_RANK", "DIST_URL", "RANK", "DEBUG")

# A module to launch: says who it is, and does what its first argument says.
MODULE = """
import os, pathlib, signal, sys, time
from common.errors import UserError, exits_on_user_error

@exits_on_user_error
def main():
    rank = os.environ.get("RANK", "alone")
    folder = pathlib.Path(sys.argv[1])
    (folder / f"begun{rank}").write_text(str(os.getpid()))
    (folder / rank).write_text(" ".join([os.environ.get("WORLD_SIZE", "1"), *sys.argv[2:]]))
    if os.environ.get("MASTER_PORT"):
        (folder / f"place{rank}").write_text(":".join(os.environ[f"MASTER_{part}"] for part in ("ADDR", "PORT")))
    what = sys.argv[2] if len(sys.argv) > 2 else ""
    if what == "mistake" and rank != "1":
        raise UserError("file: wrong")
    if what == "unwritable":
        (folder / "a" / "b").write_text("")
    if what == "bug":
        raise ValueError("a bug")
    if what.startswith("late"):  # as a thread may that outlives the interpreter
        import atexit, ctypes
        libc = ctypes.CDLL(None)
        libc.__cxa_atexit(libc.abort, None, None)
        atexit.register(lambda: (folder / f"atexit{rank}").touch())
        print("printed", rank)
        if what == "late mistake":
            raise UserError("file: wrong")
    if what == "wait":
        from common.processes import join_processes
        join_processes()
    if what == "hang up" and rank == "0":  # as the end of a session of ssh does
        os.kill(int(os.environ["LAUNCHER_PID"]), signal.SIGHUP)
        time.sleep(2)
        (folder / "gone on").touch()
    if what == "Ctrl-C":
        from common.errors import Interrupted
        from common.processes import deferred_interrupt, join_processes
        join_processes()
        with deferred_interrupt() as pressed:
            if rank == "0":
                os.kill(int(os.environ["LAUNCHER_PID"]), signal.SIGINT)
                pressed.wait()
                raise Interrupted("saved")
            time.sleep(600)  # as NCCL waits for the first
    if what == "outlives a thread":
        time.sleep(1)
    if what in ("wait", "import", "mistake"):
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
    inherited = {
        name: value for name, value in os.environ.items() if name not in VARIABLES and not name.startswith("SLURM_")
    }
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    return {**inherited, **paths, "CUDA_VISIBLE_DEVICES": "", **variables}


def launch(tmp_path: Path, *arguments: str, outer: tuple = (), **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*outer, *command(*arguments)],
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
    # Torch's launcher has an option --start-method.
    done = launch(tmp_path, module, str(tmp_path), "x y", "--start", "coco", "--module", NGPU="2")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 x y --start coco --module"] * 2
    assert not (tmp_path / "2").exists()


def test_a_mistake_in_one_of_two_is_one_line(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "mistake", NGPU="2")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line.lower()] == ["error: file: wrong"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("end", "code"), [("late", 0), ("late mistake", 2)])
def test_processes_that_are_done_cannot_abort(tmp_path: Path, module: str, end: str, code: int) -> None:
    done = launch(tmp_path, module, str(tmp_path), end, NGPU="2")
    assert done.returncode == code, done.stderr
    if code == 0:  # else the launcher may stop one before it has come so far
        assert sorted(done.stdout.splitlines()) == ["printed 0", "printed 1"]
        assert all((tmp_path / f"atexit{rank}").exists() for rank in range(2))


# A script runs what it starts with & without the signal of Ctrl-C.
@pytest.mark.parametrize("outer", [(), ("sh", "-c", 'trap "" INT; exec "$@"', "sh")], ids=["terminal", "background"])
def test_ctrl_c_ends_those_that_wait_for_the_first(tmp_path: Path, module: str, outer: tuple) -> None:
    done = launch(tmp_path, module, str(tmp_path), "Ctrl-C", outer=outer, NGPU="2")
    assert done.returncode == 130, done.stderr
    assert "interrupted: saved" in done.stderr and "Traceback" not in done.stderr


def test_what_nohup_started_outlives_the_session(tmp_path: Path, module: str) -> None:
    done = launch(tmp_path, module, str(tmp_path), "hang up", outer=("nohup",), NGPU="2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gone on").exists()


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


@pytest.mark.parametrize(("moment", "file"), [("wait", "pid"), ("import", "begun")])
def test_processes_end_with_their_launcher(tmp_path: Path, module: str, moment: str, file: str) -> None:
    """Killed itself, the launcher cannot stop them any more, whether they have joined one another or not yet."""
    started = [tmp_path / f"{file}0", tmp_path / f"{file}1"]
    launcher = subprocess.Popen(
        command(module, str(tmp_path), moment), cwd=ROOT, env=environment(tmp_path, NGPU="2"), stderr=subprocess.DEVNULL
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
        ({"RANK": "0"}, "RANK=0: is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"NNODES": "2"}, "DIST_URL=: expected tcp://HOST:PORT"),
        ({"NNODES": "2", "DIST_URL": "host:29500"}, "DIST_URL=host:29500"),
        ({"NNODES": "2", "DIST_URL": "tcp://host"}, "DIST_URL=tcp://host"),
        ({"NNODES": "2", "DIST_URL": "tcp://host:port"}, "DIST_URL=tcp://host:port"),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS": "8"}, "SLURM: 8 tasks on 2 machines; expected one a machine"),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM: 2 tasks on 1 machines; expected one"),
    ],
    ids=str,
)
def test_wrong_variables_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, variables: dict[str, str], expected: str
) -> None:
    from tools.launch import main

    for name in [name for name in os.environ if name in VARIABLES or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
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
    from common import runtime
    from tools.launch import main

    monkeypatch.setattr(runtime, "gpu_count", lambda: 2)  # a machine with two
    monkeypatch.setenv("NGPU", "4")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch", "no_such_module"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == ("error: NGPU=4: this machine has 2 GPU(s); expected at most that: give NGPU=2\n")


def free_port() -> int:
    """One that a job of SLURM may have."""
    for port in random.SystemRandom().sample(range(29_500, 39_500), 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def on_nodes(tmp_path: Path, *arguments: str, nodes: list[dict[str, str]]) -> list[str]:
    """Launches one command on so many machines, which differ in these variables; what each printed."""
    launches = [
        subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=environment(tmp_path, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for variables in nodes
    ]
    printed = [launch.communicate(timeout=180)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0] * len(nodes), "\n".join(printed)
    return printed


def test_nodes_of_a_step_of_slurm_meet_without_further_variables(tmp_path: Path, module: str) -> None:
    """In a larger job. One that fills its job trains in tests/detection/test_parts_of_a_batch.py."""
    port = free_port()
    job = {"SLURM_NNODES": "9", "SLURM_NTASKS": "9", "SLURM_JOB_NODELIST": "elsewhere[1-9]"}
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    variables = {**job, **step, "SLURM_JOB_ID": str(port - 29_500 + 123_450_000)}
    on_nodes(tmp_path, module, str(tmp_path), nodes=[{**variables, "SLURM_NODEID": str(node)} for node in range(2)])
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
    assert {(tmp_path / f"place{rank}").read_text() for rank in "01"} == {f"localhost:{port}"}


def test_what_the_user_sets_wins_over_slurm(tmp_path: Path, module: str) -> None:
    """In a job of one machine, two nodes of two processes each meet elsewhere."""
    url = f"tcp://127.0.0.1:{free_port()}"
    slurm = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "1"}
    own = {"NNODES": "2", "DIST_URL": url, "NGPU": "2", "SLURM_GPUS_ON_NODE": "1"}
    on_nodes(tmp_path, module, str(tmp_path), nodes=[{**slurm, **own, "NODE_RANK": str(node)} for node in range(2)])
    assert [(tmp_path / rank).read_text() for rank in "0123"] == ["4"] * 4
    assert {(tmp_path / f"place{rank}").read_text() for rank in "0123"} == {url.removeprefix("tcp://")}


@pytest.mark.parametrize(
    ("slurm", "taken"),
    [
        ({"SLURM_JOB_NODELIST": "node[03-05,7]"}, {"DIST_URL": "tcp://node03:29507"}),
        ({"SLURM_JOB_NODELIST": "node[03,05-07]-ib,other"}, {"DIST_URL": "tcp://node03-ib:29507"}),
        ({"SLURM_JOB_NODELIST": "a1,b2"}, {"DIST_URL": "tcp://a1:29507"}),
        ({"SLURM_JOB_NODELIST": "rack[1-2]node[3-4],other"}, {"DIST_URL": "tcp://rack1node3:29507"}),
        ({"SLURM_JOB_NODELIST": "gpu-[01]"}, {"DIST_URL": "tcp://gpu-01:29507"}),
        ({"SLURM_JOB_NODELIST": "a1,b[2-3]"}, {"DIST_URL": "tcp://a1:29507"}),
        ({"SLURM_JOB_NODELIST": "lonely.example.org"}, {"DIST_URL": "tcp://lonely.example.org:29507"}),
        ({"SLURM_JOB_NODELIST": "a", "SLURM_STEP_NODELIST": "b[7-8]"}, {"DIST_URL": "tcp://b7:29507"}),
        ({"SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4"}, {"NNODES": "2", "NODE_RANK": "1", "NGPU": "4"}),
        ({"NODE_RANK": "0", "SLURM_NODEID": "1"}, {"NNODES": "2", "NODE_RANK": "0"}),
        ({"DIST_URL": "tcp://mine:1", "SLURM_JOB_NODELIST": "a1,b2"}, {"DIST_URL": "tcp://mine:1"}),
        ({"NGPU": "1", "SLURM_GPUS_ON_NODE": "4"}, {"NGPU": "1"}),
        ({"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3"}, {"NNODES": "3"}),
        ({"NNODES": "1", "SLURM_NTASKS": "8"}, {"NNODES": "1", "DIST_URL": None, "NODE_RANK": None}),
    ],
    ids=str,
)
def test_what_is_taken_from_slurm(
    monkeypatch: pytest.MonkeyPatch, slurm: dict[str, str], taken: dict[str, str | None]
) -> None:
    for name in [name for name in os.environ if name in VARIABLES or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    inside = {**os.environ, "SLURM_NNODES": "2", "SLURM_JOB_ID": "20007", **slurm}
    monkeypatch.setattr(os, "environ", inside)
    _take_from_slurm(gpus=4)
    assert {name: inside.get(name) for name in taken} == taken


def test_gpus_of_slurm_that_cannot_be_used_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "8"}
    monkeypatch.setattr(os, "environ", inside)
    _take_from_slurm(gpus=0)
    assert "NGPU" not in inside


def test_a_process_whose_outer_launcher_goes_on_without_the_thread_that_started_it(tmp_path: Path, module: str) -> None:
    """To Linux that thread is its parent."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started: list[subprocess.Popen] = []

    def start() -> None:
        words = command(module, str(tmp_path), "outlives a thread")
        started.append(subprocess.Popen(words, cwd=ROOT, env=environment(tmp_path, **place)))
        wait_until((tmp_path / "begun0").exists)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert started[0].wait(timeout=120) == 0


def test_a_process_of_an_outer_launcher_runs_as_it_is(tmp_path: Path, module: str) -> None:
    """Nor do the variables of this launcher or of SLURM count then."""
    outer = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tools.launch"]
    done = subprocess.run(
        [*outer, module, str(tmp_path), "x y"],
        cwd=ROOT,
        env=environment(tmp_path, NGPU="3", SLURM_NNODES="4", SLURM_NTASKS="32"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 x y", "2 x y"]
    assert not (tmp_path / "2").exists()
