"""A pretended GPU: what a program does on "cuda", with real values, on a machine that has none.

Inside `pretended_gpu()` PyTorch says that there is a GPU. A tensor that is moved there belongs to a device that torch
keeps for backends written in Python; its values lie on the CPU, whose operators compute with them.

    with pretended_gpu() as gpu:
        model, images = model.to("cuda"), images.to("cuda")
        gpu.waits.clear()
        train_one_step(model, images)
        assert not gpu.waits

What CUDA refuses is refused: operators that mix devices, `numpy()` of a tensor on the GPU, a generator of another
device, NCCL with a tensor on the CPU. What makes the program wait until the GPU has caught up is written down: a number
that it asks for, a result whose size depends on values, a copy from or to memory that is not pinned.

It does not know what only CUDA's kernels know (their roundings, limits and speed), streams, or compiled code. Random
numbers come from the CPU's generator, so that they are the same as without a GPU. Several processes, each with its
own GPU, speak through Gloo where they ask for NCCL. With `machine` on its path, before everything else, and
`PRETENDED_GPUS` in its environment, any Python process has such GPUs.
"""

import contextlib
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision  # noqa: F401 - its operators have kernels for autocast, too
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.pretended_gpu.device import BACKEND, GpuGenerator, Names, Operators, Pretended, is_pinned, pin_memory
from tests.pretended_gpu.waits import ACTIVE, PretendedGpu


@contextlib.contextmanager
def pretended_gpu(count: int = 1, bfloat16: bool = True) -> Iterator[PretendedGpu]:
    """A machine with GPUs.

    Args:
        count: how many.
        bfloat16: whether they compute in bfloat16, or only emulate it, like those before Ampere.

    Yields:
        The GPUs, which write down what they are waited for.
    """
    gpu = PretendedGpu(count, bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        answers = _answers(gpu)
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        for name in ("is_available", "device_count", "synchronize", "current_stream", "set_stream"):
            patch.setattr(torch.accelerator, name, answers[name])
        patch.setattr(torch.accelerator, "current_device_index", answers["current_device"])
        patch.setattr(torch.accelerator, "set_device_index", answers["set_device"])
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
        _patch_torch(patch)
        _patch_distributed(patch, gpu)
        ACTIVE.append(gpu)
        try:
            with Names(), Operators():
                yield gpu
        finally:
            ACTIVE.remove(gpu)


class _Stream:
    """The only stream, or an event of it; everything on it has happened already."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None

    def synchronize(self) -> None:
        ACTIVE[-1].wait("synchronize", type(self).__name__)


def _live_bytes(*_: object) -> int:
    """Memory that is taken at this moment (also where the largest is asked for)."""
    storages = [t.value.untyped_storage() for t in gc.get_objects() if type(t) is Pretended]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _answers(gpu: PretendedGpu) -> dict[str, Any]:
    """What `torch.cuda` says, by name."""
    capability = (8, 0) if gpu.bfloat16 else (7, 5)
    memory = 16 * 2**30
    properties = types.SimpleNamespace(
        name="Pretended GPU", major=capability[0], minor=capability[1], total_memory=memory, multi_processor_count=16
    )

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def set_device(device: "torch.device | int | str") -> None:
        gpu.current = gpu.index(device)

    def exchange_device(device: int) -> int:
        before, gpu.current = gpu.current, gpu.index(device) if device >= 0 else gpu.current
        return before

    return {
        **dict.fromkeys(["is_available", "is_initialized"], lambda: True),
        **dict.fromkeys(["_is_in_bad_fork", "is_current_stream_capturing"], lambda: False),
        **dict.fromkeys(["init", "_lazy_init", "empty_cache", "reset_peak_memory_stats"], nothing),
        **dict.fromkeys(["manual_seed", "manual_seed_all", "set_stream"], nothing),
        **dict.fromkeys(["memory_allocated", "max_memory_allocated"], _live_bytes),
        **dict.fromkeys(["Stream", "Event"], _Stream),
        **dict.fromkeys(["_exchange_device", "_maybe_exchange_device"], exchange_device),
        "stream": contextlib.nullcontext,
        "current_stream": _Stream,
        "device_count": lambda: gpu.count,
        "current_device": lambda: gpu.current,
        "set_device": set_device,
        "get_device_name": lambda device=None: f"{properties.name} {gpu.index(device)}",
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: gpu.bfloat16 or including_emulation,
        "mem_get_info": lambda device=None: (memory - _live_bytes(), memory),
        "synchronize": lambda device=None: gpu.wait("synchronize", "synchronize"),
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
    }


def _patch_torch(patch: pytest.MonkeyPatch) -> None:
    """What neither mode sees: classes, functions that know devices by their names, other threads, files."""
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        patch.setattr(torch, name, _renaming(getattr(torch, name)))
    enter = torch.autocast.__init__
    patch.setattr(
        torch.autocast,
        "__init__",
        lambda self, device_type, *args, **kwargs: enter(
            self, BACKEND if device_type == "cuda" else device_type, *args, **kwargs
        ),
    )
    patch.setattr(torch, "Generator", GpuGenerator)
    patch.setattr(Tensor, "pin_memory", pin_memory)
    patch.setattr(Tensor, "is_pinned", is_pinned)
    for module in (sys.modules["torch.optim.optimizer"], torch.utils._foreach_utils):
        patch.setattr(module, "_foreach_supported_types", [*module._foreach_supported_types, Pretended])
    load = torch.load
    patch.setattr(torch, "load", lambda *args, **kwargs: tree_map_only(Tensor, _restored, load(*args, **kwargs)))
    run = threading.Thread.run

    def run_on_gpu(thread: threading.Thread) -> None:
        with Names(), Operators():
            run(thread)

    patch.setattr(threading.Thread, "run", run_on_gpu)
    apply = torch.nn.Module._apply

    def apply_swapping(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as on CUDA
        try:
            return apply(module, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    patch.setattr(torch.nn.Module, "_apply", apply_swapping)


def _renaming(function: Callable) -> Callable:
    """A function of torch that is given the type of a device, or none for cuda."""

    def renamed(device_type: str = "cuda", *args: Any, **kwargs: Any) -> Any:
        return function(BACKEND if device_type == "cuda" else device_type, *args, **kwargs)

    return renamed


def _location(storage: torch.UntypedStorage) -> str | None:
    number = getattr(storage, "gpu", None)
    return None if number is None else f"cuda:{number}"


def _restore(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    if not ACTIVE or not location.startswith("cuda"):
        return None
    storage.gpu = ACTIVE[-1].index(location)
    ACTIVE[-1].wait("copy to the GPU", "load")
    return storage


def _restored(tensor: Tensor) -> Tensor:
    """A loaded tensor, on the GPU if its storage is."""
    number = None if isinstance(tensor, Pretended) else getattr(tensor.untyped_storage(), "gpu", None)
    if number is None:
        return tensor
    moved = Pretended(tensor.detach(), number)
    return torch.nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else moved


torch.serialization.register_package(5, _location, _restore)


def _patch_distributed(patch: pytest.MonkeyPatch, gpu: PretendedGpu) -> None:
    """Gloo in the place of NCCL, which still has its name and refuses what lies on the CPU."""
    real = types.SimpleNamespace(**vars(c10d))

    def is_nccl(group: dist.ProcessGroup | None) -> bool:
        return (group or dist.group.WORLD).group_name in gpu.nccl

    def init_process_group(backend: str | None = None, *args: Any, device_id: object = None, **kwargs: Any) -> None:
        real.init_process_group("gloo", *args, **kwargs)
        if backend == "nccl":
            gpu.nccl.add(dist.group.WORLD.group_name)

    def new_group(ranks=None, timeout=None, backend: str | None = None, **kwargs: Any) -> dist.ProcessGroup:
        group = real.new_group(ranks, timeout, "gloo", **kwargs)
        if backend == "nccl" or (backend is None and is_nccl(None)):
            gpu.nccl.add(group.group_name)
        return group

    def barrier(group=None, async_op: bool = False, device_ids: object = None) -> dist.Work | None:
        return real.barrier(group, async_op)

    def get_backend(group=None) -> str:
        return "nccl" if is_nccl(group) else real.get_backend(group)

    for name, replacement in list(locals().items()):
        if hasattr(real, name):
            patch.setattr(c10d, name, replacement)
            patch.setattr(dist, name, replacement)
    patch.setattr(
        c10d,
        "_get_object_coll_device",
        lambda group=None: "cuda" if is_nccl(group) else real._get_object_coll_device(group),
    )


LOWERED = {
    *("_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "convolution"),
    *("conv_transpose3d", "cudnn_convolution", "cudnn_convolution_transpose", "prelu", "addmm", "addmv", "addr", "mm"),
    *("matmul", "einsum", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "lstm_cell"),
    *("linalg_multi_dot", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "gru_cell", "rnn_tanh_cell", "_cudnn_rnn"),
    *("rnn_relu_cell", "_scaled_dot_product_flash_attention", "scaled_dot_product_attention"),
}
PROMOTED = {
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot"),
    "scatter_add",
}
AUTOCAST = torch._C.DispatchKey.AutocastPrivateUse1
_LIBRARIES = [torch.library.Library("_", "IMPL")]  # its kernels live as long as it does


def _autocast(name: str) -> Callable:
    """An operator as it is under autocast on CUDA: in the lower precision, in float32, or in the widest of its inputs.

    PyTorch has these kernels for its own devices only.
    """
    namespace, _, short = name.partition("::")
    short, _, overload = short.partition(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), short), overload or "default")

    def eligible(tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype != torch.float64

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(AUTOCAST)):
            if short == "binary_cross_entropy":
                raise RuntimeError("binary_cross_entropy and BCELoss are unsafe to autocast")
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Pretended) and eligible(t)]
            low = torch.get_autocast_dtype(BACKEND)
            wide = any(t.dtype == torch.float32 for t in tensors) or short not in LOWERED | PROMOTED
            dtype = torch.float32 if wide and short not in LOWERED else low
            cast = tree_map_only(Pretended, lambda t: t.to(dtype) if eligible(t) else t, (args, kwargs))
            out = operator(*cast[0], **cast[1])
            if namespace == "torchvision" and tensors and eligible(out):
                return out.to(tensors[0].dtype)
            return out

    return kernel


def _register_autocast() -> None:
    _LIBRARIES[0].fallback(torch.library.fallthrough_kernel, AUTOCAST.name)
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        _LIBRARIES.append(torch.library.Library(name.partition("::")[0], "IMPL"))
        _LIBRARIES[-1].impl(name, _autocast(name), AUTOCAST.name)


_register_autocast()
