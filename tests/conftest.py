"""Fixtures shared by all tests."""

import ctypes
import fcntl
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from common.sample import draw_sample
from tests.pretended_gpu import pretended_gpu  # here: when autograd first runs it must know of the device
from tests.pretended_gpu.waits import PretendedGpu

ROOT = Path(__file__).resolve().parent.parent

# Imports once what takes seconds, then forks a real process for each command line that it is told to start.
FORK_SERVER = """
import json, os, resource, runpy, sys
import torch
import detection.train_net
import matplotlib.figure, pandas, tqdm.contrib.logging
for line in sys.stdin:
    job = json.loads(line)
    if isinstance(job, int):
        print(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.setpgid(0, job["group"])
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        torch.seed()  # as another process would have it
        sys.argv = ["launch", *job["arguments"]]
        os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        code = 1
        try:
            runpy.run_module("tools.launch", run_name="__main__")
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            else:
                code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
"""


class Process:
    """A command line that was started; `end` must follow."""

    def __init__(self, server: "ForkServer", number: int, log: Path) -> None:
        self.server, self.number, self.log = server, number, log

    def end(self) -> tuple[int, str]:
        """Waits for it; its exit code, -9 being SIGKILL, and what it printed."""
        return int(self.server.ask(self.number)), self.log.read_text()


def end_well(processes: Iterable[Process]) -> None:
    """Waits for processes that work together; each must end with 0."""
    outcomes = [process.end() for process in processes]
    assert all(code == 0 for code, _ in outcomes), "\n\n".join(f"exit code {code}\n{said}" for code, said in outcomes)


class ForkServer:
    """Runs `python -m tools.launch MODULE ...`, each time in a process of its own and without the time of imports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: object) -> str:
        print(json.dumps(question), file=self.server.stdin, flush=True)
        return self.server.stdout.readline()

    def start(
        self, *arguments: str, folder: Path = ROOT, group: int = 0, largest_file: int = 0, **variables: str
    ) -> Process:
        """Starts one.

        Args:
            arguments: the module and its command line.
            folder: where it runs.
            group: its process group; 0 is its own.
            largest_file: bytes that it may write to a file, as on a disk that is almost full; 0 is no limit.
            variables: of the environment, besides `environment`.
        """
        self.count += 1
        log = self.folder / f"{self.count}.txt"
        log.touch()
        job = {"arguments": arguments, "log": str(log), "folder": str(folder), "group": group}
        job["largest_file"] = largest_file
        return Process(self, int(self.ask({**job, "environment": variables})), log)

    def __call__(self, *arguments: str, **settings) -> tuple[int, str]:
        """Runs one from start to end."""
        return self.start(*arguments, **settings).end()


def environment(**variables: str) -> dict[str, str]:
    """The variables of a process on one thread, without those that say how a run is launched."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("NGPU", "NNODES", "DEBUG")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("printed"))
    yield server
    server.server.terminate()  # loading processes that tests have forked may still hold its input open
    server.server.wait()


@pytest.fixture(scope="session")
def drawn_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn sample, for tests that leave it as it is: drawing takes ten seconds, so all workers share one."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data" / "sample"
    root.parent.mkdir(exist_ok=True)
    with (root.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        draw_sample(root)  # which does nothing where another worker has
    return root


@pytest.fixture(scope="module", autouse=True)
def freed_memory_goes_back() -> Iterator[None]:
    """Undoes `keep_freed_memory` of the command lines that tests call here: a process of many files would only grow."""
    yield
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 128 * 1024)  # M_TRIM_THRESHOLD and M_MMAP_MAX as glibc has them
        libc.mallopt(-4, 65536)
        gc.collect()
        libc.malloc_trim(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real photographs and weights beside the checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"real photographs and weights are missing: no folder {folder.name}/ beside the checkout")
    return folder


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    """A GPU with real values on a machine that has none, which writes down what it is waited for."""
    with pretended_gpu() as gpu:
        yield gpu
