"""The device of the pretended GPU: its tensors, what it refuses, and which operators are waited for."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from tests.pretended_gpu.waits import ACTIVE, PretendedGpu

BACKEND = "pretended"  # the device's name inside torch; programs see "cuda"

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
# Operators whose result is a number on the host, or has a size that the host must know.
NUMBERS = {"_local_scalar_dense", "equal"}
SIZES = {
    *("nonzero", "masked_select", "bincount", "multinomial", "nms"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
PRODUCTS = {"convolution", "convolution_backward", "addmm", "mm", "bmm"}
COPIES = {"_to_copy", "copy_"}
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
FILLS = {"fill", "fill_", "masked_fill", "masked_fill_"}  # the host reads their value


class Pretended(Tensor):
    """A tensor on the pretended GPU `number`; its values are those of `value`, on the CPU."""

    value: Tensor
    number: int
    device = property(lambda self: torch.device("cuda", self.number))
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl  # a result on the CPU is no Pretended

    @staticmethod
    def __new__(cls, value: Tensor, number: int) -> "Pretended":
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        layout |= {"storage_size": 2**48, "device": torch.device(BACKEND, 0)}  # there is room for `resize_`
        with torch.inference_mode(value.is_inference()):  # a view of a parameter is none in inference mode either
            self = Tensor._make_wrapper_subclass(cls, value.size(), **layout)
        self.value, self.number = value, number
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def get_device(self) -> int:
        return self.number

    def tolist(self) -> list:
        return self.detach().cpu().tolist()

    def numpy(self, **options: Any) -> np.ndarray:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self.numpy()

    def __repr__(self, **options: Any) -> str:
        return f"{self.detach().cpu()!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict) -> "Pretended":
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied.__dict__.update({"_is_param": True} if isinstance(self, torch.nn.Parameter) else {})
            copied.grad = None if self.grad is None else self.grad.clone()
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple:
        for gpu in ACTIVE[-1:]:
            gpu.wait("copy to the host", "save")
        self.value.untyped_storage().gpu = self.number  # `torch.save` asks the storage where it lies
        if isinstance(self, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, {})
        return self.value.__reduce_ex__(protocol)


def _operands(func, args: tuple, kwargs: dict) -> Iterator[tuple[Any, Tensor]]:
    """The tensors that an operator is given, each with the argument of the schema that it belongs to."""
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(given, Tensor):
            yield argument, given
        elif isinstance(given, (list, tuple)):
            yield from ((argument, tensor) for tensor in given if isinstance(tensor, Tensor))


def _run(func, args: tuple, kwargs: dict) -> Any:
    """Runs an operator on the values of its arguments, once CUDA's rules are kept and its waits are written down."""
    if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
        with Operators():  # autograd, which takes composite operators apart, is passed by
            return func._op_dk(COMPOSITE, *args, **kwargs)
    name = func._schema.name.split("::")[1]
    operands = list(_operands(func, args, kwargs))
    pretended = [tensor for _, tensor in operands if isinstance(tensor, Pretended)]
    device = kwargs.get("device")
    to_gpu, to_host = (device is not None and device.type == kind for kind in (BACKEND, "cpu"))
    plain_args, plain = tree_map_only(Pretended, lambda tensor: tensor.value, (args, kwargs))
    pin = plain.pop("pin_memory", False)
    if not pretended and not to_gpu:
        _refuse_nccl(func, args, operands)
        out = func(*args, **plain)
        return pinned(out) if pin else out
    gpu = ACTIVE[-1] if ACTIVE else PretendedGpu(1 + max(tensor.number for tensor in pretended), bfloat16=True)
    home = pretended[0].number if pretended else gpu.current
    number = device.index - 1 if to_gpu and device.index else home
    if name in COPIES:
        _copy_waits(gpu, name, args, kwargs)
    elif pretended:
        _refuse_mixed(gpu, func, name, operands)
        _operator_waits(gpu, func, name, args, kwargs, operands)

    if to_gpu:
        plain["device"] = torch.device("cpu")
    if name in PRODUCTS and args[0].dtype == torch.float16:  # slow on CPUs; and a GPU, too, adds up in float32
        wide = tree_map_only(Tensor, Tensor.float, plain_args)
        out = tree_map_only(Tensor, Tensor.half, func(*wide, **plain))
    else:
        out = func(*plain_args, **plain)
    if to_host:
        return pinned(out) if pin or kwargs.get("non_blocking") else out
    if name == "copy_":
        return args[0]
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():  # the wrapper's own sizes and strides
            return args[0].as_strided_(out.size(), out.stride(), out.storage_offset())
    wrappers = {id(tensor.value): tensor for tensor in pretended}  # what works in place returns its argument
    if func.namespace == "c10d":
        for tensor in pretended:  # what C++ finds in the future of Gloo's work are the values
            tensor.value.untyped_storage().gpu = number
    return tree_map_only(
        Tensor, lambda tensor: wrappers[id(tensor)] if id(tensor) in wrappers else Pretended(tensor, number), out
    )


def _copy_waits(gpu: PretendedGpu, name: str, args: tuple, kwargs: dict) -> None:
    """A copy between host and GPU is waited for, unless it says `non_blocking` and the host's memory is pinned."""
    source = args[1] if name == "copy_" else args[0]
    if name == "copy_":
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        ends_on_gpu, host = isinstance(args[0], Pretended), args[0]
    else:
        non_blocking = kwargs.get("non_blocking", False)
        ends_on_gpu = kwargs["device"].type == BACKEND if kwargs.get("device") else isinstance(source, Pretended)
        host = None  # a new tensor, which is pinned if the copy doesn't block
    starts_on_host = not isinstance(source, Pretended) and not hasattr(source.untyped_storage(), "gpu")
    if ends_on_gpu and starts_on_host and not (non_blocking and is_pinned(source)):
        gpu.wait("copy to the GPU", name)
    if not ends_on_gpu and not (non_blocking and (host is None or is_pinned(host))):
        gpu.wait("copy to the host", name)


def _refuse_mixed(gpu: PretendedGpu, func, name: str, operands: list[tuple[Any, Tensor]]) -> None:
    """Raises what CUDA raises for tensors of several devices; the few that it copies by itself are waits."""

    def refuse(first: str, second: str) -> None:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} found at least two, {first} and {second}!"
        )

    homes = sorted({f"cuda:{tensor.number}" for _, tensor in operands if isinstance(tensor, Pretended)})
    if len(homes) > 1:
        refuse(homes[0], homes[1])
    scalars = 0
    for argument, tensor in operands:
        if isinstance(tensor, Pretended):
            continue
        scalar = tensor.dim() == 0 and not (argument.alias_info and argument.alias_info.is_write)
        if name in INDEXING and argument.name == "indices" and isinstance(operands[0][1], Pretended):
            gpu.wait("copy to the GPU", f"{name} by an index on the CPU")
        elif name in INDEXING and argument.name == "values" and scalar:
            if not _is_masked_fill(operands):
                gpu.wait("copy to the GPU", f"{name} of a scalar on the CPU")
        elif name == "where" and scalar:
            gpu.wait("copy to the GPU", "where with a scalar on the CPU")
        elif name in FILLS and argument.name == "value" and scalar:
            continue
        elif scalar and not scalars and (torch.Tag.pointwise in func.tags or name.startswith("_foreach_")):
            scalars += 1  # one is allowed
        else:
            refuse(homes[0], f"cpu ({argument.name} of shape {list(tensor.shape)})")


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _is_masked_fill(operands: list[tuple[Any, Tensor]]) -> bool:
    """Whether CUDA does `x[mask] = number` without looking for the places where the mask is true."""
    indices = [tensor for argument, tensor in operands if argument.name == "indices"]
    value = next((tensor for argument, tensor in operands if argument.name == "values"), None)
    if value is None or isinstance(value, Pretended) or value.numel() != 1 or len(indices) != 1:
        return False
    return isinstance(indices[0], Pretended) and _is_mask(indices[0])


def _operator_waits(gpu: PretendedGpu, func, name: str, args: tuple, kwargs: dict, operands: list) -> None:
    """Writes down what an operator of the GPU makes the host wait for."""
    arguments = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if name in NUMBERS:
        gpu.wait("number", name)
    elif name in SIZES or (name == "repeat_interleave" and arguments.get("output_size") is None):
        gpu.wait("size", name)
    elif name.startswith("masked_fill") and isinstance(arguments["value"], Pretended):
        gpu.wait("number", name)
    elif name in INDEXING and (arguments.get("accumulate") or not _is_masked_fill(operands)):
        for index in arguments["indices"]:
            if isinstance(index, Pretended) and _is_mask(index):
                gpu.wait("size", f"{name} by a mask")


def pinned(tensor: Tensor) -> Tensor:
    """Marks the memory of a tensor on the CPU as pinned."""
    tensor.untyped_storage().pinned = True
    return tensor


def is_pinned(tensor: Tensor, device: object = None) -> bool:
    """`Tensor.is_pinned`."""
    return not isinstance(tensor, Pretended) and getattr(tensor.untyped_storage(), "pinned", False)


def pin_memory(tensor: Tensor, device: object = None) -> Tensor:
    """`Tensor.pin_memory`."""
    if isinstance(tensor, Pretended):
        raise RuntimeError(f"cannot pin a tensor on {tensor.device}: only dense CPU tensors can be pinned")
    return tensor if is_pinned(tensor) else pinned(tensor.clone())


_Generator = torch.Generator


class GpuGenerator(_Generator):
    """Takes the place of `torch.Generator`: one for the GPU is an instance of this class."""

    device = property(lambda self: torch.device("cuda", 0))

    def __new__(cls, device: "torch.device | str" = "cpu") -> torch.Generator:
        return _Generator() if torch.device(device).type == "cpu" else super().__new__(cls)


class Names(TorchFunctionMode):
    """What a program asks of cuda is asked of the pretended device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tuple(map(_renamed, args)), {name: _renamed(value) for name, value in (kwargs or {}).items()}
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            return _tensor(func, args, kwargs)
        if func is Tensor.cuda:
            func, args = Tensor.to, (first, _gpu(kwargs.pop("device", None) if len(args) < 2 else args[1]), *args[2:])
        if func is Tensor.to and len(args) > 1 and type(args[1]) is int:
            args = (first, _gpu(args[1]), *args[2:])
        generator = kwargs.get("generator")
        if generator is not None:
            on_gpu = isinstance(first, Pretended) or getattr(kwargs.get("device"), "type", "") == BACKEND
            if on_gpu != isinstance(generator, GpuGenerator):
                raise RuntimeError(f"Expected a generator of the tensor's device but found '{generator.device}'")
        if isinstance(first, Pretended):
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (first, tree_map(_index, args[1], is_leaf=lambda index: isinstance(index, list)), *args[2:])
            if func is Tensor.__setitem__ and isinstance(args[2], (bool, int, float)):
                args = (*args[:2], torch.tensor(args[2], dtype=first.dtype))  # on the CPU, as CUDA does
            if func is Tensor.data.__set__ and isinstance(args[1], Pretended):
                first.value, first.number = args[1].value, args[1].number
            if func is Tensor.record_stream:
                return None
        return func(*args, **kwargs)


def _gpu(device: "torch.device | int | str | None") -> torch.device:
    """How torch knows a GPU: from 1 on, because 0, that of all tensors there, may come back from its own code."""
    return torch.device(BACKEND, 1 + ACTIVE[-1].index(device))


def _renamed(value: Any) -> Any:
    """The pretended device for "cuda" in whatever form; everything else as it is."""
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return _gpu(value)
    return _gpu(value) if isinstance(value, torch.device) and value.type == "cuda" else value


def _index(index: object) -> object:
    return torch.as_tensor(index) if isinstance(index, (list, np.ndarray)) else index


def _tensor(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """`torch.tensor` and the like, which would fill the GPU's memory themselves: made on the CPU, then copied."""
    if func is Tensor.new_tensor:
        func, kwargs = torch.tensor, {"dtype": args[0].dtype, "device": _renamed(args[0].device)} | kwargs
        args = args[1:]
    data, device = args[0], kwargs.pop("device", None)
    if isinstance(data, Pretended):
        data = data.detach().clone() if func is torch.tensor else data
        return data.to(device or _renamed(data.device), kwargs.get("dtype"))
    if isinstance(data, (list, tuple)):
        data = tree_map_only(Pretended, Tensor.item, data)  # the GPU's scalars in a list are read one by one
    if device is None or torch.device(device).type != BACKEND:
        return func(data, *args[1:], device=device, **kwargs)
    requires_grad = kwargs.pop("requires_grad", False)
    return func(data, *args[1:], **kwargs).to(device).requires_grad_(requires_grad)


class Operators(TorchDispatchMode):
    """Sees also the operators that have no tensor on the GPU yet: those that make one, or copy one there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _refuse_nccl(func, args: tuple, operands: list[tuple[Any, Tensor]]) -> None:
    """NCCL has no collective for tensors on the CPU."""
    if ACTIVE and ACTIVE[-1].nccl and func.namespace == "c10d" and operands and "barrier" not in func._schema.name:
        groups = [dist.ProcessGroup.unbox(arg) for arg in args if "ProcessGroup" in str(getattr(arg, "_type", str)())]
        if any(group.group_name in ACTIVE[-1].nccl for group in groups):
            raise RuntimeError(f"No backend type associated with device type cpu ({func._schema.name})")


class _Backend(_DummyBackendModule):
    def is_available(self) -> bool:
        return bool(ACTIVE)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return bool(ACTIVE)


_setup_privateuseone_for_python_backend(BACKEND, backend_module=_Backend(), hook=_Hook())
