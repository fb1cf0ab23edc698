"""The averaged weights against a plain loop, and the best of a training against sequences written by hand."""

import math

import pytest
import torch
from torch import nn

from common.averaging import Best, WeightAverage, horizon_scaled


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def step(model: nn.Module, iteration: int) -> None:
    """Moves all weights, and BatchNorm's statistics, somewhere that depends on the iteration alone."""
    generator = torch.Generator().manual_seed(iteration)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model(torch.randn(2, 3, 6, 6, generator=generator))


def train(model: nn.Module, averaging: WeightAverage, start: int, end: int) -> None:
    for iteration in range(start, end):
        step(model, iteration)
        averaging.update(model, iteration)


def test_weight_averaging_is_the_plain_loop() -> None:
    model, plain = network(), network()
    averaging = WeightAverage(model, 0.8)
    train(model, averaging, 0, 40)
    expected = {name: value.double().clone() for name, value in plain.state_dict().items()}
    for iteration in range(40):
        step(plain, iteration)
        decay = min(0.8, (1 + iteration) / (10 + iteration))
        for name, value in plain.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in averaging.module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == 40
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_averaging_goes_on_after_a_restart() -> None:
    model = network()
    averaging = WeightAverage(model, 0.9)
    train(model, averaging, 0, 9)

    half = network()
    first = WeightAverage(half, 0.9)
    train(half, first, 0, 4)
    saved = {name: value.clone() for name, value in first.module.state_dict().items()}
    second = WeightAverage(half, 0.9)
    second.module.load_state_dict(saved)
    train(half, second, 4, 9)
    whole = averaging.module.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in second.module.state_dict().items())


def test_a_scaled_average_forgets_as_fast_counted_in_images() -> None:
    # 8 iterations of 8 images see as many as 2 of 32: what is left of the past must be the same.
    assert horizon_scaled(0.99, 8, 32) ** 8 == pytest.approx(0.99**2)
    assert horizon_scaled(0.99, 64, 32) == pytest.approx(0.99**2)
    assert horizon_scaled(0.0, 8, 32) == 0


@pytest.mark.parametrize(
    ("values", "patience", "done", "saved"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1, 4, [0, 1, 2, 3]),  # always rising
        ([0.5, 0.4, 0.3, 0.6], 2, 3, [0]),  # two evaluations without a rise
        ([0.5, 0.4, 0.6, 0.5, 0.4], 2, 5, [0, 2]),  # a rise starts the count anew
        ([0.5, 0.4, 0.3, 0.2], 0, 4, [0]),  # never stops
        ([0.500, 0.505, 0.509, 0.6], 2, 3, [0, 1, 2]),  # too small a rise is kept, but not waited for
        ([0.500, 0.505, 0.511, 0.6], 2, 4, [0, 1, 2, 3]),  # small rises add up
        ([0.0, 0.0, 0.0], 2, 3, [0]),  # equal is no rise
        ([math.nan, 0.1, 0.2], 3, 3, [1, 2]),
    ],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_the_best_by_hand(values: list[float], patience: int, done: int, saved: list[int], restarted: bool) -> None:
    """In one go, or stopped after each evaluation and continued from what a checkpoint holds."""
    best = Best(patience, min_rise=0.01)
    found, seen = [], 0
    for when, value in enumerate(values):
        if restarted:
            state = dict(best.state_dict())
            best = Best(patience, min_rise=0.01)
            best.load_state_dict(state)
        if best.update(value, when):
            found.append(when)
        seen += 1
        if best.is_out_of_patience:
            break
    assert seen == done
    assert found == saved
    assert (best.value, best.when) == (max(values[index] for index in saved), saved[-1])


def test_a_resumed_run_may_have_another_patience() -> None:
    stopped = Best(patience=2)
    for when, value in enumerate([0.5, 0.4, 0.3]):
        stopped.update(value, when)
    assert stopped.is_out_of_patience
    for patience, is_out in ((3, False), (1, True), (0, False)):
        resumed = Best(patience)
        resumed.load_state_dict(stopped.state_dict())
        assert resumed.is_out_of_patience == is_out
