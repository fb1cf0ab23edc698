"""One training run: recipe in, run folder out.

`python -m classification.train [RECIPE] [KEY=VALUE ...] [--resume]`, alone or under torchrun.
"""

import argparse
import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from classification.cub import FOLDER, read_cub
from classification.model import PretrainedWeightsUnavailable, build_model
from classification.recipe import MAY_CHANGE, Recipe, differences, load_recipe, save_recipe, scale_to_processes
from classification.run import Run
from common.data_root import data_facts, resolve_data_root
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.images import refuse_unreadable
from common.log import RunLog
from common.processes import is_main_process, join_processes, leave_processes, on_main_process, world_size
from common.run_folder import create_run_folder, record_session, refuse_taken_name, run_to_resume
from common.runtime import default_device, keep_freed_memory

logger = logging.getLogger("classification.train")  # it runs as __main__

RECIPES = Path(__file__).parent / "recipes"


def build_model_for(recipe: Recipe, num_classes: int, is_sample: bool) -> tuple[nn.Module, Recipe]:
    """Builds the recipe's model; on the drawn sample only, from random weights if the hub cannot be reached.

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
    """Joins the other processes that the launcher started, if any, and returns this one's device."""
    join_processes()
    if default_device() == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    return device


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, without the program's name; None takes that of the process."""
    parser = ArgumentParser(description="Fine-tune a classifier on CUB-200-2011.")
    add_recipe_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on with that run, or the newest of the recipe")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--name", help="name of the run folder, instead of the one made of model and recipe")
    return parser.parse_intermixed_args(argv)


@exits_on_user_error
def main() -> None:
    """Reads the command line and trains; nothing is written before everything is built."""
    arguments = parse_args()
    log = RunLog("classification", "common")
    device = start_process()
    start = time.perf_counter()
    request = parse_request(arguments.recipe)
    run = None
    if arguments.resume:
        names = on_main_process(request.run_names)
        run = on_main_process(run_to_resume, arguments.output, names, arguments.name)
    elif arguments.name:
        on_main_process(refuse_taken_name, arguments.output, arguments.name)
    begun = run if run is not None and on_main_process(Path.is_file, run / "config.yaml") else None
    if begun is not None:
        path = begun / "config.yaml"
        before = on_main_process(load_recipe, path)
        recipe = on_main_process(load_recipe, path, request.changes)
        root, is_sample = on_main_process(resolve_data_root, recipe.data, [FOLDER])
        if is_sample and not before.weights and not before.pretrained:  # as when it began, without the hub
            recipe = dataclasses.replace(recipe, pretrained=False)
        if changed := differences(before, recipe, MAY_CHANGE):
            raise UserError(
                f"{run}: asked for is {', '.join(changed)}: another network, or another training stream, which no"
                " resumed run can have; leave it out, or start a new run without RESUME=1"
            )
    else:
        path, recipe, root, is_sample = resolve(request)
    cub = read_cub(root)
    on_main_process(refuse_unreadable, [bird.path for bird in (*cub.train, *cub.test)])
    if begun is not None and on_main_process(Path.is_file, begun / "model_last.pth"):
        model = build_model(recipe.model, len(cub.class_names), drop_rate=recipe.drop_rate)
    else:  # a run that ended before its first checkpoint begins anew
        model, recipe = build_model_for(recipe, len(cub.class_names), is_sample)
    training = Run(recipe, cub, model, device, begun)
    if run is None:
        name = arguments.name or run_name(recipe, path, is_sample)
        run = on_main_process(create_run_folder, arguments.output, name)
    if is_main_process():
        save_recipe(recipe, run / "config.yaml")
        log.open(run)
    logger.info(
        "%s: %s on %s, %d training and %d test images of %d classes%s",
        *(run, recipe.model, root, len(cub.train), len(cub.test), len(cub.class_names)),
        " (DRAWN SAMPLE, no real birds)" if is_sample else "",
    )
    start_of_run = "Pretrained weights" if recipe.pretrained else "Random weights"
    if training.trainer.iteration:
        start_of_run = f"Resumed at iteration {training.trainer.iteration}"
    logger.info(
        "%s, %d epochs of %d iterations of %d images, rate %g, recipe %s, %s",
        *(start_of_run, recipe.epochs, training.iterations, recipe.batch_size, recipe.lr, path.stem, device),
    )
    with record_session(run, **data_facts(root)):
        training.train(run)
    logger.info("%s: finished in %.0f s", run, time.perf_counter() - start)
    leave_processes()


def add_recipe_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument that `parse_request` understands."""
    parser.add_argument(
        "recipe",
        nargs="*",
        metavar="[RECIPE] KEY=VALUE",
        help="name or path of a recipe (best; on the drawn sample: sample), and settings of it to change",
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """What the positional arguments of a command line ask for.

    Attributes:
        recipe: name or path of a recipe; None where none is named.
        changes: KEY=VALUE for what differs.
    """

    recipe: str | None
    changes: list[str]

    def setting(self, key: str) -> str | None:
        """The value that is given for a key, the last one winning; None without one."""
        given = [change.partition("=")[2] for change in self.changes if change.startswith(f"{key}=")]
        return given[-1] if given else None

    def data(self) -> str | None:
        """The data root that is named, here or in the recipe; None without one."""
        return self.setting("data") or (load_recipe(self.recipe_file(False)).data if self.recipe else None)

    def recipe_file(self, is_sample: bool) -> Path:
        """The file of the recipe; if none is named, of the default for such data."""
        name = self.recipe or ("sample" if is_sample else "best")
        return Path(name) if name.endswith(".yaml") else RECIPES / f"{name}.yaml"

    def run_names(self) -> list[str]:
        """Names that the run may have: pretrained or random, on the given data, else on real and on drawn data."""
        names = []
        data = self.data()
        for is_sample in (resolve_data_root(data, [FOLDER])[1],) if data else (True, False):
            path = self.recipe_file(is_sample)
            model = self.setting("model")
            recipe = load_recipe(path, [f"model={model}"] if model else [])
            names += [
                run_name(dataclasses.replace(recipe, pretrained=pretrained), path, is_sample)
                for pretrained in (True, False)
            ]
        return list(dict.fromkeys(names))


def parse_request(arguments: list[str]) -> Request:
    """Sorts positional arguments.

    Raises:
        UserError: more than one of them is no KEY=VALUE.
    """
    named = [argument for argument in arguments if "=" not in argument]
    if len(named) > 1:
        raise UserError(f"{' '.join(named)}: expected one recipe, and KEY=VALUE for what differs")
    return Request(named[0] if named else None, [argument for argument in arguments if "=" in argument])


def resolve(request: Request) -> tuple[Path, Recipe, Path, bool]:
    """Finds recipe and data.

    Returns:
        The recipe's file, the recipe with its changes, the data root, and whether that is the drawn sample.
    """
    root, is_sample = on_main_process(resolve_data_root, request.data(), [FOLDER])
    path = request.recipe_file(is_sample)
    recipe = load_recipe(path, request.changes)
    recipe = dataclasses.replace(recipe, data=str(root))  # as later commands on the run will take it
    return path, scale_to_processes(recipe, request.changes, world_size()), root, is_sample


def run_name(recipe: Recipe, path: Path, is_sample: bool) -> str:
    """Such as resnet18-study, resnet18-best-random, resnet18-sample-random."""
    parts = [recipe.model.partition(".")[0], path.stem]
    if is_sample and path.stem != "sample":
        parts.append("sample")
    return "-".join([*parts, *([] if recipe.pretrained else ["random"])])


if __name__ == "__main__":
    main()
