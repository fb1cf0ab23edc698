"""Convolutions in channels-last memory that learn quickly on a CPU without AVX-512.

On such a CPU oneDNN takes up to four times as long for the weight gradient of a wide kernel from channels-last tensors
as from contiguous (NCHW) ones; everything else is about as fast or faster. docs/log.md has the figures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class PlainWeightGradients(TorchFunctionMode):
    """A context in which channels-last convolutions compute the gradient of their weights in plain memory.

    Values are those of `torch.nn.functional.conv2d` up to rounding. Convolutions whose weights are the same in both
    layouts (1 x 1 and depthwise ones), not trained or under autocast are left alone.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        """Calls `func`, a convolution by way of `_Convolution`."""
        if func is functional.conv2d:
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """As `torch.nn.functional.conv2d`."""
    is_slow = torch.is_grad_enabled() and weight.requires_grad and not weight.is_contiguous()
    is_odd = input.dim() != 4 or torch.is_autocast_enabled(input.device.type)
    if not is_slow or is_odd or isinstance(padding, str):
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _Convolution.apply(input, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


class _Convolution(torch.autograd.Function):
    """A convolution that computes its input gradient in channels-last and its weight gradient in contiguous memory."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.settings, ctx.bias_sizes = settings, None if bias is None else list(bias.shape)
        return functional.conv2d(input, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        rest = (ctx.bias_sizes, stride, padding, dilation, False, [0, 0], groups)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_input = to_weight = to_bias = None
        if needs_input:
            to_input = torch.ops.aten.convolution_backward(gradient, input, weight, *rest, [True, False, False])[0]
        if needs_weight or needs_bias:
            plain = (gradient.contiguous(), input.contiguous(), weight.contiguous())
            _, to_weight, to_bias = torch.ops.aten.convolution_backward(
                *plain, *rest, [False, needs_weight, needs_bias]
            )
        return to_input, to_weight, to_bias, *(None for _ in ctx.settings)
