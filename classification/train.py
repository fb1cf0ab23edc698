"""One training run: recipe in, run folder out.

`python -m classification.train [RECIPE] [KEY=VALUE ...] [--resume]`, alone or under torchrun.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2
from tqdm import tqdm

from classification.cub import FOLDER, Bird, BirdDataset, Cub, ImageCache, hold_out, read_cub
from classification.engine import BatchAugmentation, Trainer, TrainingStream, evaluate
from classification.model import (
    PretrainedWeightsUnavailable,
    build_model,
    describe,
    parameter_groups,
    read_checkpoint,
)
from classification.recipe import Recipe, differences, load_recipe, save_recipe
from common.errors import UserError, exits_on_user_error
from tools.data_root import data_facts, resolve_data_root
from tools.run_folder import (
    append_metrics,
    create_run_folder,
    record_session,
    truncate_metrics,
    write_atomically,
    write_results,
)

logger = logging.getLogger("classification.train")

RECIPES = Path(__file__).parent / "recipes"

_NAMED_IN_RESULT = ("model", "pretrained", "weights", "lr", "epochs", "image_size", "seed")


def train(recipe: Recipe, cub: Cub, model: nn.Module, run: Path, device: torch.device) -> dict:
    """Trains a model, or goes on from `run/model_last.pth`, and keeps the best.

    Args:
        recipe: all settings.
        cub: the data set.
        model: as `build_model` made it; trained in place.
        run: an existing folder, the same in all processes.
        device: of this process.

    Returns:
        What `run/result.json` holds: `top1` and `top5` on the test split in percent, the epoch they are of, what it was
        chosen on, its validation figures, and the settings that name the run.

    Raises:
        UserError: an image cannot be read, the batch does not fit the data or the processes, or the loss diverges.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    train_birds, validation_birds = cub.train, cub.test
    chosen_on = "test split"
    if recipe.holdout:
        train_birds, validation_birds = hold_out(cub.train, recipe.holdout, recipe.seed)
        chosen_on = f"{len(validation_birds)} images held out of the training split"
    if recipe.batch_size > len(train_birds) or recipe.batch_size % ranks:
        raise UserError(
            f"batch_size={recipe.batch_size}: expected at most the {len(train_birds)} training images and a multiple of"
            f" the {ranks} processes: OPTS=batch_size=..."
        )

    model.to(device, memory_format=torch.channels_last)
    card = describe(recipe.model, model, cub.class_names, recipe.image_size, recipe.crop_pct)
    prepare = BatchAugmentation(card["mean"], card["std"])
    stream = TrainingStream(len(train_birds), recipe.batch_size, recipe.seed, rank, ranks)
    train_loader = build_loader(recipe, train_birds, stream, device, training=True)
    validation_loader = build_loader(
        recipe, validation_birds, _shares(len(validation_birds), recipe, rank, ranks), device
    )
    trainer = build_trainer(recipe, model, stream.iterations, card, ranks)

    best: dict = {}
    last = run / "model_last.pth"
    if state := _on_first_process(lambda: read_checkpoint(last) if last.is_file() else None):
        trainer.load_state_dict(state["trainer"])
        best = state["best"]
        logger.info("Resumed at iteration %d", trainer.iteration)
    writer = None
    if rank == 0:
        truncate_metrics(run, trainer.iteration)
        writer = SummaryWriter(str(run), purge_step=trainer.iteration)

    def save_last() -> None:
        _save(last, {**card, "trainer": trainer.state_dict(), "best": best})

    def on_iteration() -> None:
        epoch, done = divmod(trainer.iteration, stream.iterations)
        if done and done % recipe.checkpoint_every == 0:
            trainer.gather_sums()
            if rank == 0:
                save_last()
                logger.info("epoch %d, iteration %d/%d: checkpoint", epoch + 1, done, stream.iterations)

    while not _is_finished(recipe, trainer.iteration // stream.iterations, best):
        epoch = trainer.iteration // stream.iterations + 1
        stream.start_at(trainer.iteration)
        try:
            row = trainer.train_one_epoch(_progress(train_loader, f"epoch {epoch}/{recipe.epochs}", "it"), on_iteration)
        except FloatingPointError as error:
            raise UserError(f"{run}: {error}: the run diverged; lower the rate, LR={recipe.lr / 4:g}") from None
        row |= evaluate(trainer.measured_model, validation_loader, prepare, recipe.precision)
        is_better = not best or row["validation_top1"] > best["validation_top1"]
        if is_better:
            best = {"epoch": epoch, **{key: value for key, value in row.items() if key.startswith("validation_")}}
        if rank == 0:
            # The rows before the checkpoint, the best before the last: what a kill loses is then done again in full.
            row = {"iteration": trainer.iteration - 1, "epoch": epoch, **row}
            append_metrics(run, row)
            write_results(run)
            for key, value in row.items():
                writer.add_scalar(key, value, row["iteration"])
            if is_better:
                _save(run / "model_best.pth", {**card, **best, "model": trainer.measured_model.state_dict()})
            save_last()
            _log_epoch(row, recipe.epochs, is_better)

    if trainer.iteration < recipe.epochs * stream.iterations:
        logger.info("Stopped early: no better validation top-1 in %d epochs", recipe.patience)
    # In float32, since bfloat16 rounds the logits of likely classes to equal ones.
    model.load_state_dict(_on_first_process(read_checkpoint, run / "model_best.pth")["model"])
    test_loader = validation_loader
    if recipe.holdout:
        test_loader = build_loader(recipe, cub.test, _shares(len(cub.test), recipe, rank, ranks), device, cache=False)
    measured = evaluate(model, test_loader, prepare, "float32")
    result = {
        "top1": measured["validation_top1"],
        "top5": measured["validation_top5"],
        "chosen_on": chosen_on,
        "test_images": len(cub.test),
        "classes": len(cub.class_names),
        **best,
        **{key: getattr(recipe, key) for key in _NAMED_IN_RESULT},
    }
    if rank == 0:
        writer.close()
        write_atomically(run / "result.json", lambda file: file.write(json.dumps(result, indent=2).encode()))
    logger.info(
        "Test split, %d images: top-1 %.2f %%, top-5 %.2f %% (epoch %d, chosen on the %s)",
        *(len(cub.test), result["top1"], result["top5"], result["epoch"], chosen_on),
    )
    return result


def _is_finished(recipe: Recipe, epochs_done: int, best: dict) -> bool:
    out_of_patience = bool(recipe.patience and best) and epochs_done - best["epoch"] >= recipe.patience
    return epochs_done >= recipe.epochs or out_of_patience


def _save(path: Path, checkpoint: dict) -> None:
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def _progress(iterable: Iterable, title: str, unit: str) -> tqdm:
    """One line that vanishes when done, in the first process and in a terminal only."""
    shown = int(os.environ.get("RANK", 0)) == 0 and sys.stderr.isatty()
    return tqdm(iterable, desc=title, unit=unit, leave=False, disable=not shown)


def _log_epoch(row: dict, epochs: int, is_better: bool) -> None:
    logger.info(
        "epoch %d/%d  loss %.3f  top-1 %.2f %%  |  validation loss %.3f  top-1 %.2f %%  top-5 %.2f %%%s  |"
        "  lr %.2g  %.1f img/s  waiting for data %.1f %%",
        *(row["epoch"], epochs, row["train_loss"], row["train_top1"], row["validation_loss"], row["validation_top1"]),
        *(row["validation_top5"], " (best)" if is_better else ""),
        *(row["lr"], row["images_per_second"], row["data_share"]),
    )


def build_loader(
    recipe: Recipe,
    birds: Sequence[Bird],
    batches: Sequence[list[tuple[int, int]]] | TrainingStream,
    device: torch.device,
    training: bool = False,
    cache: bool = True,
) -> DataLoader:
    """Batches of uint8 images, labels and seeds.

    Args:
        recipe: image size, crop, cache and workers.
        birds: the photographs.
        batches: which of them make up each batch, as `(index, seed)`.
        device: where they are going.
        training: crop as for training.
        cache: whether they are looked at more than once.
    """
    size, side = recipe.image_size, int(recipe.image_size / recipe.crop_pct)
    crop = v2.CenterCrop(size)
    if training and recipe.train_crop == "random":
        crop = v2.RandomCrop(size)
    elif training and recipe.train_crop == "random_resized":
        crop = v2.RandomResizedCrop(size, scale=(recipe.crop_scale, 1.0), antialias=True)

    images = ImageCache.build(birds, side) if cache and recipe.cache else None
    # On a CPU, cropping a decoded image costs less than handing it from one process to another.
    workers = 0 if images and device.type == "cpu" else recipe.workers
    return DataLoader(
        BirdDataset(birds, side, crop, images),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def _shares(length: int, recipe: Recipe, rank: int, ranks: int) -> list[list[tuple[int, int]]]:
    """Batches of the images rank, rank + ranks, ...: every image is in exactly one process."""
    mine = [(index, 0) for index in range(rank, length, ranks)]
    size = recipe.batch_size // ranks
    return [mine[start : start + size] for start in range(0, len(mine), size)]


def build_trainer(recipe: Recipe, model: nn.Module, iterations: int, card: dict, ranks: int = 1) -> Trainer:
    """Puts together what a recipe asks for.

    Args:
        recipe: optimizer, schedule, augmentation, mixup, moving average, precision.
        model: on its device.
        iterations: of an epoch.
        card: what `describe` says of the model.
        ranks: processes that train together.
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
        decay_milestones=recipe.milestones,
        warmup_epochs=recipe.warmup * recipe.epochs,
        warmup_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=iterations,
    )
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mix_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=len(card["class_names"]),
        )
    device = next(model.parameters()).device
    forward = model
    if ranks > 1:
        forward = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
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
        ema=ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None,
        forward=forward,
        precision=recipe.precision,
        clip_grad=recipe.clip_grad,
        seed=recipe.seed,
    )


def build_model_for(recipe: Recipe, num_classes: int, is_sample: bool) -> tuple[nn.Module, Recipe]:
    """Builds the recipe's model; on the drawn sample, and only there, without weights from the hub if need be.

    Returns:
        The model, and the recipe as it was followed.
    """
    torch.manual_seed(recipe.seed)
    weights = Path(recipe.weights) if recipe.weights else None
    try:
        return build_model(recipe.model, num_classes, recipe.pretrained, weights, recipe.drop_rate), recipe
    except PretrainedWeightsUnavailable:
        if not is_sample:
            raise
        logger.warning("No ImageNet weights: the hub cannot be reached. THE SAMPLE RUN STARTS FROM RANDOM WEIGHTS.")
        torch.manual_seed(recipe.seed)
        recipe = dataclasses.replace(recipe, pretrained=False)
        return build_model(recipe.model, num_classes, drop_rate=recipe.drop_rate), recipe


def start_process() -> torch.device:
    """Joins the other processes that torchrun started, if any, and returns this one's device."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("classification").setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif sys.platform == "linux":
        # glibc hands large blocks back to the system at every free, and faulting their pages in again costs a tenth
        # of a training step on CPU: keep them (M_TRIM_THRESHOLD, M_MMAP_MAX).
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-4, 0)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


@exits_on_user_error
def main() -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description="Fine-tune a classifier on CUB-200-2011.")
    add_recipe_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the newest run of this name")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--name", help="name of the run folder, instead of the one made of model and recipe")
    arguments = parser.parse_intermixed_args()

    device = start_process()
    start = time.perf_counter()
    # The run folder's name says whether weights were loaded, so what is said before must wait for its log.txt.
    before = logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL)
    logging.getLogger("classification").addHandler(before)
    path, recipe, root, is_sample = resolve(arguments.recipe)
    cub = read_cub(root)
    model, recipe = build_model_for(recipe, len(cub.class_names), is_sample)
    name = arguments.name or run_name(recipe, path, is_sample)
    run = _on_first_process(create_run_folder, arguments.output, name, arguments.resume)
    if int(os.environ.get("RANK", 0)) == 0:
        _keep_recipe(recipe, run)
        file = logging.FileHandler(run / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("classification").addHandler(file)
        before.setTarget(file)
    logging.getLogger("classification").removeHandler(before)
    before.close()
    logger.info(
        "%s: %s on %s, %d training and %d test images of %d classes%s",
        *(run, recipe.model, root / FOLDER, len(cub.train), len(cub.test), len(cub.class_names)),
        " (DRAWN SAMPLE, no real birds)" if is_sample else "",
    )
    logger.info("%s weights, recipe %s, %s", "Pretrained" if recipe.pretrained else "Random", path.stem, device)
    is_first = int(os.environ.get("RANK", 0)) == 0
    with record_session(run, **data_facts(root)) if is_first else contextlib.nullcontext():
        train(recipe, cub, model, run, device)
    logger.info("%s: finished in %.0f s", run, time.perf_counter() - start)
    if dist.is_initialized():
        dist.destroy_process_group()


def add_recipe_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument that `resolve` understands."""
    parser.add_argument(
        "recipe",
        nargs="*",
        metavar="[RECIPE] KEY=VALUE",
        help="name or path of a recipe (best; on the drawn sample: sample), and settings of it to change",
    )


def resolve(arguments: list[str]) -> tuple[Path, Recipe, Path, bool]:
    """Finds recipe and data from the positional arguments of a command line.

    Returns:
        The recipe's file, the recipe with its changes, the data root, and whether that is the drawn sample.
    """
    changes = [argument for argument in arguments if "=" in argument]
    named = [argument for argument in arguments if "=" not in argument]
    if len(named) > 1:
        raise UserError(f"{' '.join(named)}: expected one recipe, and KEY=VALUE for what differs")
    data = [change.removeprefix("data=") for change in changes if change.startswith("data=")]
    root, is_sample = _on_first_process(resolve_data_root, data[-1] if data else None, [FOLDER])
    name = named[0] if named else ("sample" if is_sample else "best")
    path = Path(name) if name.endswith(".yaml") else RECIPES / f"{name}.yaml"
    return path, load_recipe(path, changes), root, is_sample


def run_name(recipe: Recipe, path: Path, is_sample: bool) -> str:
    """Such as resnet18-study, resnet18-best-random, resnet18-sample-random."""
    parts = [recipe.model.partition(".")[0], path.stem]
    if is_sample and path.stem != "sample":
        parts.append("sample")
    return "-".join([*parts, *([] if recipe.pretrained else ["random"])])


def _keep_recipe(recipe: Recipe, run: Path) -> None:
    kept = run / "config.yaml"
    if kept.is_file():
        if changed := differences(load_recipe(kept), recipe):
            raise UserError(
                f"{kept}: the run was started with other settings ({', '.join(changed)}): give the same ones"
            )
    else:
        save_recipe(recipe, kept)


def _on_first_process(function, *arguments):
    """Calls a function that reads or writes files in one process and hands its result to all."""
    if not dist.is_initialized():
        return function(*arguments)
    outcome: list = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [function(*arguments)]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


if __name__ == "__main__":
    main()
