"""What the machine can do: its device, its cores, and the precision in which it is fast."""

import ctypes
import functools
import itertools
import logging
import os
import re
import sys
import threading
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn

from common.convolution import PlainWeightGradients
from common.errors import UserError
from common.threads import INTERVAL, TRAINING_INTERVAL, LoadWatch

logger = logging.getLogger(__name__)

_settling = threading.Lock()
# Convolutions in float16 give NaN on these: github.com/pytorch/pytorch/issues/77955.
NAN_IN_HALF = re.compile(r"\b(GTX 16[356]0|T(400|500|550|600|1000|1200|2000))\b")
_of_all_machines = ""  # the precision of GPUs that train together on several
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_device() -> str:
    """The device that a model runs on here: `cuda` or `cpu`; logs why a GPU cannot be used."""
    return "cuda" if gpu_count() else "cpu"


def gpu_count() -> int:
    """How many GPUs can be used here; torch itself also counts those that its driver or its build cannot run on."""
    if not torch.cuda.is_available():
        _warn_of_old_driver()
        return 0
    # They are used by the numbers 0, 1, ..., so that none behind one that cannot be used counts.
    return len(list(itertools.takewhile(_is_supported, range(torch.cuda.device_count()))))


def visible_gpus() -> list[str]:
    """The GPUs that can be used here, each as `CUDA_VISIBLE_DEVICES` names it."""
    count = gpu_count()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


@functools.cache  # it warns once a process
def _is_supported(gpu: int) -> bool:
    """Whether PyTorch is built for this GPU's compute capability or an older one."""
    built_for = [int(name[1]) for name in map(re.compile(r"sm_(\d+)").match, torch.cuda.get_arch_list()) if name]
    major, minor = torch.cuda.get_device_capability(gpu)
    oldest = min(built_for, default=0)
    if 10 * major + minor >= oldest:
        return True
    logger.warning(
        "%s has compute capability %d.%d and PyTorch is built for %.1f and later: it cannot be used. Install a PyTorch "
        "and torchvision for an earlier CUDA, such as 12.6, or leave it out: CUDA_VISIBLE_DEVICES",
        *(torch.cuda.get_device_name(gpu), major, minor, oldest / 10),
    )
    return False


@functools.cache  # once a process
def _warn_of_old_driver() -> None:
    """Warns if the driver is too old for PyTorch's CUDA; a driver runs every CUDA of its own major version."""
    if torch.version.cuda is None:
        return
    driver = _driver_version()
    if 0 < driver // 1000 < int(torch.version.cuda.partition(".")[0]):
        logger.warning(
            "The NVIDIA driver knows CUDA %d.%d and PyTorch is built for CUDA %s: the GPU cannot be used, everything "
            "runs on the CPU. Update the driver, or install a PyTorch for CUDA %d",
            *(driver // 1000, driver % 1000 // 10, torch.version.cuda, driver // 1000),
        )


def _driver_version() -> int:
    """The version of CUDA that the NVIDIA driver knows, such as 12040; 0 without a driver."""
    version = ctypes.c_int()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuDriverGetVersion(
            ctypes.byref(version)
        )
    return version.value


def to_device(values: Sequence, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on a device, copied asynchronously."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def fastest_precision(device: torch.device) -> str:
    """The type in which a device multiplies matrices fastest: `bfloat16`, `float16` or `float32`.

    GPUs have bfloat16 in hardware from compute capability 8.0 on, float16 from 7.0 on (V100, T4, RTX 20). Those that
    train together, which may be unlike, all take what the oldest of them has.
    """
    if device.type == "cuda" and _of_all_machines:
        return _of_all_machines
    if device.type == "cuda":
        together = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        gpus = [torch.device("cuda", number) for number in range(together)] if together > 1 else [device]
        oldest = min(map(torch.cuda.get_device_capability, gpus))
        if oldest >= (8, 0):
            return "bfloat16"
        is_sound = not any(NAN_IN_HALF.search(torch.cuda.get_device_name(gpu)) for gpu in gpus)
        return "float16" if oldest >= (7, 0) and is_sound else "float32"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"


def compute_alike(precisions: Collection[str]) -> None:
    """Makes the GPUs of this machine take the least capable precision among those of all machines."""
    global _of_all_machines
    _of_all_machines = max(precisions, key=list(PRECISIONS).index)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type that a network computes in.

    Args:
        precision: one of `PRECISIONS`, or `auto`: the fastest on the device.
        device: of the network.

    Raises:
        UserError: it is none of them.
    """
    if precision not in ("auto", *PRECISIONS):
        raise UserError(f"MODEL.PRECISION {precision}: expected one of auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[fastest_precision(device) if precision == "auto" else precision]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which a network runs: reduced precision where its operators allow it, or float32."""
    dtype = resolve_precision(precision, device)
    if dtype != torch.float32:
        return torch.autocast(device.type, dtype)
    capabilities = torch.cpu.get_capabilities()
    is_slow = device.type == "cpu" and capabilities.get("avx2") and not capabilities.get("avx512_f")
    return PlainWeightGradients() if is_slow and torch.is_grad_enabled() else nullcontext()


def gradient_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss where gradients would vanish in float16; with other types it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=resolve_precision(precision, device) == torch.float16)


def leave_cores(model: nn.Module) -> None:
    """Makes a network on the CPU compute only on the cores that other processes leave free.

    Before the network runs, at most twice a second, the load of the cores is read; in training every five seconds. The
    network never takes more threads than torch had before the first such network, which may be fewer than the cores:
    with hyperthreads, or by the user's choice. If the user or a launcher has set `OMP_NUM_THREADS`, that stays the
    number of threads.
    """
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return
    most, watch = most_threads(), LoadWatch()
    threads = {True: most, False: most}  # in training and in prediction: what passes during one is not the other's

    def settle(module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or next(module.parameters()).is_cuda:
            return
        left = watch.cores_left(TRAINING_INTERVAL if module.training else INTERVAL)
        if left is not None:
            threads[module.training] = min(left, most)
        if threads[module.training] != torch.get_num_threads():
            torch.set_num_threads(threads[module.training])
            if module.training and threads[True] < most:
                _tell_of_other_work(most)

    model.register_forward_pre_hook(settle)


@functools.cache  # once a process, since other work comes and goes
def _tell_of_other_work(most: int) -> None:
    logger.info(
        "Other processes work on these cores: trained with as many of the %d threads as they leave free. The number of "
        "threads changes the last digits; OMP_NUM_THREADS=%d keeps it",
        *(most, most),
    )


@functools.cache  # once a process: later a network may have made room already
def most_threads() -> int:
    """Threads that torch has where no other process wants the cores."""
    return torch.get_num_threads()


def compute_alone() -> None:
    """Makes the thread that calls this compute without others; of a pool beside a network, say.

    `torch.set_num_threads` also sets what later threads begin with; another thread restores that.
    """
    with _settling:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        restoring = threading.Thread(target=torch.set_num_threads, args=(threads,))
        restoring.start()
        restoring.join()


def keep_freed_memory() -> None:
    """Makes glibc keep large blocks instead of handing them back to the system at every free.

    Faulting their pages in again costs a tenth of a training step on a CPU (M_TRIM_THRESHOLD, M_MMAP_MAX).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-4, 0)
