"""Training and measuring: model and batches in, numbers out; no files and no command line."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from classification.snapmix import SnapMix
from common.averaging import WeightAverage
from common.processes import no_sync_before_last, rank, share_buffers, world_size
from common.runtime import autocast, gradient_scaler, to_device
from common.stream import derive_seed
from common.weights import resume_optimizer

Batch = tuple[Tensor, Tensor, Tensor]  # uint8 images (B, 3, S, S), labels (B,), seeds (B,)


class BatchAugmentation:
    """Turns a batch of uint8 images into the network's input: normalised, rotated, flipped, erased.

    Flip and rotation are one resampling of the whole batch. What is drawn for an image depends on its seed alone.

    Args:
        mean: of each channel, for images of range 0 to 1.
        std: of each channel.
        flip: probability of a horizontal flip.
        rotation: largest angle in degrees; corners that come into sight have the mean colour.
        random_erasing: probability that a rectangle of 2 to 33 % of the image gets the mean colour.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        flip: float = 0.0,
        rotation: float = 0.0,
        random_erasing: float = 0.0,
    ):
        self.mean, self.std = 255 * torch.tensor(mean).view(3, 1, 1), 255 * torch.tensor(std).view(3, 1, 1)
        self.flip, self.rotation, self.random_erasing = flip, rotation, random_erasing

    def __call__(self, images: Tensor, seeds: Iterable[int] | None = None) -> Tensor:
        """Prepares a batch.

        Args:
            images: uint8, (B, 3, S, S).
            seeds: one an image; without them nothing is drawn, as in testing.

        Returns:
            float32, (B, 3, S, S), channels last in memory.
        """
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        batch = images.contiguous(memory_format=torch.channels_last).float().sub_(self.mean).div_(self.std)
        if seeds is None:
            return batch
        draws = [random.Random(seed) for seed in seeds]
        if self.rotation:
            theta = to_device([self._transform(draw) for draw in draws], images.device).view(-1, 2, 3)
            grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
            batch = functional.grid_sample(batch, grid, align_corners=False)
        elif self.flip:
            is_flipped = to_device([draw.random() < self.flip for draw in draws], images.device)
            batch = torch.where(is_flipped.view(-1, 1, 1, 1), batch.flip(3), batch)
        if self.random_erasing:
            sides = to_device([self._rectangle(draw, *batch.shape[2:]) for draw in draws], images.device)
            top, left, bottom, right = sides.view(-1, 4, 1, 1).unbind(1)
            row = torch.arange(batch.shape[2], device=images.device)[:, None]
            column = torch.arange(batch.shape[3], device=images.device)
            inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
            batch = batch.masked_fill(inside[:, None], 0.0)
        return batch.contiguous(memory_format=torch.channels_last)

    def _transform(self, draw: random.Random) -> list[float]:
        """The matrix that sends a point of the result to one of the image, both in [-1, 1], row by row."""
        sign = -1.0 if draw.random() < self.flip else 1.0
        angle = math.radians(draw.uniform(-self.rotation, self.rotation))
        cos, sin = math.cos(angle), math.sin(angle)
        return [sign * cos, -sign * sin, 0.0, sin, cos, 0.0]

    def _rectangle(self, draw: random.Random, height: int, width: int) -> list[int]:
        """Top, left, bottom and right of the erased rectangle, the last two exclusive; all 0 for none.

        Source: Z. Zhong et al. Random Erasing Data Augmentation. AAAI 2020, algorithm 1, with the ranges of timm.
        """
        if draw.random() >= self.random_erasing:
            return [0, 0, 0, 0]
        while True:
            area = height * width * draw.uniform(0.02, 1 / 3)
            ratio = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top, left = draw.randint(0, height - h), draw.randint(0, width - w)
                return [top, left, top + h, left + w]


class Trainer:
    """One run's moving parts and the loop over an epoch; everything it needs to go on is in `state_dict`.

    Args:
        model: on its device, channels last.
        optimizer: of its parameters.
        scheduler: timm's, stepping by iterations; a function of the iteration alone.
        augment: from uint8 images to the network's input.
        label_smoothing: share of the target spread over all classes.
        mixup: timm's mixup and CutMix, which then does the smoothing, or SnapMix.
        average: of the weights.
        forward: the model as it is called, when it is wrapped (compiled, distributed).
        precision: see `common.runtime.autocast`.
        clip_grad: largest norm of the gradient, 0 for no limit.
        accumulate: micro-batches that a batch is split into; their gradients are added up.
        seed: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        augment: BatchAugmentation,
        *,
        label_smoothing: float = 0.0,
        mixup: Mixup | SnapMix | None = None,
        average: WeightAverage | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
        precision: str = "auto",
        clip_grad: float = 0.0,
        accumulate: int = 1,
        seed: int = 0,
    ):
        self.model, self.optimizer, self.scheduler, self.augment = model, optimizer, scheduler, augment
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if isinstance(mixup, Mixup) else label_smoothing)
        self.mixup, self.average, self.forward = mixup, average, forward or model
        self.precision, self.clip_grad, self.accumulate, self.seed = precision, clip_grad, accumulate, seed
        self.device = next(model.parameters()).device
        self.grad_scaler = gradient_scaler(self.device, precision)
        self.iteration = 0
        # Sums over the images of this epoch so far, in all processes: loss, correct answers, number of images.
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)

    @property
    def evaluated_model(self) -> nn.Module:
        """What is validated and kept: the model with the average of its weights where there is one."""
        return self.average.module if self.average else self.model

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint: `model`, `average` if there is one, and under `trainer` whatever else a step changes."""
        average = {"average": self.average.module.state_dict()} if self.average else {}
        return {
            "model": self.model.state_dict(),
            **average,
            "trainer": {
                "iteration": self.iteration,
                "sums": self.sums,
                "optimizer": self.optimizer.state_dict(),
                "grad_scaler": self.grad_scaler.state_dict(),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`; settings of optimizer and schedule stay as they are here."""
        self.model.load_state_dict(state["model"])
        if self.average and "average" in state:
            self.average.module.load_state_dict(state["average"])
        trainer = state["trainer"]
        self.iteration = trainer["iteration"]
        self.sums.copy_(trainer["sums"])
        resume_optimizer(self.optimizer, trainer["optimizer"])
        if trainer["grad_scaler"]:  # empty if the run did not scale gradients
            self.grad_scaler.load_state_dict(trainer["grad_scaler"])

    def train(
        self, batches: Iterator[Batch], iterations: int, on_iteration: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Trains to the end of an epoch.

        Args:
            batches: of the training stream, from the present iteration on.
            iterations: left of the epoch.
            on_iteration: called after every iteration.

        Returns:
            train_loss; train_top1 in percent, on augmented images and, with mixup, against the first label; lr;
            images_per_second over all processes; data_share, the percentage of time spent waiting for images.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self.model.train()
        waited, images_seen, start = 0.0, 0, time.perf_counter()
        for _ in range(iterations):
            asked = time.perf_counter()
            images, labels, seeds = next(batches)
            waited += time.perf_counter() - asked
            # Dropout, mixup and the like: the same draws whether or not the run was interrupted before.
            _seed_everything(derive_seed(self.seed, "step", self.iteration, rank()))
            images = self.augment(images.to(self.device, non_blocking=True), seeds.tolist())
            self._step(images, labels.to(self.device, non_blocking=True))
            images_seen += len(images)
            on_iteration()
        loss, correct, count = self.sums.tolist()
        self.sums.zero_()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss became {loss} before iteration {self.iteration}")
        seconds = time.perf_counter() - start
        return {
            "train_loss": loss / count,
            "train_top1": 100 * correct / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images_seen * world_size() / seconds,
            "data_share": 100 * waited / seconds,
        }

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.scheduler.step_update(self.iteration)
        images, targets = self.mixup(images, labels) if self.mixup else (images, labels)
        self.optimizer.zero_grad()
        loss, logits = self._accumulate(images, targets)
        if self.clip_grad:
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.average:
            self.average.update(self.model, self.iteration)
        self.iteration += 1
        with torch.no_grad():
            count = len(labels)
            correct = (logits.argmax(1) == labels).sum()
            sums = torch.stack([loss * count, correct, torch.full_like(correct, count)]).to(self.sums)
            if world_size() > 1:
                dist.all_reduce(sums)
            self.sums += sums

    def _accumulate(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Adds up the gradients of the parts of a batch; returns the mean loss and the logits (B, C)."""
        losses, logits = [], []
        for number, (part, wanted) in enumerate(
            zip(images.chunk(self.accumulate), targets.chunk(self.accumulate), strict=True), start=1
        ):
            with no_sync_before_last(self.forward, number == self.accumulate):
                with autocast(self.device, self.precision):
                    logits.append(self.forward(part))
                losses.append(self.criterion(logits[-1].float(), wanted) / self.accumulate)
                self.grad_scaler.scale(losses[-1]).backward()
        return torch.stack(losses).sum().detach(), torch.cat(logits).detach()


def predict_logits(
    model: nn.Module, loader: DataLoader, prepare: BatchAugmentation, precision: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Runs the model over all batches.

    Returns:
        Logits, float32 (N, C), and labels, int64 (N,), both on the CPU, in the order of the loader.
    """
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    with torch.inference_mode(), autocast(device, precision):
        for images, targets in loader:
            logits.append(model(prepare(images.to(device, non_blocking=True))).float())
            labels.append(targets)
    return torch.cat(logits).cpu(), torch.cat(labels)


def evaluate(
    model: nn.Module, loader: DataLoader, prepare: BatchAugmentation, precision: str = "auto"
) -> dict[str, float]:
    """Measures the model, with the buffers of the first process, on the batches of all processes.

    Returns:
        loss (cross entropy without smoothing), top1 and top5 in percent.
    """
    share_buffers(model)
    logits, labels = predict_logits(model, loader, prepare, precision)
    device = next(model.parameters()).device
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    means = torch.stack([functional.cross_entropy(logits, labels), top1, top5]).double()
    sums = torch.cat([means * len(labels), torch.tensor([len(labels)])]).to(device)
    if world_size() > 1:
        dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count}


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
