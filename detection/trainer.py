"""The trainer of both detectors, and their evaluation on test sets."""

import logging
import statistics
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.engine.hooks import IterationTimer, LRScheduler
from detectron2.evaluation import inference_on_dataset
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

from common.errors import Interrupted, UserError
from common.processes import (
    deferred_interrupt,
    is_main_process,
    no_sync_before_last,
    on_main_process,
    share_buffers,
    world_size,
)
from common.run_folder import truncate_metrics
from common.runtime import gradient_scaler
from common.stream import derive_seed
from common.weights import is_finite, load_state, read_last, resume_optimizer, save_checkpoint
from detection.checkpoint import load_initial_weights
from detection.config import blamed_on
from detection.data_loader import build_test_loader, build_training_loader
from detection.evaluation import VOCEvaluator
from detection.experiment import recorded
from detection.hooks import (
    METRIC,
    PER_CLASS,
    BestCheckpoint,
    Evaluate,
    LastCheckpoint,
    MetricsWriter,
    SeedIteration,
    WaitForGPU,
    WeightAveraging,
    validation_loss,
)
from detection.modeling import build_model
from detection.optimizer import build_optimizer
from detection.schedule import describe_schedule
from detection.voc import records_of

logger = logging.getLogger(__name__)


class Trainer(SimpleTrainer):
    """Detectron2's loop with this project's data stream, precision, hooks and checkpoints. One for both detectors.

    Building it reads data and weights and writes nothing.

    Args:
        cfg: a configuration with every length in iterations.
        resumed: the run folder to go on in from its `model_last.pth`, where there is one.
        given: keys that the user has set; they are blamed for an error in the first iteration too, since some values
            are used only there.

    Raises:
        UserError: weights or data cannot be read, or the resumed run has gone further or was trained on other images.
    """

    def __init__(self, cfg: CfgNode, resumed: Path | None = None, given: Collection[str] = ()) -> None:
        self.cfg = cfg
        self.given = given
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.accumulate = cfg.SOLVER.ACCUMULATE
        self.stop_requested = False
        self.loss_names: list[str] = []
        if cfg.MODEL.DEVICE == "cpu" and dist.is_initialized() and dist.get_backend() == "nccl":
            raise UserError("MODEL.DEVICE cpu: the processes train on GPUs together; leave it out, or give NGPU=1")
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        comm.all_gather(None)  # Detectron2 speaks gloo where it evaluates: machines that cannot should say so now
        torch.manual_seed(cfg.SEED)
        self.bare_model = build_model(cfg)
        last = on_main_process(read_last, resumed) if resumed else None
        if last is None:
            load_initial_weights(self.bare_model, cfg)
        else:
            load_state(self.bare_model, last["model"], f"{resumed}/model_last.pth")
        optimizer = build_optimizer(cfg, self.bare_model)
        device = next(self.bare_model.parameters()).device
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        model = create_ddp_model(
            self.bare_model, broadcast_buffers=False, device_ids=[device.index] if device.type == "cuda" else None
        )
        super().__init__(model, data_loader=None, optimizer=optimizer)
        self.grad_scaler = gradient_scaler(device, cfg.MODEL.PRECISION)
        self.scheduler = build_lr_scheduler(cfg, optimizer)

        self.evaluator = Evaluator(cfg)
        dataset_dicts = records_of(cfg.DATASETS.TRAIN)
        # Tells the images of one training from those of another, wherever they lie.
        self.data = derive_seed(*(entry["image_id"] for entry in dataset_dicts))
        self.averaging = WeightAveraging(self.bare_model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        self.best = BestCheckpoint(self._save_best, cfg.TEST.PATIENCE, cfg.TEST.MIN_RISE)
        self.writer = MetricsWriter(cfg.SOLVER.LOG_PERIOD, len(dataset_dicts), cfg.SOLVER.IMS_PER_BATCH)
        self.register_hooks(
            [
                SeedIteration(cfg.SEED),
                WaitForGPU(cfg.SOLVER.LOG_PERIOD),
                IterationTimer(warmup_iter=0),
                LRScheduler(),
                self.averaging,
                Evaluate(cfg.TEST.EVAL_PERIOD, self.evaluate),
                self.best,
                self.writer if is_main_process() else None,
                LastCheckpoint(self._save_last, cfg.SOLVER.CHECKPOINT_PERIOD, self.best),
            ]
        )
        self.start_iter = 0
        if resumed and last is not None:
            self._resume(last, resumed)
        self.data_loader = build_training_loader(cfg, dataset_dicts, range(self.start_iter, self.max_iter))

    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.start_iter >= self.max_iter or self.best.is_out_of_patience

    def train(self, run: Path) -> None:
        """Trains from `start_iter` to `max_iter`, or until a hook asks to stop.

        Args:
            run: the run folder, which holds all that is written.

        Raises:
            UserError: the loss diverges.
            Interrupted: Ctrl-C, after a checkpoint.
        """
        self.run = run
        if is_main_process():
            truncate_metrics(run, self.start_iter)
        first = f"iteration {self.start_iter + 1} of " if self.start_iter else ""
        logger.info("Training into %s, %s%s", run, first, describe_schedule(self.cfg))
        with (
            EventStorage(self.start_iter) as self.storage,
            deferred_interrupt() as interrupt,
            recorded(run, self.cfg),
        ):
            self.iter = self.start_iter
            self.before_train()
            try:
                while self.iter < self.max_iter and not self.stop_requested:
                    self.before_step()
                    with blamed_on(self.given if self.iter == self.start_iter else ()):
                        self.run_step()
                    self.after_step()
                    if interrupt.is_set() and is_main_process():
                        self._save_last()
                        raise Interrupted(
                            f"{run} is saved after iteration {self.iter + 1}; RESUME=1 goes on from there"
                        )
                    self.iter += 1
            except FloatingPointError as error:
                raise UserError(
                    f"{run}: the loss before iteration {self.iter + 2} is infinite or no number, expected it to fall; "
                    "give a lower SOLVER.BASE_LR or a longer SOLVER.WARMUP_ITERS"
                ) from error
            finally:
                self.after_train()

    def run_step(self) -> None:
        """One iteration. Its losses, averaged over the processes, are summed on the device until `mean_losses` asks."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self.storage.put_scalar("data_time", time.perf_counter() - start)
        self.optimizer.zero_grad()
        values = self._accumulate(batch)
        self.grad_scaler.unscale_(self.optimizer)  # since the step clips
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()
        self.loss_sum = self.loss_sum + values

    def _accumulate(self, batch: list[dict]) -> Tensor:
        """Adds up the gradients of the parts of a batch; returns their mean losses, in the order of `loss_names`."""
        size = len(batch) // self.accumulate
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        values = []
        for part in parts:
            with no_sync_before_last(self.model, part is parts[-1]):
                losses = self.model(part)
                self.grad_scaler.scale(sum(losses.values()) / len(parts)).backward()
            values.append(torch.stack([loss.detach().double() for loss in losses.values()]))
        self.loss_names = list(losses)
        return torch.stack(values).mean(0)

    def mean_losses(self, iterations: int) -> dict[str, float]:
        """Means over the processes and the iterations since the last call, and their sum as `total_loss`.

        Raises:
            FloatingPointError: one is not finite.
        """
        self._check_losses()
        means = (self.loss_sum / iterations).tolist()
        self.loss_sum = torch.zeros_like(self.loss_sum)
        return {"total_loss": sum(means), **dict(zip(self.loss_names, means, strict=True))}

    def _check_losses(self) -> None:
        if not torch.isfinite(self.loss_sum).all():
            raise FloatingPointError("the loss is not finite")

    def evaluate(self) -> dict[str, float]:
        """AP, that of each class, and validation loss of the weights, or of their average; the APs on rank 0 alone."""
        share_buffers(self.evaluated_model)
        metrics = self.evaluator.evaluate(self.evaluated_model)
        loss = validation_loss(self.evaluated_model, self.evaluator.labelled_loader, self.cfg.SEED)
        per_class = {PER_CLASS + name: ap for name, ap in self.evaluator.per_class.items()}
        return {**metrics, **per_class, **loss}

    @property
    def evaluated_model(self) -> nn.Module:
        """What is evaluated, and kept as the best: the model with the average of its weights where there is one."""
        return self.averaging.average.module if self.averaging else self.bare_model

    def _save_last(self) -> None:
        self._check_losses()
        if not is_finite(self.bare_model):
            raise FloatingPointError("a weight is not finite")
        state = {
            "iteration": self.iter,
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "best": self.best.state_dict(),
            "rows": self.writer.state_dict(),
            "losses": {"names": self.loss_names, "sum": self.loss_sum},
            "data": self.data,
            "test_data": self.evaluator.data,
        }
        average = {"average": self.averaging.average.module.state_dict()} if self.averaging else {}
        save_checkpoint(
            self.run / "model_last.pth", {"model": self.bare_model.state_dict(), **average, "trainer": state}
        )

    def _resume(self, last: dict, resumed: Path) -> None:
        """Goes on from a checkpoint; settings of the optimizer and the schedule are those of the configuration."""
        state = last["trainer"]
        if state.get("data", self.data) != self.data:  # checkpoints of old do not tell
            raise UserError(
                f"{resumed}: was trained on other images than those of {', '.join(self.cfg.DATASETS.TRAIN)} in "
                f"{self.cfg.DATASETS.ROOT}; expected the same ones: name their folder with DATA=, or start a new run "
                "without RESUME=1, from these weights with START="
            )
        self.start_iter = state["iteration"] + 1
        if self.start_iter > self.max_iter:
            raise UserError(
                f"{resumed}: {self.start_iter} iterations are done, asked for are {self.max_iter}; give "
                "SOLVER.MAX_ITER or SOLVER.MAX_EPOCHS of at least as many, or leave them out"
            )
        resume_optimizer(self.optimizer, state["optimizer"])
        # The scheduler is a function of the iteration; its own way there would warn of steps that it has not seen.
        self.scheduler.last_epoch = self.start_iter
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate
        if state["grad_scaler"]:  # empty where the precision was another
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if state.get("test_data", self.evaluator.data) == self.evaluator.data:
            self.best.load_state_dict(state["best"])
        else:
            logger.info("%s was tested on other images: its best evaluation counts no more", resumed)
        self.writer.load_state_dict(state["rows"])
        self.loss_names, self.loss_sum = state["losses"]["names"], state["losses"]["sum"].to(self.loss_sum)
        if self.averaging and "average" in last:
            self.averaging.average.module.load_state_dict(last["average"])

    def _save_best(self) -> None:
        checkpoint = {"model": self.evaluated_model.state_dict(), "iteration": self.iter, METRIC: self.best.value}
        save_checkpoint(self.run / "model_best.pth", checkpoint)
        self.evaluator.write(self.run)


class Evaluator:
    """Measures a detector on `cfg.DATASETS.TEST`; all processes take part.

    Attributes:
        labelled_loader: evenly spaced test images with their annotations, `TEST.VALIDATION_LOSS_IMAGES` of them or all.
        per_class: name of each class that has objects -> its `METRIC` in the last evaluation, on rank 0.
        data: tells these test images from others, wherever they lie.
    """

    def __init__(self, cfg: CfgNode) -> None:
        entries = {name: DatasetCatalog.get(name) for name in cfg.DATASETS.TEST}
        self.loaders = {name: build_test_loader(cfg, entries[name]) for name in entries}
        self.evaluators = {name: VOCEvaluator(name) for name in entries}
        self.per_class: dict[str, float] = {}
        together = [entry for part in entries.values() for entry in part]
        self.data = derive_seed(*(entry["image_id"] for entry in together))
        wanted = min(cfg.TEST.VALIDATION_LOSS_IMAGES, len(together))
        self.labelled_loader: Iterable[list[dict]] = []
        if wanted:
            chosen = [together[place * len(together) // wanted] for place in range(wanted)]
            self.labelled_loader = build_test_loader(cfg, chosen, with_annotations=True)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Evaluates a model without a distributed wrapper.

        Returns:
            `AP50_11point`, `AP50`, `AP75` and `AP` as fractions on rank 0, means over several test sets; {} elsewhere.
        """
        results = []
        for name, loader in self.loaders.items():
            is_hidden = not is_main_process() or None  # None shows it on a terminal alone
            bar = tqdm(loader, desc=name, unit="batch", leave=False, disable=is_hidden, dynamic_ncols=True)
            results.append(inference_on_dataset(model, bar, self.evaluators[name]))
        self.per_class = _means([result.get("per_class", {}) for result in results])
        return _means([result.get("bbox", {}) for result in results])

    def write(self, folder: Path) -> None:
        """Writes tables, curves and detections of the last evaluation, on rank 0; of several sets below `folder`."""
        for name, evaluator in self.evaluators.items():
            evaluator.write(folder if len(self.evaluators) == 1 else folder / name)


def _means(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the results that have it."""
    names = dict.fromkeys(name for result in results for name in result)
    return {name: statistics.mean(result[name] for result in results if name in result) for name in names}
