"""Processes: how many train together, which of them this is, what they share, and how they end.

torch's launcher tells each process who it is: `RANK` of `WORLD_SIZE`, `LOCAL_RANK` of `LOCAL_WORLD_SIZE` here.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from common.errors import Interrupted, UserError
from common.launch import end_with_parent
from common.runtime import compute_alike, default_device, fastest_precision

T = TypeVar("T")
HAS_ENDED = "the first process has ended"


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together, over all machines."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process writes the files and speaks."""
    return rank() == 0


def join_processes() -> None:
    """Joins the processes that the launcher started, over NCCL with GPUs and gloo without; alone it does nothing."""
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if default_device() == "cpu":
        dist.init_process_group("gloo")
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    # As long as gloo waits: the first process may look at every picture meanwhile.
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=30))
    if not is_main_process():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler does not run while NCCL waits
    if world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        precisions = [""] * world_size()
        dist.all_gather_object(precisions, fastest_precision(device))
        compute_alike(precisions)


def leave_processes() -> None:
    """Undoes `join_processes` where all have done their work; after an error NCCL would wait for the others here."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_main_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function that reads or writes files in the main process and hands its result to all.

    Raises:
        UserError: the function raised it; every process does.
    """
    if not dist.is_initialized():
        return function(*arguments)
    outcome: list = [None]
    if is_main_process():
        try:
            outcome = [function(*arguments)]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def share_buffers(model: nn.Module) -> None:
    """Gives every process the buffers of the first, in place.

    BatchNorm's statistics differ between processes, and those of the first are saved: so it must be measured with them.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def no_sync_before_last(model: Callable[..., Any], is_last: bool) -> AbstractContextManager:
    """The context of one part of an accumulated batch: gradients are exchanged with the last part alone.

    Args:
        model: in `DistributedDataParallel`, where several processes train; compiled or not.
        is_last: whether this part is.
    """
    no_sync = getattr(model, "no_sync", None)
    return nullcontext() if no_sync is None or is_last else no_sync()


# For `subprocess.Popen`: Linux alone knows how, and Windows refuses the argument.
ENDS_WITH_PARENT: dict[str, Any] = {"preexec_fn": end_with_parent} if sys.platform == "linux" else {}


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Lets a loop end between two of its steps: inside the block Ctrl-C only sets an event.

    A second Ctrl-C interrupts at once. Among several processes the first alone decides, since it writes the checkpoint:
    the others go on until it has ended. At a second Ctrl-C the launcher ends them all.

    Raises:
        Interrupted: another process than the first lost the others after Ctrl-C.
    """
    pressed = threading.Event()
    alone = world_size() == 1

    def on_signal(number: int, frame: object) -> None:
        if pressed.is_set() and alone:
            raise Interrupted
        if not pressed.is_set() and is_main_process():
            print("\nStopping after this step, with a checkpoint, Ctrl-C again ends at once", file=sys.stderr)
        pressed.set()

    left = threading.Event()
    if dist.is_initialized() and not is_main_process():
        threading.Thread(target=_end_after_first, args=(left,), daemon=True).start()
    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield pressed
    except RuntimeError as error:
        if pressed.is_set() and not is_main_process():
            raise Interrupted from error
        raise
    finally:
        # The launcher's own may come when this process is about to end.
        signal.signal(signal.SIGINT, signal.SIG_IGN if pressed.is_set() and not alone else before)
        left.set()
        if pressed.is_set() and dist.is_initialized() and is_main_process():
            _store_of_launcher().set(HAS_ENDED, "")


def _end_after_first(left: threading.Event) -> None:
    """Ends this process once the first has saved after Ctrl-C, for which it would wait in NCCL until it is killed."""
    with suppress(dist.DistError):  # a store in the first process ends with it
        store = _store_of_launcher()
        while not left.wait(1):
            if store.check([HAS_ENDED]):
                if os.environ.get("LOCAL_RANK", "0") == "0":  # on another machine
                    print("interrupted: the first process was, and has saved a checkpoint", file=sys.stderr)
                os._exit(130)


def _store_of_launcher() -> dist.TCPStore:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def ignore_interrupt() -> None:
    """Leaves Ctrl-C to the process that waits for this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
