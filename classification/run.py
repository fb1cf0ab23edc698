"""One training: what a recipe asks for put together, trained epoch by epoch, and the files of its run folder."""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from classification.cub import Bird, Cub, hold_out
from classification.data_loader import BirdStream, build_test_loader, build_training_loader
from classification.engine import Batch, BatchAugmentation, Trainer, evaluate
from classification.model import check_image_size, describe, parameter_groups
from classification.recipe import Recipe
from classification.snapmix import SnapMix
from common.averaging import Best, WeightAverage
from common.errors import Interrupted, UserError
from common.files import write_json
from common.processes import deferred_interrupt, is_main_process, on_main_process, world_size
from common.run_folder import append_metrics, truncate_metrics, write_results
from common.stream import derive_seed
from common.weights import is_finite, read_checkpoint, read_last, save_checkpoint

logger = logging.getLogger(__name__)

FEWEST_IMAGES = 8  # per process for BatchNorm's statistics; with fewer, GPUs share theirs
_NAMED_IN_RESULT = ("model", "pretrained", "weights", "lr", "epochs", "image_size", "seed")


class Run:
    """One training run. Constructing it reads data and weights, and writes nothing.

    Args:
        recipe: all settings.
        cub: the data set.
        model: as `build_model` made it; trained in place.
        device: of this process.
        resumed: the run folder to resume, from its `model_last.pth` if there is one.

    Raises:
        UserError: an image cannot be read, the batch does not fit the data or the processes, or the resumed run was
            trained on other data.
    """

    def __init__(
        self, recipe: Recipe, cub: Cub, model: nn.Module, device: torch.device, resumed: Path | None = None
    ) -> None:
        self.recipe, self.cub, self.model = recipe, cub, model
        train_birds, self.validation_birds = cub.train, cub.test
        self.validated_on = "the test split"
        if recipe.holdout:
            train_birds, self.validation_birds = hold_out(cub.train, recipe.holdout, recipe.seed)
            self.validated_on = f"{len(self.validation_birds)} images held out of the training split"
        _check_batch(recipe, len(train_birds))
        if (fewest := min(len(self.validation_birds), len(cub.test))) < world_size():
            raise UserError(
                f"{fewest} images to validate or test on: expected at least {world_size()}, one a process: lower NGPU"
            )
        check_image_size(recipe.model, model, recipe.image_size)
        model.to(device).to(memory_format=torch.channels_last)
        self.card = describe(recipe.model, model, cub.class_names, recipe.image_size, recipe.crop_pct)
        self.prepare = BatchAugmentation(self.card["mean"], self.card["std"])
        stream = BirdStream(recipe, train_birds)
        self.iterations = stream.epoch_length // recipe.batch_size
        self.trainer = build_trainer(recipe, model, self.iterations, self.card)
        self.best = Best(recipe.patience)
        self.kept_row: dict[str, float] = {}
        # Tells the images of one training from those of another, wherever they lie.
        self.data = derive_seed(*(f"{bird.path.parent.name}/{bird.path.name}" for bird in train_birds))
        last = on_main_process(read_last, resumed) if resumed else None
        if last is not None:
            if last["data"] != self.data:
                raise UserError(
                    f"{resumed}: was trained on other images than the {len(train_birds)} here; expected the same ones:"
                    " name their folder with DATA=, or start a new run without RESUME=1"
                )
            self.trainer.load_state_dict(last)
            if self.trainer.iteration > recipe.epochs * self.iterations:
                raise UserError(
                    f"{resumed}: {self.trainer.iteration / self.iterations:g} epochs are done, asked for are "
                    f"{recipe.epochs}; give at least as many, or leave them out"
                )
            self.best.load_state_dict(last["best"])
            self.kept_row = last["best_row"]
        left = range(self.trainer.iteration, recipe.epochs * self.iterations)
        self.loader = build_training_loader(recipe, stream, left)
        self.validation_loader = self._test_loader(self.validation_birds, cache=recipe.cache)

    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.trainer.iteration >= self.recipe.epochs * self.iterations or self.best.is_out_of_patience

    def train(self, run: Path) -> dict[str, Any]:
        """Trains to the end and keeps the weights of the best epoch, or of the last.

        Args:
            run: an existing folder, for the files.

        Returns:
            What `run/result.json` holds: `top1` and `top5` on the test split in percent, the epoch they belong to and
            how it was `chosen`, its validation figures and the images they are from, and the run's main settings.

        Raises:
            UserError: an image cannot be read, or the loss diverges.
            Interrupted: Ctrl-C, after a checkpoint.
        """
        writer = None
        if is_main_process():
            truncate_metrics(run, self.trainer.iteration)
            if not self.is_finished():  # a run that goes on beyond its former end
                (run / "result.json").unlink(missing_ok=True)
            writer = SummaryWriter(str(run), purge_step=self.trainer.iteration)
        batches = iter(self.loader)
        with deferred_interrupt() as interrupt:

            def on_iteration() -> None:
                done = self.trainer.iteration % self.iterations
                if not done or not is_main_process():
                    return  # the checkpoint at the end of an epoch is written after its validation
                if interrupt.is_set() or done % self.recipe.checkpoint_every == 0:
                    self._save_last(run)
                    logger.info("iteration %d: checkpoint", self.trainer.iteration, extra={"is_progress": True})
                if interrupt.is_set():
                    raise self._interrupted(run)

            while not self.is_finished():
                self._train_epoch(run, batches, on_iteration, writer)
                if on_main_process(interrupt.is_set):
                    raise self._interrupted(run)
        if writer:
            writer.close()
        if self.trainer.iteration < self.recipe.epochs * self.iterations:
            logger.info("Stopped early: no better validation top-1 in %d epochs", self.recipe.patience)
        return self._measure(run)

    def _train_epoch(
        self, run: Path, batches: Iterator[Batch], on_iteration: Callable[[], None], writer: SummaryWriter | None
    ) -> None:
        epoch, done = divmod(self.trainer.iteration, self.iterations)
        epoch += 1
        left = self.iterations - done
        title = f"epoch {epoch}/{self.recipe.epochs}"
        is_hidden = not is_main_process() or None  # None shows it on a terminal alone
        with tqdm(batches, title, left, leave=False, unit="it", disable=is_hidden) as bar:
            try:
                row = self.trainer.train(iter(bar), left, on_iteration)
                self._check_weights()
            except FloatingPointError as error:
                lower = f"lower the rate, LR={self.recipe.lr / 4:g}"
                raise UserError(f"{run}: {error}: the run diverged; {lower}") from None
        model = self.trainer.evaluated_model
        measured = evaluate(model, self.validation_loader, self.prepare, self.recipe.precision)
        validated = {f"validation_{name}": value for name, value in measured.items()}
        is_best = self.best.update(measured["top1"], epoch)
        is_kept = is_best or self.recipe.choose == "last"
        if is_kept:
            self.kept_row = {"epoch": epoch, **validated}
        if writer:  # in the main process
            # The row first, then the best weights, then the last checkpoint: what a kill cuts off is redone in full.
            row = {"iteration": self.trainer.iteration - 1, "epoch": epoch, **row, **validated}
            append_metrics(run, row)
            write_results(run)
            for key, value in row.items():
                writer.add_scalar(key, value, row["iteration"])
            if is_kept:
                save_checkpoint(run / "model_best.pth", {**self.card, **self.kept_row, "model": model.state_dict()})
            self._save_last(run)
            _log_epoch(row, self.recipe.epochs, is_best)

    def _save_last(self, run: Path) -> None:
        if not torch.isfinite(self.trainer.sums).all():
            raise FloatingPointError(f"the training loss is no number before iteration {self.trainer.iteration}")
        self._check_weights()
        state = {**self.card, **self.trainer.state_dict(), "best": self.best.state_dict(), "best_row": self.kept_row}
        save_checkpoint(run / "model_last.pth", {**state, "data": self.data})

    def _check_weights(self) -> None:
        if not is_finite(self.model):  # no run could go on from such ones
            raise FloatingPointError(f"a weight is no number after iteration {self.trainer.iteration}")

    def _interrupted(self, run: Path) -> Interrupted:
        return Interrupted(f"{run} is saved after iteration {self.trainer.iteration}; RESUME=1 goes on there")

    def _measure(self, run: Path) -> dict[str, Any]:
        """Measures what is kept on the test split and writes `result.json`."""
        # In float32, since bfloat16 rounds the logits of likely classes to equal ones.
        self.model.load_state_dict(on_main_process(read_checkpoint, run / "model_best.pth")["model"])
        loader = self._test_loader(self.cub.test) if self.recipe.holdout else self.validation_loader
        measured = evaluate(self.model, loader, self.prepare, "float32")
        result = {
            "top1": measured["top1"],
            "top5": measured["top5"],
            "chosen": "the last" if self.recipe.choose == "last" else f"the best on {self.validated_on}",
            "validated_on": self.validated_on,
            "test_images": len(self.cub.test),
            "classes": len(self.cub.class_names),
            **self.kept_row,
            **{key: getattr(self.recipe, key) for key in _NAMED_IN_RESULT},
        }
        if is_main_process():
            write_json(run / "result.json", result)
        logger.info(
            "Test split, %d images: top-1 %.2f %%, top-5 %.2f %% (epoch %d, %s)",
            *(len(self.cub.test), result["top1"], result["top5"], result["epoch"], result["chosen"]),
        )
        return result

    def _test_loader(self, birds: list[Bird], cache: bool = False) -> DataLoader:
        recipe = self.recipe
        size = max(recipe.batch_size // world_size(), 1)
        return build_test_loader(birds, recipe.image_size, recipe.crop_pct, size, recipe.workers, cache)


def _check_batch(recipe: Recipe, images: int) -> None:
    parts = world_size() * recipe.accumulate
    # Mixup and CutMix pair the images of a process.
    multiple = math.lcm(parts, 2 * world_size()) if recipe.mixup or recipe.cutmix else parts
    if recipe.batch_size > images or recipe.batch_size % multiple:
        raise UserError(
            f"batch_size={recipe.batch_size}: expected at most the {images} training images and a multiple of "
            f"{multiple} ({world_size()} processes, accumulate={recipe.accumulate}, pairs for mixup and CutMix):"
            " OPTS=batch_size=..."
        )


def _log_epoch(row: dict, epochs: int, is_best: bool) -> None:
    logger.info(
        "epoch %d/%d  loss %.3f  top-1 %.2f %%  |  validation loss %.3f  top-1 %.2f %%  top-5 %.2f %%%s  |"
        "  lr %.2g  %.1f img/s  waiting for data %.1f %%",
        *(row["epoch"], epochs, row["train_loss"], row["train_top1"], row["validation_loss"], row["validation_top1"]),
        *(row["validation_top5"], " (best)" if is_best else ""),
        *(row["lr"], row["images_per_second"], row["data_share"]),
    )


def with_enough_statistics(model: nn.Module, images: int, device: torch.device) -> nn.Module:
    """Converts BatchNorm to SyncBatchNorm, on several GPUs, if one process has too few images for its statistics.

    Args:
        model: changed in place.
        images: that a process sees at a time.
        device: of the model; torch shares statistics among GPUs alone.

    Raises:
        UserError: BatchNorm would see one image at a time.
    """
    if images >= FEWEST_IMAGES or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    if world_size() > 1 and device.type == "cuda":
        logger.info("SyncBatchNorm: %d images a process are too few, so all processes share statistics", images)
        return convert_sync_batchnorm(model)
    if images == 1:
        raise UserError(
            "batch_size: BatchNorm would see one image at a time, expected 2 or more: a larger batch_size, a smaller"
            " accumulate or NGPU, or a network without BatchNorm"
        )
    return model


def build_trainer(recipe: Recipe, model: nn.Module, iterations: int, card: dict) -> Trainer:
    """Puts together what a recipe asks for.

    Args:
        recipe: optimizer, schedule, augmentation, mixup, moving average, precision.
        model: on its device.
        iterations: of an epoch.
        card: what `describe` says of the model.
    """
    optimizer = create_optimizer_v2(
        parameter_groups(model, recipe.backbone_lr_scale if recipe.pretrained else 1.0),
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.schedule,
        num_epochs=recipe.epochs,
        # timm would lower the rate one iteration before a milestone.
        decay_milestones=[milestone + 0.999 / iterations for milestone in recipe.milestones],  # type: ignore[misc] # as below
        warmup_epochs=recipe.warmup * recipe.epochs,  # type: ignore[arg-type] # timm counts epochs in fractions too
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=iterations,
    )
    mixup: Mixup | SnapMix | None = None
    num_classes = len(card["class_names"])
    if recipe.snapmix:
        mixup = SnapMix(model, num_classes, recipe.snapmix, recipe.mix_prob, recipe.precision)
    elif recipe.mixup or recipe.cutmix:
        mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mix_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=num_classes,
        )
    device = next(model.parameters()).device
    model = with_enough_statistics(model, recipe.batch_size // (world_size() * recipe.accumulate), device)
    forward: Callable[[Tensor], Tensor] = model
    if world_size() > 1:
        forward = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False
        )
    if recipe.compile:
        forward = torch.compile(forward)
    return Trainer(
        model,
        optimizer,
        scheduler,
        BatchAugmentation(card["mean"], card["std"], recipe.flip, recipe.rotation, recipe.random_erasing),
        label_smoothing=recipe.label_smoothing,
        mixup=mixup,
        average=WeightAverage(model, recipe.ema_decay) if recipe.ema_decay else None,
        forward=forward,
        precision=recipe.precision,
        clip_grad=recipe.clip_grad,
        accumulate=recipe.accumulate,
        seed=recipe.seed,
    )
