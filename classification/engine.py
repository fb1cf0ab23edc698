"""Training and measuring: model and batches in, numbers out; no files and no command line."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, accuracy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Sampler


def derive_seed(*numbers: int) -> int:
    """A seed below 2^63 that depends on all `numbers` and their order."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


class TrainingStream(Sampler[list[tuple[int, int]]]):
    """The order of training images: batches of `(index, seed)`, the same whoever asks.

    Every epoch is a new permutation without the incomplete last batch. The image at position p of the stream, and the
    seed of everything drawn for it, depend on the run's seed and p alone: not on the number of processes, which only
    share the batches out, nor on where a resumed run starts.

    Args:
        length: number of training images.
        batch_size: images a step, over all processes.
        seed: of the run.
        rank: which of the processes this is.
        ranks: how many there are; divides `batch_size`.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1):
        self.length, self.batch_size, self.seed, self.rank, self.ranks = length, batch_size, seed, rank, ranks
        self.iterations = length // batch_size
        self.start = 0

    def start_at(self, iteration: int) -> None:
        """Makes the next pass begin at this iteration of the run and end with its epoch."""
        self.start = iteration

    def __len__(self) -> int:
        return self.iterations - self.start % self.iterations

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.start, self.iterations)
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(derive_seed(self.seed, epoch)))
        share = self.batch_size // self.ranks
        for iteration in range(first, self.iterations):
            begin = iteration * self.batch_size + self.rank * share
            position = epoch * self.iterations * self.batch_size + begin
            yield [
                (index, derive_seed(self.seed, 1, position + offset))
                for offset, index in enumerate(order[begin : begin + share].tolist())
            ]


class BatchAugmentation:
    """From a batch of uint8 images to what the network eats: normalised, turned, flipped, erased.

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
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.flip, self.rotation = flip, rotation
        self.erase = RandomErasing(random_erasing, mode="const", device="cpu") if random_erasing else None

    def __call__(self, images: Tensor, seeds: Iterable[int] | None = None) -> Tensor:
        """Prepares a batch.

        Args:
            images: uint8, (B, 3, S, S).
            seeds: one an image; without them nothing is drawn, as in testing.

        Returns:
            float32, (B, 3, S, S), channels last in memory.
        """
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        batch = images.contiguous(memory_format=torch.channels_last)
        batch = batch.float().sub_(255 * mean).div_(255 * std)
        if seeds is None:
            return batch
        draws = [random.Random(seed) for seed in seeds]
        if self.flip or self.rotation:
            transforms = [self._transform(draw) for draw in draws]
            theta = torch.tensor(transforms, device=images.device).view(-1, 2, 3)
            grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
            batch = functional.grid_sample(batch, grid, align_corners=False)
        if self.erase:
            state = random.getstate()
            for image, draw in zip(batch, draws, strict=True):
                random.seed(draw.getrandbits(64))  # timm's RandomErasing draws from Python's global generator
                self.erase(image)
            random.setstate(state)
        return batch.contiguous(memory_format=torch.channels_last)

    def _transform(self, draw: random.Random) -> list[float]:
        """The matrix that sends a point of the result to one of the image, both in [-1, 1], row by row."""
        sign = -1.0 if draw.random() < self.flip else 1.0
        angle = math.radians(draw.uniform(-self.rotation, self.rotation))
        cos, sin = math.cos(angle), math.sin(angle)
        return [sign * cos, -sign * sin, 0.0, sin, cos, 0.0]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which the network runs: bfloat16 where its operators allow it, or plain float32.

    Args:
        device: of the model.
        precision: `bfloat16`, `float32`, or `auto`: the first where the hardware computes with it.
    """
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bfloat16()
        precision = "bfloat16" if fast else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Trainer:
    """One run's moving parts and the loop over an epoch; everything it needs to go on is in `state_dict`.

    Args:
        model: on its device, channels last.
        optimizer: of its parameters.
        scheduler: timm's, stepping by iterations; a function of the iteration alone.
        augment: from uint8 images to the network's input.
        label_smoothing: share of the target spread over all classes.
        mixup: timm's mixup and CutMix, which then does the smoothing.
        ema: moving average of the weights.
        forward: the model as it is called, when it is wrapped (compiled, distributed).
        precision: see `autocast`.
        clip_grad: largest norm of the gradient, 0 for no limit.
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
        mixup: Mixup | None = None,
        ema: ModelEmaV3 | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
        precision: str = "auto",
        clip_grad: float = 0.0,
        seed: int = 0,
    ):
        self.model, self.optimizer, self.scheduler, self.augment = model, optimizer, scheduler, augment
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else label_smoothing)
        self.mixup, self.ema, self.forward = mixup, ema, forward or model
        self.precision, self.clip_grad, self.seed = precision, clip_grad, seed
        self.device = next(model.parameters()).device
        self.iteration = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, images of this epoch

    @property
    def measured_model(self) -> nn.Module:
        """The model to validate and keep: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def state_dict(self) -> dict:
        """Everything that a step changes; the same in all processes once `sums` are added up."""
        return {
            "iteration": self.iteration,
            "sums": self.sums,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a `state_dict` of a run with the same settings."""
        self.iteration = state["iteration"]
        if _rank() == 0:  # the sums are those of all processes
            self.sums.copy_(state["sums"])
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])

    def train_one_epoch(self, loader: DataLoader, on_iteration: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Trains from the present iteration to the end of its epoch.

        Args:
            loader: batches of a `TrainingStream` that starts at `self.iteration`.
            on_iteration: called after every iteration.

        Returns:
            train_loss; train_top1 in percent, on augmented images and, with mixup, against the first label; lr;
            images_per_second over all processes; data_share, the percentage of time spent waiting for images and
            preparing them.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self.model.train()
        waited, first, start = 0.0, self.iteration, time.perf_counter()
        batches, images_seen = iter(loader), 0
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            # Dropout, mixup and the like: the same draws whether or not the run was interrupted before.
            _seed_everything(derive_seed(self.seed, 2, self.iteration, _rank()))
            images, labels, seeds = batch
            images = self.augment(images.to(self.device, non_blocking=True), seeds.tolist())
            labels = labels.to(self.device, non_blocking=True)
            waited += time.perf_counter() - asked
            self._step(images, labels)
            images_seen += len(images)
            on_iteration()
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        loss, correct, count = sums.tolist()
        self.sums.zero_()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the training loss became {loss} before iteration {self.iteration}")
        seconds = time.perf_counter() - start
        return {
            "train_loss": loss / count,
            "train_top1": 100 * correct / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images_seen * _ranks() / seconds,
            "data_share": 100 * waited / seconds,
            "iterations": self.iteration - first,
        }

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.scheduler.step_update(self.iteration)
        images, targets = self.mixup(images, labels) if self.mixup else (images, labels)
        with autocast(self.device, self.precision):
            logits = self.forward(images)
        loss = self.criterion(logits.float(), targets)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        self.iteration += 1
        if self.ema:
            self.ema.update(self.model, step=self.iteration)
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            self.sums += torch.stack([loss.detach() * len(labels), correct, torch.tensor(len(labels))]).to(self.sums)

    def gather_sums(self) -> None:
        """Moves the sums of all processes to the first one, whose state then speaks for all."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            if _rank() != 0:
                self.sums.zero_()


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
        for images, targets, _ in loader:
            logits.append(model(prepare(images.to(device, non_blocking=True))).float().cpu())
            labels.append(targets)
    return torch.cat(logits), torch.cat(labels)


def evaluate(
    model: nn.Module, loader: DataLoader, prepare: BatchAugmentation, precision: str = "auto"
) -> dict[str, float]:
    """Measures the model on the batches of this process and, among several, of all of them.

    Returns:
        validation_loss (cross entropy without smoothing), validation_top1 and validation_top5 in percent.
    """
    logits, labels = predict_logits(model, loader, prepare, precision)
    device = next(model.parameters()).device
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    means = torch.stack([functional.cross_entropy(logits, labels), top1, top5]).double()
    sums = torch.cat([means * len(labels), torch.tensor([len(labels)])]).to(device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    return {"validation_loss": loss / count, "validation_top1": top1 / count, "validation_top5": top5 / count}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
