"""How fast training is, loading included, beside a plain loop and timm's own: `python -m tools.bench_classification`.

Three trainings of ResNet-18 on the same images, on this machine, in turn:

- the plain torchvision loop of the study: PIL, torchvision's transforms, DataLoader, float32;
- timm's training script at its defaults. The script is no part of timm's package, so what it builds is built here by
  the same factories with the same defaults: create_loader, create_transform, batch 128, 4 workers, float32, NCHW;
- ours, with the study's recipe.

The first table is time; the second is accuracy, on smaller images so that some epochs fit.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import pandas as pd
import timm
import torch
import torchvision
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from classification.cub import FOLDER, Bird, Cub, read_cub
from classification.engine import BatchAugmentation, TrainingStream, evaluate
from classification.recipe import load_recipe
from classification.train import RECIPES, build_loader, build_trainer, start_process
from tools.data_root import resolve_data_root
from tools.errors import exits_on_user_error


class Pictures(Dataset):
    """Photographs as a plain data set has them: opened by Pillow, transformed one by one."""

    def __init__(self, birds: list[Bird], transform: Callable | None = None):
        self.birds, self.transform = birds, transform

    def __len__(self) -> int:
        return len(self.birds)

    def __getitem__(self, index: int) -> tuple:
        image = Image.open(self.birds[index].path).convert("RGB")
        return (self.transform(image) if self.transform else image), self.birds[index].label


class Plain:
    """The loop that every tutorial has: batches from a loader, float32, channels first."""

    def __init__(self, model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, device: torch.device):
        self.model, self.loader, self.optimizer, self.device = model.to(device), loader, optimizer, device

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
            loss = nn.functional.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Ours:
    """`classification.engine.Trainer` with the study's recipe; decoding is part of the first epoch."""

    def __init__(self, birds: list[Bird], classes: int, size: int, device: torch.device, lr: float):
        changes = [f"image_size={size}", f"lr={lr}", "pretrained=false"]
        self.recipe = load_recipe(RECIPES / "study.yaml", changes)
        self.birds, self.device = birds, device
        self.model = timm.create_model("resnet18", num_classes=classes).to(device, memory_format=torch.channels_last)
        self.stream = TrainingStream(len(birds), self.recipe.batch_size, seed=0)
        card = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "class_names": [""] * classes}
        self.trainer = build_trainer(self.recipe, self.model, self.stream.iterations, card)
        self.loader: DataLoader | None = None

    def epoch(self) -> float:
        """Trains an epoch and returns the percentage of its time spent waiting for data."""
        if self.loader is None:
            self.loader = build_loader(self.recipe, self.birds, self.stream, self.device, training=True)
        self.stream.start_at(self.trainer.iteration)
        return self.trainer.train_one_epoch(self.loader)["data_share"]


def contenders(
    birds: list[Bird], classes: int, size: int, device: torch.device, lr: float = 0.02
) -> dict[str, Plain | Ours]:
    """The three trainings, each with its own network."""
    plain_transform = transforms.Compose(
        [
            transforms.Resize(int(size / 0.875)),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.RandomRotation(15),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    plain_model = torchvision.models.resnet18(num_classes=classes)
    plain_loader = DataLoader(
        Pictures(birds, plain_transform), batch_size=64, shuffle=True, num_workers=2, drop_last=True
    )
    plain_optimizer = torch.optim.SGD(plain_model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)
    timm_model = timm.create_model("resnet18", num_classes=classes)
    timm_loader = create_loader(
        Pictures(birds),
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
    timm_optimizer = create_optimizer_v2(timm_model, opt="sgd", lr=0.1 * 128 / 256, weight_decay=2e-5, momentum=0.9)
    return {
        "plain torchvision loop": Plain(plain_model, plain_loader, plain_optimizer, device),
        "timm's script at its defaults": Plain(timm_model, timm_loader, timm_optimizer, device),
        "ours": Ours(birds, classes, size, device, lr),
    }


def compare_speed(birds: list[Bird], classes: int, size: int, rounds: int, device: torch.device) -> pd.DataFrame:
    """Times whole epochs of all three in turn; the first round, in which ours decodes its images, is shown apart."""
    trainings = contenders(birds, classes, size, device)
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    shares = {}
    for _ in range(rounds + 1):
        for name, training in trainings.items():
            start = time.perf_counter()
            shares[name] = training.epoch()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    table = pd.DataFrame({"first epoch, s": {name: times[0] for name, times in seconds.items()}})
    table["an epoch, s"] = [statistics.median(times[1:]) for times in seconds.values()]
    table["images/s"] = len(birds) / table["an epoch, s"]
    table["ours is faster by"] = table["an epoch, s"] / table["an epoch, s"]["ours"]
    table["waiting for data, %"] = pd.Series(shares)
    if device.type == "cuda":
        resident = _images_per_second_when_resident(trainings["ours"])
        print(f"Ours with images resident on the GPU: {resident:.0f} images/s.")
    else:
        print("Images a second on a GPU, and with images resident on it: not measured, no GPU here.")
    return table


def _images_per_second_when_resident(ours: Ours) -> float:
    ours.stream.start_at(0)
    batches = [(images.to(ours.device), labels.to(ours.device), seeds) for images, labels, seeds in ours.loader]
    ours.trainer.train_one_epoch(batches)
    return ours.trainer.train_one_epoch(batches)["images_per_second"]


def compare_accuracy(cub: Cub, size: int, epochs: int, device: torch.device) -> pd.DataFrame:
    """Trains the plain loop and ours from random weights, with equal settings, and measures both alike."""
    trainings = contenders(cub.train, len(cub.class_names), size, device, lr=0.05)
    recipe = trainings["ours"].recipe
    batches = [[(index, 0) for index in range(start, len(cub.test), 64)[:64]] for start in range(0, len(cub.test), 64)]
    test = build_loader(recipe, cub.test, batches, device)
    prepare = BatchAugmentation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    rows = {}
    for name in ("plain torchvision loop", "ours"):
        start = time.perf_counter()
        for _ in range(epochs):
            trainings[name].epoch()
        seconds = time.perf_counter() - start
        measured = evaluate(trainings[name].model, test, prepare, "float32")
        rows[name] = {
            f"{epochs} epochs, s": seconds,
            "test top-1, %": measured["validation_top1"],
            "test top-5, %": measured["validation_top5"],
        }
    return pd.DataFrame(rows).T


@exits_on_user_error
def main() -> None:
    """Reads the command line, measures and prints both tables."""
    parser = argparse.ArgumentParser(description="Speed of classification training.")
    parser.add_argument("--data", help=f"folder that holds {FOLDER}")
    parser.add_argument("--images", type=int, default=256, help="training images of the first table, multiple of 128")
    parser.add_argument("--rounds", type=int, default=1, help="epochs timed after the first")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the second table")
    arguments = parser.parse_args()

    device = start_process()
    root, _ = resolve_data_root(arguments.data, [FOLDER])
    cub = read_cub(root)
    # Evenly through the set, which is in the order of its classes.
    birds = cub.train[:: max(1, len(cub.train) // arguments.images)][: arguments.images]
    threads = torch.get_num_threads()
    print(
        f"ResNet-18 on {device}, {threads} threads, torch {torch.__version__}, timm {timm.__version__}, {root / FOLDER}"
    )
    print(f"\nA training epoch over {len(birds)} images at 224 px, median of {arguments.rounds} after the first:\n")
    print(compare_speed(birds, len(cub.class_names), 224, arguments.rounds, device).to_markdown(floatfmt=".1f"))
    print(f"\nEqual settings, {len(cub.train)} training and {len(cub.test)} test images at 64 px, random weights:\n")
    print(compare_accuracy(cub, 64, arguments.epochs, device).to_markdown(floatfmt=".1f"))


if __name__ == "__main__":
    main()
