"""Hooks, each driven by a bare trainer and compared with a plain loop or with sequences written by hand."""

import errno
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from common.averaging import WeightAverage
from common.run_folder import read_metrics
from detection.class_panels import plot_training
from detection.hooks import (
    METRIC,
    PER_CLASS,
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

    def iterate(self, start: int, end: int) -> int:
        """Returns how many iterations are done."""
        try:
            self.train(start, end)
        except StopIteration:
            self.iter += 1
        return self.iter


def test_weights_are_averaged_after_each_iteration() -> None:
    model = nn.Linear(1, 1)
    averaging = WeightAveraging(model, 0.9)
    plain = WeightAverage(model, 0.9)

    def step(loop: Loop) -> None:
        nn.init.constant_(model.weight, loop.iter)
        plain.update(model, loop.iter)

    Loop([averaging], step).iterate(0, 5)
    assert torch.equal(averaging.average.module.weight, plain.module.weight)


def test_iterations_draw_the_same_whenever_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def step(loop: Loop) -> None:
        drawn.setdefault(loop.iter, []).append(torch.rand(()).item())

    Loop([SeedIteration(0)], step).iterate(0, 6)
    Loop([SeedIteration(0)], step).iterate(3, 6)
    assert all(len(set(values)) == 1 for values in drawn.values())
    assert len({values[0] for values in drawn.values()}) == 6
    Loop([SeedIteration(1)], step).iterate(0, 1)
    assert drawn[0][0] != drawn[0][-1]
    monkeypatch.setattr(comm, "get_rank", lambda: 1)  # another process draws for other images
    Loop([SeedIteration(0)], step).iterate(1, 2)
    assert drawn[1][0] != drawn[1][-1]


@pytest.mark.parametrize(("period", "expected"), [(3, [2, 5, 7]), (0, [7]), (1, list(range(8))), (8, [7]), (100, [7])])
def test_evaluates_at_each_period_and_at_the_end(period: int, expected: list[int]) -> None:
    evaluated = []

    def evaluate() -> dict[str, float]:
        evaluated.append(loop.iter)
        return {METRIC: 0.5}

    loop = Loop([Evaluate(period, evaluate)])
    loop.iterate(0, 8)
    assert evaluated == expected


@pytest.mark.parametrize(
    ("values", "patience", "done", "saved"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1, 4, [0, 1, 2, 3]),
        ([0.5, 0.4, 0.6, 0.5, 0.4, 0.7], 2, 5, [0, 2]),  # stops before the last
        ([0.500, 0.505, 0.509, 0.6], 2, 3, [0, 1, 2]),  # too small a rise is kept, but not waited for
    ],
)
def test_the_best_is_saved_and_patience_ends_the_training(
    values: list[float], patience: int, done: int, saved: list[int]
) -> None:
    """Of two iterations for each value, of which the second evaluates."""
    saves = []
    best = BestCheckpoint(lambda: saves.append(loop.iter // 2), patience, 0.01)
    loop = Loop([Evaluate(2, lambda: {METRIC: values[loop.iter // 2]}), best])
    assert loop.iterate(0, 2 * len(values)) == 2 * done
    assert saves == saved
    assert (best.value, best.when) == (values[saved[-1]], 2 * saved[-1] + 1)


@pytest.mark.parametrize(("period", "expected"), [(3, [2, 5, 6]), (1, list(range(7))), (50, [6])])
def test_last_checkpoint(period: int, expected: list[int]) -> None:
    saved = []
    loop = Loop([LastCheckpoint(lambda: saved.append(loop.iter), period, BestCheckpoint(lambda: None, 0, 0.0))])
    loop.iterate(0, 7)
    assert saved == expected


def test_the_last_checkpoint_knows_of_every_best_one() -> None:
    values, saved = [0.1, 0.3, 0.2, 0.4, 0.4], []
    best = BestCheckpoint(lambda: None, 0, 0.0)
    last = LastCheckpoint(lambda: saved.append(loop.iter), 100, best)
    loop = Loop([Evaluate(2, lambda: {METRIC: values[loop.iter // 2]}), best, last])
    loop.iterate(0, 10)
    assert saved == [1, 3, 7, 9]  # the last for it is at the end


def test_last_checkpoint_of_an_early_stop() -> None:
    def stop(loop: Loop) -> None:
        loop.stop_requested = loop.iter == 3

    saved = []
    last = LastCheckpoint(lambda: saved.append(loop.iter), 100, BestCheckpoint(lambda: None, 0, 0.0))
    loop = Loop([last], stop)
    loop.iterate(0, 10)
    assert saved == [3]


class WritingLoop(Loop):
    """Sums up a loss as the project's trainer does, and is killed at `stop`."""

    def __init__(self, run: Path, hooks: list, stop: int, loss_sum: float) -> None:
        super().__init__(hooks)
        self.run, self.stop, self.loss_sum = run, stop, torch.tensor(loss_sum, dtype=torch.float64)

    def run_step(self) -> None:
        if self.iter == self.stop:
            raise KeyboardInterrupt
        self.loss_sum += self.iter**2
        scalars = {"lr": 0.1 * self.iter, "time": 1.0, "data_time": 0.25}
        if self.iter % 2:
            scalars["seldom"] = float(self.iter)
        self.storage.put_scalars(smoothing_hint=False, **scalars)

    def mean_losses(self, iterations: int) -> dict[str, float]:
        mean = self.loss_sum.item() / iterations
        self.loss_sum.zero_()
        return {"total_loss": mean}


def write_metrics(run: Path, start: int, end: int, stop: int, state: dict | None = None) -> dict:
    """Runs iterations `start` to `stop` of a training that ends at `end`; returns what a checkpoint would hold."""
    writer = MetricsWriter(3, images_per_epoch=20, batch_size=4)
    if state:
        writer.load_state_dict(state["writer"])
    of_class = {f"{PER_CLASS}glossy ibis": 0.25}
    evaluate = Evaluate(4, lambda: {METRIC: loop.iter / 10, "validation_loss": 7.0, **of_class})
    loop = WritingLoop(run, [evaluate, writer], stop, state["loss_sum"] if state else 0.0)
    with pytest.raises(KeyboardInterrupt) if stop < end else nullcontext():
        loop.train(start, end)
    return json.loads(json.dumps({"writer": writer.state_dict(), "loss_sum": loop.loss_sum.item()}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of eight iterations in one go."""
    run = tmp_path_factory.mktemp("whole")
    write_metrics(run, 0, 8, 8)
    return run


def test_rows_are_means_by_hand(whole: Path) -> None:
    rows = read_metrics(whole)
    # A row every 3 iterations, every 4 for the evaluation, and at the end: of 0-2, 3, 4-5, 6-7.
    assert [row["iteration"] for row in rows] == [2, 3, 5, 7]
    assert [row["total_loss"] for row in rows] == pytest.approx([(0 + 1 + 4) / 3, 9, (16 + 25) / 2, (36 + 49) / 2])
    assert [row["seldom"] for row in rows] == [1, 3, 5, 7]  # the mean of the iterations that have it
    assert [row["lr"] for row in rows] == pytest.approx([0.2, 0.3, 0.5, 0.7])  # the last one, no mean
    assert [row["epoch"] for row in rows] == pytest.approx([0.6, 0.8, 1.2, 1.6])
    assert [row.get(METRIC) for row in rows] == [None, 0.3, None, 0.7]
    assert [row.get("validation_loss") for row in rows] == [None, 7.0, None, 7.0]
    assert [row.get("per_class_AP50_11point/glossy ibis") for row in rows] == [None, 0.25, None, 0.25]


def test_tensorboard_has_the_values_of_the_rows(whole: Path) -> None:
    events = EventAccumulator(str(whole)).Reload()
    rows = read_metrics(whole)
    names = {name for row in rows for name in row}
    assert set(events.Tags()["scalars"]) == names >= {"total_loss", "lr", METRIC}
    for name in names:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({row["iteration"]: row[name] for row in rows if name in row}), name


def test_each_class_has_a_panel_of_its_evaluations(whole: Path) -> None:
    assert (whole / "results_per_class.png").read_bytes().startswith(b"\x89PNG")
    rows = [
        {"iteration": 3, "AP": 0.25, "each/cat": 0.5, "each/$dog": 0.0},
        {"iteration": 5, "total_loss": 1.0},
        {"iteration": 7, "AP": 0.5, "each/cat": 0.75, "each/$dog": 0.25, "each/cow": 0.125},
    ]
    cat, dog, cow = plot_training(rows, "AP", "each/").axes
    assert [axes.get_title() for axes in (cat, dog, cow)] == ["cat  0.750", "$dog  0.250", "cow  0.125"]
    mean, own = cat.lines
    assert mean.get_xydata().tolist() == [[4, 0.25], [8, 0.5]]
    assert own.get_xydata().tolist() == [[4, 0.5], [8, 0.75]]
    assert cow.lines[1].get_xydata().tolist() == [[8, 0.125]]
    assert plot_training(rows[1:2], "AP", "each/") is None


def test_of_many_classes_the_worst_and_the_best_have_panels() -> None:
    row = {"iteration": 0, "AP": 0.5, **{f"each/{number}": number / 200 for number in range(200)}}
    figure = plot_training([row], "AP", "each/")
    shown = {int(axes.get_title().split()[0]) for axes in figure.axes}
    assert shown == {*range(20), *range(180, 200)}
    assert "the worst and the best 20 of 200 classes" in figure.get_suptitle()


def test_a_picture_that_cannot_be_drawn_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    with caplog.at_level("WARNING"):
        write_metrics(tmp_path, 0, 8, 8)
    assert len(read_metrics(tmp_path)) == 4 and not (tmp_path / "results_per_class.png").exists()
    assert "results_per_class.png: not drawn (division by zero)" in caplog.text

    def fill_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_disk)
    with pytest.raises(OSError, match="No space left"):  # which the next checkpoint would not survive either
        write_metrics(tmp_path, 0, 8, 8)


@pytest.mark.parametrize("stop", range(1, 8))
def test_rows_are_the_same_over_a_restart(whole: Path, tmp_path: Path, stop: int) -> None:
    state = write_metrics(tmp_path, 0, 8, stop)
    write_metrics(tmp_path, stop, 8, 8, state)
    assert read_metrics(tmp_path) == read_metrics(whole)


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
