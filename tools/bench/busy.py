"""Our networks on a machine that does something else at the same time: quiet, and beside one process that loops.

Each job lives in a process of its own, as a command line would run it, and so does what is busy: a process that the
job itself had started would be no other one.
"""

import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from classification.engine import BatchAugmentation, predict_logits
from classification.model import build_model
from classification.recipe import load_recipe
from classification.run import build_trainer
from classification.train import RECIPES, start_process
from common.runtime import default_device, keep_freed_memory, most_threads
from common.threads import INTERVAL, TRAINING_INTERVAL
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
            threads = process.submit(prepare_job, root, job).result()
            seconds = measure(partial(_elsewhere, process), rounds)
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
    model = build_model("resnet18", CLASSES).to(device).to(memory_format=torch.channels_last)
    recipe = load_recipe(RECIPES / "study.yaml", ["pretrained=false"])
    card = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "class_names": [""] * CLASSES}
    trainer = build_trainer(recipe, model, 1000, card)
    images = torch.randint(256, (64, 3, 224, 224), dtype=torch.uint8)
    labels, seeds = torch.randint(CLASSES, (64,)), torch.arange(64)
    prepare = BatchAugmentation(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return (
        lambda: predict_logits(model, [(images[:1], labels[:1])], prepare),  # type: ignore[arg-type]
        lambda: trainer.train(iter([(images, labels, seeds)]), 1),
    )


NETWORKS = {"ResNet-18": resnet_jobs, "YOLOv3": yolov3_jobs, "Faster R-CNN": faster_rcnn_jobs}
JOBS = [f"{network}, {task}" for network in NETWORKS for task in ("inference", "training step")]


_prepared: list[Callable[[], float]] = []  # in the process of a job, what times it


def prepare_job(root: Path, job: str) -> int:
    """Readies one of `JOBS` in this process for `time_job`; returns the threads that compute on a quiet machine."""
    network, task = job.split(", ")
    if default_device() == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        inference, step = NETWORKS[network](root, Path(folder))
    run, interval = (inference, INTERVAL) if task == "inference" else (step, TRAINING_INTERVAL)
    run()
    # Until what follows the load has seen none but the present one.
    _prepared[:] = [partial(seconds_once_settled, run, repeats(run, LEAST_SECONDS), 2 * interval)]
    return most_threads()


def time_job() -> float:
    """Seconds of the job that this process has readied."""
    return _prepared[0]()


def seconds_once_settled(run: Job, times: int, settling: float) -> float:
    """Mean seconds of so many runs, after runs for `settling` seconds that do not count."""
    settled = time.monotonic() + settling
    while time.monotonic() < settled:
        run()
    return seconds_of(partial(several, run, times)) / times


def _elsewhere(process: ProcessPoolExecutor) -> float:
    return process.submit(time_job).result()


def measure(job: Callable[[], float], rounds: int) -> dict[str, list[float]]:
    """Seconds in each round, `quiet` and `busy`: what a job returns, with and without a busy process beside it."""
    seconds: dict[str, list[float]] = {"quiet": [], "busy": []}
    for _ in range(rounds):
        for state, beside in (("quiet", nullcontext), ("busy", busy_process)):
            with beside():
                seconds[state].append(job())
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
