"""Trainer hooks. What they remember is in the checkpoint, so a resumed run goes on as if it had never stopped."""

import datetime
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

import psutil
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.averaging import Best, WeightAverage
from common.files import write_figure
from common.run_folder import append_metrics, failures_as_warnings, read_metrics, write_results
from common.stream import derive_seed
from detection.class_panels import plot_training

logger = logging.getLogger(__name__)

METRIC = "AP50_11point"
PER_CLASS = f"per_class_{METRIC}/"  # then the name of the class


class WaitForGPU(HookBase):
    """Lets the GPU catch up before the row of each period, while the iteration is timed: its losses would wait anyway.

    Args:
        period: of the rows, in iterations.
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        """Waits if it is time."""
        if self.trainer.loss_sum.is_cuda and (self.trainer.iter + 1) % self.period == 0:
            torch.cuda.synchronize(self.trainer.loss_sum.device)


class SeedIteration(HookBase):
    """Seeds torch by (seed, iteration, rank), so the samples that the model draws do not depend on restarts."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Seeds the generators of the CPU and of every GPU."""
        torch.manual_seed(derive_seed(self.seed, self.trainer.iter, comm.get_rank()))


class WeightAveraging(HookBase):
    """Keeps a `WeightAverage` up to date.

    Args:
        model: the model without a distributed wrapper.
        decay: see `WeightAverage`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.average = model, WeightAverage(model, decay)

    def after_step(self) -> None:
        """Moves the average towards the weights of this iteration."""
        self.average.update(self.model, self.trainer.iter)


class Evaluate(HookBase):
    """Evaluates every `period` iterations and after the last one; the metrics reach the event storage of every rank.

    Args:
        period: iterations between two evaluations; 0 evaluates only at the end.
        evaluate: returns the metrics on rank 0; called on all ranks.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict[str, float]]) -> None:
        self.period = period
        self.evaluate = evaluate

    def after_step(self) -> None:
        """Evaluates if it is time."""
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self.period and done % self.period == 0):
            metrics = comm.all_gather(self.evaluate())[0]
            self.trainer.storage.put_scalars(smoothing_hint=False, **metrics)
            comm.synchronize()


class BestCheckpoint(Best, HookBase):
    """Saves `model_best.pth` whenever the metric is the highest so far, and stops training when it rises no more.

    Args:
        save: writes the best checkpoint; called on rank 0.
        patience: evaluations without a rise before the trainer is told to stop; 0 never stops.
        min_rise: a smaller rise does not count for the patience.
    """

    def __init__(self, save: Callable[[], None], patience: int, min_rise: float) -> None:
        super().__init__(patience, min_rise)
        self.save = save

    def after_step(self) -> None:
        """Compares the metric of this iteration, if there is one."""
        value, iteration = self.trainer.storage.latest().get(METRIC, (float("nan"), -1))
        if iteration != self.trainer.iter:
            return
        if self.update(value, iteration) and comm.is_main_process():
            self.save()
        if self.is_out_of_patience:
            logger.info(
                "Stopping early: %s has not risen by %g in %d evaluations; the best is %.4f after iteration %d",
                METRIC, self.min_rise, self.without_rise, self.value, self.when + 1,
            )  # fmt: skip
            self.trainer.stop_requested = True


class MetricsWriter(HookBase):
    """Writes a row of means to `metrics.json`, TensorBoard and the log every `period` iterations and evaluation.

    In a terminal the log's lines go to `log.txt` alone and a progress bar takes their place, whose loss is that of the
    last row. `results.csv`, `results.png` and `results_per_class.png` follow at every evaluation. Runs on rank 0.

    Args:
        period: iterations that a row averages over.
        images_per_epoch: for the epoch in the rows.
        batch_size: images an iteration over all processes.
    """

    def __init__(self, period: int, images_per_epoch: int, batch_size: int) -> None:
        self.period = period
        self.images_per_epoch = images_per_epoch
        self.batch_size = batch_size
        self.values: dict[str, list[float]] = defaultdict(list)

    def before_train(self) -> None:
        """Opens TensorBoard's file and the progress bar."""
        trainer, self.run = self.trainer, self.trainer.run
        self.tensorboard = SummaryWriter(str(self.run), purge_step=trainer.start_iter)
        self.bar = tqdm(
            total=trainer.max_iter,
            initial=trainer.start_iter,
            unit="it",
            disable=None,  # shown on a terminal alone
            dynamic_ncols=True,
        )

    def after_step(self) -> None:
        """Adds this iteration to the means and writes them if it is time."""
        iteration = self.trainer.iter
        latest = {name: value for name, (value, when) in self.trainer.storage.latest().items() if when == iteration}
        metrics = {
            name: latest.pop(name)
            for name in list(latest)
            if name.startswith(("AP", PER_CLASS)) or name == "validation_loss"
        }
        for name, value in latest.items():
            self.values[name].append(value)
        self.bar.update()
        is_last = iteration + 1 == self.trainer.max_iter or self.trainer.stop_requested
        if not (metrics or is_last or (iteration + 1) % self.period == 0):
            return
        row = {
            "iteration": iteration,
            "epoch": (iteration + 1) * self.batch_size / self.images_per_epoch,
            **self.trainer.mean_losses(len(self.values["time"])),
            **{name: sum(values) / len(values) for name, values in self.values.items()},
            **metrics,
            "lr": latest["lr"],
        }
        self.values.clear()
        append_metrics(self.run, row)
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, iteration)
        self.bar.set_postfix_str(f"loss {row['total_loss']:.3f}  lr {row['lr']:.2g}  {self._memory()}", refresh=False)
        means = {name: value for name, value in row.items() if not name.startswith(PER_CLASS)}
        logger.info(self._line(means), extra={"is_progress": True})
        if metrics or is_last:
            write_results(self.run)
            self._draw_classes()

    def after_train(self) -> None:
        """Closes what `before_train` opened."""
        self.bar.close()
        self.tensorboard.close()

    def _draw_classes(self) -> None:
        path = self.run / "results_per_class.png"
        with failures_as_warnings(path):
            if figure := plot_training(read_metrics(self.run), METRIC, PER_CLASS):
                write_figure(path, figure)

    def _line(self, row: dict[str, float]) -> str:
        left = self.trainer.max_iter - self.trainer.iter - 1
        seconds = row["time"]
        losses = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in row.items() if "loss" in name)
        scores = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name.startswith("AP"))
        return "  ".join(
            part
            for part in (
                f"iter {row['iteration'] + 1}/{self.trainer.max_iter}",
                f"epoch {row['epoch']:.2f}",
                losses,
                scores,
                f"lr {row['lr']:.2g}",
                f"{self.batch_size / seconds:.1f} img/s",
                f"data {row['data_time'] / seconds:.0%}",
                f"eta {datetime.timedelta(seconds=round(left * seconds))}",
                self._memory(),
            )
            if part
        )

    def _memory(self) -> str:
        device = self.trainer.loss_sum.device
        if device.type == "cuda":
            return f"GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB"
        return f"memory {psutil.Process().memory_info().rss / 2**30:.1f} GB"

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """The values that the next row will average."""
        return {"values": dict(self.values)}

    def load_state_dict(self, state_dict: dict[str, dict[str, list[float]]]) -> None:
        """Goes on with the values of a checkpoint."""
        self.values = defaultdict(list, state_dict["values"])


class LastCheckpoint(HookBase):
    """Saves `model_last.pth` every `period` iterations and after the last one. Comes last, so it holds all states.

    It also saves with every `model_best.pth`, so that a resumed run knows of it.

    Args:
        save: writes the checkpoint; called on rank 0.
        period: iterations between two checkpoints.
        best: the hook that saves `model_best.pth`.
    """

    def __init__(self, save: Callable[[], None], period: int, best: BestCheckpoint) -> None:
        self.save = save
        self.period = period
        self.best = best

    def after_step(self) -> None:
        """Saves if it is time."""
        done = self.trainer.iter + 1
        is_last = done == self.trainer.max_iter or self.trainer.stop_requested
        is_best = self.best.when == self.trainer.iter
        if comm.is_main_process() and (is_last or is_best or done % self.period == 0):
            self.save()


def validation_loss(model: nn.Module, batches: Iterable[list[dict]], seed: int) -> dict[str, float]:
    """Mean training loss of labelled images that are not trained on, gathered over all ranks.

    The model is in training mode, since only then does it compute losses, but BatchNorm uses its running statistics
    without updating them, and what the model samples is drawn from a seed of its own.

    Returns:
        `validation_loss`; empty without images.
    """
    losses, count = [], 0
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), EventStorage():
        torch.manual_seed(derive_seed(seed))  # on a GPU anchors are drawn there
        for batch in batches:
            losses.append(sum(model(batch).values()) * len(batch))
            count += len(batch)
    model.train()
    totals = comm.all_gather((float(sum(losses)), count))
    count = sum(n for _, n in totals)
    return {"validation_loss": sum(loss for loss, _ in totals) / count} if count else {}
