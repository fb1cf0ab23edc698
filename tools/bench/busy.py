"""Our networks on a machine that does something else at the same time: quiet, and beside one process that loops.

Each job lives in a process of its own, as a command line would run it.
"""

import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pandas as pd
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from classification.engine import BatchAugmentation, predict_logits
from classification.recipe import load_recipe
from classification.run import build_trainer
from classification.train import RECIPES, start_process
from common.runtime import default_device, keep_freed_memory, leave_cores
from tools.bench import faster_rcnn, yolov3
from tools.bench.timing import ROUNDS, our_precision, repeats, seconds_of, several

CLASSES = 200  # of birds
LEAST_SECONDS = 2.0  # of what is timed at once: the scheduler takes its time to share the cores out
LOOP = "print(flush=True)\nwhile True:\n    pass"
Job = Callable[[], object]


def busy(root: Path, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times inference and a training step of all three networks, quiet and beside one busy process, in turn.

    A ratio of 2 means that one thread shares its core with the other process, and all other threads wait for it.

    Args:
        root: data root; its first training images are resized and taken.
        rounds: timed ones, after one of warm-up.

    Raises:
        UserError: a job lacks its data.
    """
    table = []
    for job in JOBS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            seconds, threads = process.submit(time_job, root, job, rounds).result()
        quiet, beside = (statistics.median(seconds[state]) for state in ("quiet", "busy"))
        table.append(
            {"what": job, "precision": our_precision(default_device()), "threads": threads}
            | {"quiet, s": quiet, "busy, s": beside, "busy / quiet": beside / quiet}
            | {"slowest busy, s": max(seconds["busy"])}
        )
    return pd.DataFrame(table)


def faster_rcnn_jobs(root: Path, _: Path) -> tuple[Job, Job]:
    """Faster R-CNN R50-FPN at 600 x 800: an image to detect on, a step of two."""
    samples, device = faster_rcnn.read_samples(root, 2, (600, 800)), default_device()
    model = faster_rcnn.build_ours(samples, device)[2]
    leave_cores(model)
    ours = faster_rcnn.Detector("ours", our_precision(device), model)
    return partial(ours.detect, samples[:1]), partial(ours.step, samples)


def yolov3_jobs(root: Path, folder: Path) -> tuple[Job, Job]:
    """YOLOv3 Darknet-53 at 416 x 416: an image to detect on, a step of four."""
    samples = yolov3.read_samples(root, 4, (416, 416))
    ours = yolov3.ours(*yolov3.build_network(samples, default_device()), folder)
    assert ours.step
    return partial(ours.detect, samples[:1]), partial(ours.step, samples)


def resnet_jobs(_: Path, __: Path) -> tuple[Job, Job]:
    """ResNet-18 at 224 x 224 on noise: an image to recognise, a step of 64."""
    device = start_process()
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=CLASSES).to(device).to(memory_format=torch.channels_last)
    recipe = load_recipe(RECIPES / "study.yaml", ["pretrained=false"])
    card = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "class_names": [""] * CLASSES}
    trainer = build_trainer(recipe, model, 1000, card)
    leave_cores(model)
    images = torch.randint(256, (64, 3, 224, 224), dtype=torch.uint8)
    labels, seeds = torch.randint(CLASSES, (64,)), torch.arange(64)
    prepare = BatchAugmentation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return (
        lambda: predict_logits(model, [(images[:1], labels[:1])], prepare),  # type: ignore[arg-type]
        lambda: trainer.train(iter([(images, labels, seeds)]), 1),
    )


NETWORKS = {"ResNet-18": resnet_jobs, "YOLOv3": yolov3_jobs, "Faster R-CNN": faster_rcnn_jobs}
JOBS = [f"{network}, {task}" for network in NETWORKS for task in ("inference", "training step")]


def time_job(root: Path, job: str, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of one of `JOBS`, as `measure` gives them, and the threads that computed."""
    network, task = job.split(", ")
    if default_device() == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        inference, step = NETWORKS[network](root, Path(folder))
        return measure(inference if task == "inference" else step, rounds), torch.get_num_threads()


def measure(run: Job, rounds: int) -> dict[str, list[float]]:
    """Seconds of a run in each round, `quiet` and `busy`."""
    run()
    times = repeats(run, LEAST_SECONDS)
    repeated = partial(several, run, times)
    seconds: dict[str, list[float]] = {"quiet": [], "busy": []}
    for _ in range(rounds):
        for state, beside in (("quiet", nullcontext), ("busy", busy_process)):
            with beside():
                repeated()  # until the scheduler, and what follows the load, have settled
                seconds[state].append(seconds_of(repeated) / times)
    return seconds


@contextmanager
def busy_process() -> Iterator[None]:
    """Keeps one core busy, as far as the others let it."""
    with subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()  # it has begun
        try:
            yield
        finally:
            process.kill()
