"""What trainings will take on this machine, from a few timed steps of each: `python -m tools.estimate FILE STAGES`.

STAGES is JSON, the name of each stage with its arguments for `python -m`; what is found is added to FILE, which is JSON
too. Numbers of steps come from the schedules; weights are random, since they change no time.
"""

import argparse
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_context
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.optim import Optimizer

from classification import sweep
from classification.cub import read_cub
from classification.engine import evaluate
from classification.model import build_model
from classification.recipe import Recipe
from classification.run import Run
from classification.train import parse_args, parse_request, resolve
from common.errors import ArgumentParser, UserError, exits_on_user_error, one_line
from common.files import read_json, write_json
from common.launch import whole_number
from common.runtime import default_device, gpu_count
from detection import train_net
from detection.config import blamed_on
from detection.experiment import new_experiment
from detection.trainer import Trainer
from tools.plan import estimate_key

TIMED = 1.5  # seconds, at least, of steps that are timed
FEW = 8  # images a step where there is no GPU, so that a large network takes seconds too
BYTES_OF_DETECTION = 100  # in detections.json, about


class Estimate(NamedTuple):
    """Of a training: seconds, bytes on the disk, images of its test split and seconds that each of those takes."""

    seconds: float
    size: float
    test_images: int
    test_seconds: float


def estimate(arguments: list[str]) -> Estimate:
    """What a training takes.

    Args:
        arguments: of `python -m`: `detection.train_net`, `classification.train` or `classification.sweep`, the first
            two perhaps by way of `tools.launch`.

    Raises:
        UserError: the training could not begin: data that is missing, or an option that is wrong.
    """
    module, *words = arguments[1:] if arguments[0] == "tools.launch" else arguments
    if module == "detection.train_net":
        return _of_detector(train_net.parse_args(words))
    if module == "classification.sweep":
        args = sweep.parse_args(words)
        return _of_birds(args.recipe, _lengths(args), is_alone=True)
    return _of_birds(parse_args(words).recipe, lambda recipe: [recipe.epochs], is_alone=False)


def _of_detector(args: argparse.Namespace) -> Estimate:
    if args.start and args.output in Path(args.start).parents and not Path(args.start).exists():
        args.start = None  # an earlier stage will train it
    experiment = new_experiment(args)
    experiment.resolve()
    cfg: CfgNode = experiment.cfg
    batch = cfg.SOLVER.IMS_PER_BATCH
    trained, evaluations = cfg.SOLVER.MAX_ITER * batch, -(-cfg.SOLVER.MAX_ITER // (cfg.TEST.EVAL_PERIOD or sys.maxsize))
    cfg.MODEL.WEIGHTS = ""
    cfg.SOLVER.IMS_PER_BATCH = _few(
        batch // cfg.SOLVER.ACCUMULATE, is_of_all="SOLVER.IMS_PER_BATCH" in experiment.given
    )
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.ACCUMULATE = 1000, 1  # there is always one more step to time
    with blamed_on(experiment.given):
        trainer = Trainer(cfg, given=experiment.given)
    model = trainer.bare_model
    with EventStorage() as trainer.storage:

        def train() -> int:
            trainer.run_step()
            return cfg.SOLVER.IMS_PER_BATCH

        per_image = _seconds_per_image(train)
    test = sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TEST)
    batches = chain.from_iterable(repeat(next(iter(trainer.evaluator.loaders.values()))))
    with inference_context(model), torch.no_grad():
        per_test_image = _seconds_per_image(lambda: len(model(next(batches))))
    tested = test + min(test, cfg.TEST.VALIDATION_LOSS_IMAGES)
    seconds = trained * per_image / _processes() + evaluations * tested * per_test_image / _processes()
    size = _bytes_of_run(model, trainer.optimizer, has_average=trainer.averaging is not None)
    size += test * cfg.TEST.DETECTIONS_PER_IMAGE * BYTES_OF_DETECTION
    return Estimate(seconds, size, test, per_test_image)


def _of_birds(words: list[str], lengths_of: Callable[[Recipe], list[int]], is_alone: bool) -> Estimate:
    request = parse_request(words)
    _, recipe, root, _ = resolve(request)
    cub = read_cub(root)
    device = torch.device(default_device())
    lengths = lengths_of(recipe)
    batch = _few(recipe.batch_size // recipe.accumulate, is_of_all=bool(request.setting("batch_size")) and not is_alone)
    held_out = round(recipe.holdout * len(cub.train))
    validated = held_out or len(cub.test)
    trained = (len(cub.train) - held_out) // recipe.batch_size * recipe.batch_size
    if trained == 0:
        raise UserError(f"batch_size={recipe.batch_size}: expected at most the {len(cub.train)} training images")
    batch = 2 * max(1, min(batch, len(cub.train)) // 2)  # mixup wants pairs, and BatchNorm more than one image
    # Of few photographs, since those of a run are decoded once.
    few = dataclasses.replace(cub, train=cub.train[: 4 * batch], test=cub.test[: 4 * batch])
    short = dataclasses.replace(recipe, pretrained=False, weights=None, holdout=0.0, epochs=1000, accumulate=1)
    short = dataclasses.replace(short, batch_size=batch, lr=1e-9)  # at which nothing diverges
    model = build_model(recipe.model, len(cub.class_names), drop_rate=recipe.drop_rate)
    run = Run(short, few, model, device)
    batches = iter(run.loader)

    def train() -> int:
        run.trainer.train(batches, 1)
        return short.batch_size

    per_image = _seconds_per_image(train)
    loader = run.validation_loader

    def test() -> int:
        evaluate(run.model, loader, run.prepare, recipe.precision)
        return len(few.test)

    per_test_image = _seconds_per_image(test)
    alone = trained * per_image + validated * per_test_image
    seconds = sum(epochs * alone + len(cub.test) * per_test_image for epochs in lengths) / _processes()
    size = _bytes_of_run(run.model, run.trainer.optimizer, has_average=bool(recipe.ema_decay))
    return Estimate(seconds, size * len(lengths), len(cub.test), per_test_image)


def _lengths(args: argparse.Namespace) -> Callable[[Recipe], list[int]]:
    """Epochs of each trial of a sweep."""
    if args.kind == "pretraining":
        return lambda recipe: [recipe.epochs] * 2
    return lambda recipe: (args.epochs or [recipe.epochs]) * len(args.lrs)


def _few(batch: int, is_of_all: bool) -> int:
    """What one process takes of a batch, which is that of all of them where the user has given it; on a CPU a few."""
    share = max(1, batch // _processes()) if is_of_all else batch
    return share if default_device() == "cuda" else min(share, FEW)


def _processes() -> int:
    """How many work on a training."""
    return whole_number("NGPU", max(gpu_count(), 1), 1)


def _seconds_per_image(step: Callable[[], int]) -> float:
    """Seconds an image in the fastest of some steps, each of which returns how many it took; the first is left out."""
    step()
    _wait()
    fastest, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < TIMED:
        start = time.perf_counter()
        images = step()
        _wait()
        fastest = min(fastest, (time.perf_counter() - start) / images)
    return fastest


def _wait() -> None:
    if default_device() == "cuda":
        torch.cuda.synchronize()


def _bytes_of_run(model: nn.Module, optimizer: Optimizer, has_average: bool) -> int:
    """Of `model_best.pth`, which holds weights, and `model_last.pth`, which holds all that goes on."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    values = [value for state in optimizer.state.values() for value in state.values()]
    return weights * (3 if has_average else 2) + sum(value.nbytes for value in values if isinstance(value, Tensor))


@exits_on_user_error
def main() -> None:
    """Estimates what is not in the file yet.

    Raises:
        UserError: a stage could not begin; the message names it.
    """
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("stages", type=json.loads)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # what a training says of itself, it will say when it runs
    known: dict[str, Any] = read_json(args.file, "an object of stages: delete it") if args.file.exists() else {}
    for name, arguments in args.stages.items():
        key = estimate_key(arguments)
        if key not in known:
            try:
                known[key] = estimate(arguments)._asdict()
            except Exception as error:
                if (line := one_line(error)) is None:
                    raise
                raise UserError(f"{name}: {line}") from None
            write_json(args.file, known)


if __name__ == "__main__":
    main()
