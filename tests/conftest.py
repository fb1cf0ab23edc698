"""Fixtures shared by all tests."""

import ctypes
import fcntl
import gc
import logging
import os
import resource
import runpy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from common.sample import draw_sample
from tests.pretended_gpu import pretended_gpu  # here: when autograd first runs it must know of the device
from tests.pretended_gpu.waits import PretendedGpu

ROOT = Path(__file__).resolve().parent.parent

# Children of this context are forked with everything imported that takes seconds. There is one such list a process.
FORKSERVER = get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        *("detection.train_net", "classification.train", "tests.processes"),
        *("matplotlib.figure", "pandas", "tqdm.contrib.logging"),
    ]
)


class Process:
    """A command line that was started; `end` must follow."""

    def __init__(self, arguments: tuple[str, ...], log: Path, **settings: Any) -> None:
        self.log = log
        self.child = FORKSERVER.Process(target=_run_launcher, args=(arguments, log), kwargs=settings)
        self.child.start()
        self.number = self.child.pid

    def end(self) -> tuple[int, str]:
        """Waits for it; its exit code, -9 being SIGKILL, and what it printed."""
        self.child.join()
        return self.child.exitcode, self.log.read_text()


def _run_launcher(arguments: tuple[str, ...], log: Path, folder: Path, largest_file: int, **variables: str) -> None:
    os.setpgid(0, 0)
    for name in LAUNCHING:
        os.environ.pop(name, None)
    os.environ |= ON_ONE_THREAD | variables
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.seed()  # as another process would have it
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
    os.dup2(1, 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["launch", *arguments]
    runpy.run_module("tools.launch", run_name="__main__")


def end_well(processes: Iterable[Process]) -> None:
    """Waits for processes that work together; each must end with 0."""
    outcomes = [process.end() for process in processes]
    assert all(code == 0 for code, _ in outcomes), "\n\n".join(f"exit code {code}\n{said}" for code, said in outcomes)


class ForkServer:
    """Runs `python -m tools.launch MODULE ...`, each time in a process of its own and without the time of imports.

    Args:
        folder: for what the processes print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def start(self, *arguments: str, folder: Path = ROOT, largest_file: int = 0, **variables: str) -> Process:
        """Starts one, in a process group of its own.

        Args:
            arguments: the module and its command line.
            folder: where it runs.
            largest_file: bytes that it may write to a file, as on a disk that is almost full; 0 is no limit.
            variables: of the environment, besides `environment`.
        """
        self.count += 1
        log = self.folder / f"{self.count}.txt"
        return Process(arguments, log, folder=folder, largest_file=largest_file, **variables)

    def __call__(self, *arguments: str, **settings: Any) -> tuple[int, str]:
        """Runs one from start to end."""
        return self.start(*arguments, **settings).end()


LAUNCHING = ("NGPU", "NNODES", "DEBUG")
ON_ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def environment(**variables: str) -> dict[str, str]:
    """The variables of a process on one thread, without those that say how a run is launched."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHING}
    return {**inherited, **ON_ONE_THREAD, **variables}


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    return ForkServer(tmp_path_factory.mktemp("printed"))


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


@pytest.fixture(scope="session", autouse=True)
def excepthook_of_pytest() -> Callable:
    """It warns of errors in threads."""
    return threading.excepthook


@pytest.fixture(autouse=True)
def logging_at_its_defaults(excepthook_of_pytest: Callable) -> None:
    """Undoes what earlier tests called here have done to logging: `RunLog`, and OpenVINO where a conversion fails."""
    for name in ("classification", "common", "detection", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.propagate, logger.handlers = True, []
    logging.root.setLevel(logging.WARNING)
    logging.root.filters = []
    logging.disable(logging.NOTSET)
    logging.raiseExceptions = True
    threading.excepthook = excepthook_of_pytest


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
