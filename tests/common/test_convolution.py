"""Convolutions with weight gradients in plain memory: values, and which convolutions they are."""

import pytest
import torch
from torch import nn

from common import runtime
from common.convolution import PlainWeightGradients

CHANNELS_LAST = torch.channels_last
OURS = "_ConvolutionBackward"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        (3, {"padding": 1}),
        (3, {"padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)}),
        (7, {"stride": 2, "groups": 2}),
    ],
)
def test_values_and_gradients_are_those_of_double_precision(kernel, settings, bias):
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, kernel, bias=bias, **settings).to(memory_format=CHANNELS_LAST)
    image = torch.randn(2, 4, 11, 13).contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    with PlainWeightGradients():
        output = convolution(image)
    assert output.grad_fn.name() == OURS
    factors = torch.randn_like(output)
    output.backward(factors)

    exact = nn.Conv2d(4, 6, kernel, bias=bias, **settings).double()
    exact.load_state_dict(convolution.state_dict())
    exact_image = image.detach().double().requires_grad_()
    expected = exact(exact_image)
    expected.backward(factors.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image.grad.double(), exact_image.grad, rtol=1e-5, atol=1e-5)
    for parameter, wanted in zip(convolution.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=1e-5, atol=1e-4)
        assert parameter.grad.stride() == parameter.stride()


def test_only_what_is_asked_for_gets_a_gradient():
    convolution = nn.Conv2d(3, 5, 3).to(memory_format=CHANNELS_LAST)
    convolution.bias.requires_grad_(False)
    image = torch.randn(1, 3, 8, 8)
    with PlainWeightGradients():
        convolution(image).sum().backward()
    assert convolution.weight.grad is not None
    assert convolution.bias.grad is None
    assert image.grad is None


def test_other_convolutions_are_left_alone():
    image = torch.randn(1, 4, 8, 8, requires_grad=True)
    pointwise, depthwise, plain = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)
    wide = nn.Conv2d(4, 4, 3).to(memory_format=CHANNELS_LAST)
    same = nn.Conv2d(4, 4, 3, padding="same").to(memory_format=CHANNELS_LAST)
    with PlainWeightGradients():
        for module in (
            pointwise.to(memory_format=CHANNELS_LAST),
            depthwise.to(memory_format=CHANNELS_LAST),
            plain,
            same,
        ):
            assert module(image).grad_fn.name() != OURS
        assert wide(image).grad_fn.name() == OURS
        assert wide(image[0]).shape == (4, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            output = wide(image)
            assert output.dtype == torch.bfloat16 and output.grad_fn.name() != OURS
        output.float().sum().backward()
        wide.weight.requires_grad_(False)
        assert wide(image).grad_fn.name() != OURS
        with torch.no_grad():
            assert wide.requires_grad_()(image).grad_fn is None
    assert wide(image).grad_fn.name() != OURS


@pytest.mark.parametrize(
    ("capabilities", "precision", "expected"),
    [
        ({"avx2": True, "avx512_f": False}, "auto", True),
        ({"avx2": True, "avx512_f": True}, "float32", False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, "auto", False),
        ({"avx2": True, "avx512_f": False}, "bfloat16", False),
        ({}, "auto", False),
    ],
)
def test_the_processor_decides(monkeypatch, capabilities, precision, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    wide = nn.Conv2d(3, 4, 3).to(memory_format=CHANNELS_LAST)
    with runtime.autocast(torch.device("cpu"), precision):
        assert (wide(torch.ones(1, 3, 8, 8)).grad_fn.name() == OURS) == expected
