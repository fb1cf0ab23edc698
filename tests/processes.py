"""Functions of a test in several processes that train together, each forked with everything imported."""

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any

import torch

from common.processes import join_processes, leave_processes
from tests.pretended_gpu import pretended_gpu


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(processes: int, function: Callable, *arguments: Any, has_gpus: bool = False) -> list:
    """What a function of a module returns in each of so many processes on one thread, as the launcher joins them.

    Each has a pretended GPU where `has_gpus` says so.
    """
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": free_port()}
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)] if processes > 1 else [{}]
        started = [
            pool.submit(_child, {**shared, **rank} if rank else {}, function, arguments, has_gpus) for rank in ranks
        ]
        return [child.result() for child in started]


def _child(environment: dict[str, Any], function: Callable, arguments: tuple, has_gpus: bool) -> Any:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these functions train on the CPU
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    with pretended_gpu(int(environment["WORLD_SIZE"])) if has_gpus else nullcontext():
        join_processes()
        try:
            return function(*arguments)
        finally:
            leave_processes()
