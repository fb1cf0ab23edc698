"""Training a classifier, loading included, beside a plain loop and timm's own.

Three trainings of ResNet-18 on the same images, on this machine, in turn:

- the plain torchvision loop of the study: PIL, torchvision's transforms, DataLoader, float32;
- timm's training script at its defaults. The script is no part of timm's package, so what it builds is built here by
  the same factories with the same defaults: create_loader, create_transform, batch 128, 4 workers, float32, NCHW;
- ours, with the study's recipe.

Where ours computes in a reduced precision, the first two are also timed that way: channels last, under autocast.

Each lives in a process of its own, so that what ours sets for its process (the memory allocator) helps no other.
"""

import itertools
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from classification.cub import Bird, read_cub
from classification.data_loader import BirdStream, build_test_loader, build_training_loader
from classification.engine import Batch, BatchAugmentation, evaluate
from classification.recipe import load_recipe
from classification.run import build_trainer
from classification.train import RECIPES, start_process
from common.runtime import default_device
from tools.bench.timing import (
    ROUNDS,
    Contender,
    at_precision,
    in_turn,
    our_precision,
    rival_precisions,
    rows,
    seconds_of,
)


class Pictures(Dataset):
    """Photographs as a plain data set has them: opened by Pillow, transformed one by one."""

    def __init__(self, birds: list[Bird], transform: Callable | None = None):
        self.birds, self.transform = birds, transform

    def __len__(self) -> int:
        return len(self.birds)

    def __getitem__(self, index: int) -> tuple:
        image = Image.open(self.birds[index].path).convert("RGB")
        return (self.transform(image) if self.transform else image), self.birds[index].label


class Measured:
    """A training whose network can be measured on other photographs."""

    model: nn.Module

    def accuracy(self, birds: list[Bird], size: int) -> dict[str, float]:
        """Top-1 and top-5 in float32 on centre crops."""
        loader = build_test_loader(birds, size, 0.875, batch_size=64, workers=0)
        prepare = BatchAugmentation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        measured = evaluate(self.model, loader, prepare, "float32")
        return {"test top-1, %": measured["top1"], "test top-5, %": measured["top5"]}


class Plain(Measured):
    """The loop that every tutorial has: batches from a loader, float32, channels first."""

    def __init__(self, model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, device: torch.device):
        self.model, self.loader, self.optimizer, self.device = model, loader, optimizer, device

    def epoch(self) -> float:
        """Trains an epoch and returns the percentage of its time spent waiting for data."""
        self.model.train()
        waited, start = 0.0, time.perf_counter()
        batches = iter(self.loader)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                return 100 * waited / (time.perf_counter() - start)
            images, labels = (tensor.to(self.device) for tensor in batch)
            loss = nn.functional.cross_entropy(self.model(images).float(), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Ours(Measured):
    """`classification.engine.Trainer` with the study's recipe; decoding is part of the first epoch."""

    def __init__(self, birds: list[Bird], classes: int, size: int, device: torch.device, lr: float):
        changes = [f"image_size={size}", f"lr={lr}", "pretrained=false"]
        self.recipe = load_recipe(RECIPES / "study.yaml", changes)
        self.birds, self.device = birds, device
        self.model = timm.create_model("resnet18", num_classes=classes).to(device).to(memory_format=torch.channels_last)
        self.iterations = len(birds) // self.recipe.batch_size
        card = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "class_names": [""] * classes}
        self.trainer = build_trainer(self.recipe, self.model, self.iterations, card)

    @cached_property
    def batches(self) -> Iterator[Batch]:
        """Of all epochs; made as the first begins."""
        stream = BirdStream(self.recipe, self.birds)
        forever = range(1000 * self.iterations)
        return iter(build_training_loader(self.recipe, stream, forever))

    def epoch(self) -> float:
        """Trains an epoch and returns the percentage of its time spent waiting for data."""
        return self.trainer.train(self.batches, self.iterations)["data_share"]

    def resident(self) -> float:
        """Images a second when every batch is on the device already."""
        batches = [
            (images.to(self.device), labels.to(self.device), seeds)
            for images, labels, seeds in itertools.islice(self.batches, self.iterations)
        ]
        self.trainer.train(iter(batches), self.iterations)
        return self.trainer.train(iter(batches), self.iterations)["images_per_second"]


PLAIN, TIMM, OURS = "plain torchvision loop", "timm's script at its defaults", "ours"

Settings = tuple[str, str, list[Bird], int, int, float]  # what `build` takes


def build(name: str, precision: str, birds: list[Bird], classes: int, size: int, lr: float) -> Plain | Ours:
    """Builds one of the three trainings in this process, from the same seed; ours chooses its precision itself."""
    torch.manual_seed(0)
    if name == OURS:
        return Ours(birds, classes, size, start_process(), lr)
    device = torch.device(default_device())
    if name == PLAIN:
        transform = transforms.Compose(
            [
                transforms.Resize(int(size / 0.875)),
                transforms.CenterCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(15),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )
        model = timm.create_model("resnet18", num_classes=classes).to(device)  # as ours begins, weight by weight
        model = at_precision(model, precision, device.type)
        loader = DataLoader(Pictures(birds, transform), batch_size=64, shuffle=True, num_workers=2, drop_last=True)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
        return Plain(model, loader, optimizer, device)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # timm's default of 4 workers on fewer cores
    model = at_precision(timm.create_model("resnet18", num_classes=classes).to(device), precision, device.type)
    loader = create_loader(
        Pictures(birds),  # type: ignore[arg-type] # timm takes any data set that has a `transform`
        input_size=(3, size, size),
        batch_size=128,
        is_training=True,
        num_workers=4,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        color_jitter=0.4,
        interpolation="random",
        device=device,
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1 * 128 / 256, weight_decay=2e-5, momentum=0.9)
    return Plain(model, loader, optimizer, device)


training: Plain | Ours  # of this process


def begin(*settings: *Settings) -> None:
    """Builds the training of this process."""
    global training
    training = build(*settings)


def call(method: str, *arguments: object) -> Any:
    """Calls a method of this process's training; on return a GPU has done all of it."""
    answer = getattr(training, method)(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return answer


class Process:
    """One of the three trainings in its own process, built before anything is timed; it waits for its turn."""

    def __init__(self, *settings: *Settings):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pool.submit(begin, *settings).result()

    def __call__(self, method: str, *arguments: object) -> Any:
        """Calls a method of the training and returns its result."""
        return self.pool.submit(call, method, *arguments).result()

    def close(self) -> None:
        """Ends the process."""
        self.pool.shutdown()


def training_epoch(root: Path, images: int = 256, size: int = 224, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times whole epochs of all in turn, loading included.

    The first round, in which ours decodes its images, stands apart.

    Args:
        root: data root with CUB_200_2011.
        images: training images, a multiple of 128, taken evenly through the set.
        size: side of what the network sees, in pixels.
        rounds: epochs that count after the first.
    """
    cub, device = read_cub(root), default_device()
    birds = cub.train[:: max(1, len(cub.train) // images)][:images]  # the set is in the order of its classes
    ways = [(OURS, our_precision(device)), *itertools.product((PLAIN, TIMM), rival_precisions(device))]
    trainings = [Process(*way, birds, len(cub.class_names), size, 0.02) for way in ways]
    shares = [math.nan] * len(ways)

    def epoch(number: int) -> None:
        shares[number] = trainings[number]("epoch")

    contenders = [Contender(name, partial(epoch, number), precision) for number, (name, precision) in enumerate(ways)]
    seconds = in_turn(contenders, rounds)
    on_gpu: dict[str, str | float] = {"what": "the same with images resident on an NVIDIA GPU"}
    on_gpu |= {"images/s": trainings[0]("resident")} if device == "cuda" else {"by": "not measured: none here"}
    for training in trainings:
        training.close()
    what = f"ResNet-18, epoch of {len(birds)} images, {size} px"
    table = pd.DataFrame(rows(what, contenders, [times[1:] for times in seconds], len(birds)))
    table["first epoch, s"] = [times[0] for times in seconds]
    table["waiting for data, %"] = shares
    return pd.concat([table, pd.DataFrame([on_gpu])], ignore_index=True)


def training_accuracy(root: Path, size: int = 64, epochs: int = 6) -> pd.DataFrame:
    """Trains the plain loop and ours from random weights, with equal settings, and measures both alike.

    Args:
        root: data root with CUB_200_2011.
        size: side of what the network sees, in pixels; small, so that some epochs fit.
        epochs: of each training.
    """
    cub = read_cub(root)
    table = []
    for name, precision in ((OURS, our_precision(default_device())), (PLAIN, "float32")):
        training = Process(name, precision, cub.train, len(cub.class_names), size, 0.05)
        seconds = seconds_of(lambda training=training: [training("epoch") for _ in range(epochs)])  # type: ignore[misc]
        what = f"ResNet-18, {epochs} epochs of {len(cub.train)} images, {size} px"
        accuracy = training("accuracy", cub.test, size)
        table.append({"what": what, "by": name, "precision": precision, "s": seconds} | accuracy)
        training.close()
    return pd.DataFrame(table)
