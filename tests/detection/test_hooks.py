"""Hooks, each driven by a bare trainer and compared with a plain loop or with sequences written by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.engine import TrainerBase
from torch import nn

from detection.hooks import (
    METRIC,
    BestCheckpoint,
    Evaluate,
    LastCheckpoint,
    MetricsWriter,
    SeedIteration,
    WeightAveraging,
    validation_loss,
)


class Loop(TrainerBase):
    """A trainer whose steps do what they are told; stops as the project's trainer does."""

    def __init__(self, hooks: list, step=lambda loop: None) -> None:
        super().__init__()
        self.step = step
        self.stop_requested = False
        self.register_hooks(hooks)

    def run_step(self) -> None:
        self.step(self)

    def after_step(self) -> None:
        super().after_step()
        if self.stop_requested:
            raise StopIteration

    def run(self, start: int, end: int) -> int:
        """Returns how many iterations are done."""
        try:
            self.train(start, end)
        except StopIteration:
            self.iter += 1
        return self.iter


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def random_step(model: nn.Module):
    def step(loop: Loop) -> None:
        generator = torch.Generator().manual_seed(loop.iter)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        model(torch.randn(2, 3, 6, 6, generator=generator))  # moves BatchNorm's statistics

    return step


def test_weight_averaging_is_the_plain_loop() -> None:
    model = network()
    averaging = WeightAveraging(model, 0.8)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}

    def step(loop: Loop) -> None:
        random_step(model)(loop)
        decay = min(0.8, (1 + loop.iter) / (10 + loop.iter))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()

    Loop([averaging], step).run(0, 40)
    for name, value in averaging.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == 40
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_applied_and_taken_back() -> None:
    model = network()
    averaging = WeightAveraging(model, 0.5)
    Loop([averaging], random_step(model)).run(0, 5)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), averaging.applied():
        assert all(torch.equal(value, averaging.average[name]) for name, value in model.state_dict().items())
        assert not torch.equal(model.state_dict()["0.weight"], own["0.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_averaging_goes_on_after_a_restart() -> None:
    model = network()
    averaging = WeightAveraging(model, 0.9)
    Loop([averaging], random_step(model)).run(0, 9)

    half = network()
    first = WeightAveraging(half, 0.9)
    Loop([first], random_step(half)).run(0, 4)
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    second = WeightAveraging(half, 0.9)
    second.load_state_dict(saved)
    Loop([second], random_step(half)).run(4, 9)
    assert all(torch.equal(value, averaging.average[name]) for name, value in second.average.items())


def test_iterations_draw_the_same_whenever_they_run() -> None:
    drawn = {}

    def step(loop: Loop) -> None:
        drawn.setdefault(loop.iter, []).append(torch.rand(()).item())

    Loop([SeedIteration(0)], step).run(0, 6)
    Loop([SeedIteration(0)], step).run(3, 6)
    assert all(len(set(values)) == 1 for values in drawn.values())
    assert len({values[0] for values in drawn.values()}) == 6
    Loop([SeedIteration(1)], step).run(0, 1)
    assert drawn[0][0] != drawn[0][-1]


@pytest.mark.parametrize(("period", "expected"), [(3, [2, 5, 7]), (0, [7]), (1, list(range(8))), (8, [7]), (100, [7])])
def test_evaluates_at_each_period_and_at_the_end(period: int, expected: list[int]) -> None:
    evaluated = []

    def evaluate() -> dict[str, float]:
        evaluated.append(loop.iter)
        return {METRIC: 0.5}

    loop = Loop([Evaluate(period, evaluate)])
    loop.run(0, 8)
    assert evaluated == expected


def best_checkpoint(values: list[float], patience: int, min_rise: float = 0.01) -> tuple[BestCheckpoint, int, list]:
    """Runs two iterations for each value, of which the second evaluates."""
    saved = []
    best = BestCheckpoint(lambda: saved.append(loop.iter // 2), patience, min_rise)
    loop = Loop([Evaluate(2, lambda: {METRIC: values[loop.iter // 2]}), best])
    return best, loop.run(0, 2 * len(values)), saved


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
def test_early_stopping_by_hand(values: list[float], patience: int, done: int, saved: list[int]) -> None:
    best, iterations, saves = best_checkpoint(values, patience)
    assert iterations == 2 * done
    assert saves == saved
    assert best.best == max(values[index] for index in saved)
    assert best.best_iteration == 2 * saved[-1] + 1


def test_early_stopping_remembers() -> None:
    """Stopped after each evaluation and continued, the count is the same."""
    values, saved, state, done = [0.5, 0.4, 0.6, 0.5, 0.4, 0.7], [], None, 0
    while done < 2 * len(values):
        best = BestCheckpoint(lambda: saved.append(loop.iter // 2), 2, 0.01)  # noqa: B023
        if state:
            best.load_state_dict(state)
        if best.should_stop():
            break
        loop = Loop([Evaluate(2, lambda: {METRIC: values[loop.iter // 2]}), best])  # noqa: B023
        done = loop.run(done, done + 2)
        state = dict(best.state_dict())
    assert done == 10
    assert saved == [0, 2]


@pytest.mark.parametrize(("period", "expected"), [(3, [2, 5, 6]), (1, list(range(7))), (50, [6])])
def test_last_checkpoint(period: int, expected: list[int]) -> None:
    saved = []
    loop = Loop([LastCheckpoint(lambda: saved.append(loop.iter), period)])
    loop.run(0, 7)
    assert saved == expected


def test_last_checkpoint_of_an_early_stop() -> None:
    def stop(loop: Loop) -> None:
        loop.stop_requested = loop.iter == 3

    saved = []
    loop = Loop([LastCheckpoint(lambda: saved.append(loop.iter), 100)], stop)
    loop.run(0, 10)
    assert saved == [3]


def metrics_step(loop: Loop) -> None:
    scalars = {"total_loss": float(loop.iter**2), "lr": 0.1 * loop.iter, "time": 1.0, "data_time": 0.25}
    if loop.iter % 2:
        scalars["seldom"] = float(loop.iter)
    loop.storage.put_scalars(smoothing_hint=False, **scalars)


def write_metrics(run: Path, start: int, end: int, stop: int, state: dict | None = None) -> dict:
    """Runs iterations `start` to `stop` of a training that ends at `end`; returns the writer's state."""
    writer = MetricsWriter(run, 3, images_per_epoch=20, batch_size=4)
    if state:
        writer.load_state_dict(state)

    def step(loop: Loop) -> None:
        if loop.iter == stop:
            raise KeyboardInterrupt
        metrics_step(loop)

    loop = Loop([Evaluate(4, lambda: {METRIC: loop.iter / 10, "validation_loss": 7.0}), writer], step)
    loop.after_train = lambda: None
    if stop < end:
        with pytest.raises(KeyboardInterrupt):
            loop.train(start, end)
    else:
        loop.train(start, end)
    writer.after_train()
    return json.loads(json.dumps(writer.state_dict()))


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]


def test_rows_are_means_by_hand(tmp_path: Path) -> None:
    write_metrics(tmp_path, 0, 8, 8)
    rows = read(tmp_path)
    # A row every 3 iterations, every 4 for the evaluation, and at the end: of 0-2, 3, 4-5, 6-7.
    assert [row["iteration"] for row in rows] == [2, 3, 5, 7]
    assert [row["total_loss"] for row in rows] == pytest.approx([(0 + 1 + 4) / 3, 9, (16 + 25) / 2, (36 + 49) / 2])
    assert [row["seldom"] for row in rows] == [1, 3, 5, 7]  # the mean of the iterations that have it
    assert [row["lr"] for row in rows] == pytest.approx([0.2, 0.3, 0.5, 0.7])  # the last one, no mean
    assert [row["epoch"] for row in rows] == pytest.approx([0.6, 0.8, 1.2, 1.6])
    assert [row.get(METRIC) for row in rows] == [None, 0.3, None, 0.7]
    assert [row.get("validation_loss") for row in rows] == [None, 7.0, None, 7.0]


@pytest.mark.parametrize("stop", range(1, 8))
def test_rows_are_the_same_over_a_restart(tmp_path: Path, stop: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    write_metrics(whole, 0, 8, 8)
    state = write_metrics(parts, 0, 8, stop)
    write_metrics(parts, stop, 8, 8, state)
    assert read(parts) == read(whole)


class Losing(nn.Module):
    """A detector as far as its loss goes: BatchNorm, a random sample, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.norm.running_mean.fill_(2.0)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        assert self.training
        x = torch.tensor([[sample["x"]] for sample in batch])
        return {"loss_a": self.norm(x).mean(), "loss_b": torch.rand(())}


def test_validation_loss_leaves_everything_as_it_was() -> None:
    model = Losing()
    batches = [[{"x": 3.0}, {"x": 5.0}], [{"x": 12.0}]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = validation_loss(model, batches, seed=0)
    assert torch.equal(torch.rand(3), expected)  # the generator
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert validation_loss(model, batches, seed=0) == first

    # By hand: the mean over images, with the statistics that are kept (mean 2, variance 1), plus a random number.
    by_hand = (2 * ((3 - 2) + (5 - 2)) / 2 + (12 - 2)) / 3
    assert by_hand < first["validation_loss"] < by_hand + 1
    assert validation_loss(model, [], seed=0) == {}
