"""Several runs and one verdict: the grid over rates and epochs, and pretrained against random.

`python -m classification.sweep grid [RECIPE] [KEY=VALUE ...] --lrs "0.005 0.01 0.02" --epochs "20"`
`python -m classification.sweep pretraining [RECIPE] [KEY=VALUE ...]`

Every trial is a run of `classification.train` in its own folder inside the sweep's; as many run at once as there are
GPUs. Called again, the sweep keeps finished trials and resumes interrupted ones.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from classification.recipe import Recipe, differences, load_recipe, save_recipe
from classification.train import add_recipe_argument, parse_request, resolve, run_name
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.files import write_figure, write_table
from common.processes import ENDS_WITH_PARENT
from common.run_folder import create_run_folder, find_run_folders, read_metrics
from common.runtime import visible_gpus

COMPARED_ON = 0.1  # share of the training images that a grid holds out where the recipe trains on all of them
# Of result.json, what the tables show, and where they call it otherwise.
OF_GRID = ["lr", "epochs", "validation_top1", "validation_top5", "epoch", "top1"]
OF_PAIR = ["start", "model", "epochs", "image_size", "lr", "seed", "top1", "top5", "epoch"]
TITLES = {
    **{"validation_top1": "validation top-1", "validation_top5": "validation top-5", "epoch": "epoch kept"},
    **{"top1": "test top-1", "top5": "test top-5", "image_size": "image size"},
}


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its folder's name, its length and the settings that make it different."""

    name: str
    epochs: int
    overrides: tuple[str, ...]


def run_trials(
    trials: Sequence[Trial], recipe: list[str], folder: Path, failed: list[str]
) -> Iterator[tuple[Trial, dict]]:
    """Runs the trials, as many at once as there are GPUs, and yields each with its result as it comes.

    Args:
        trials: what to run.
        recipe: the recipe and overrides that all share, as on the command line of `classification.train`.
        folder: of the sweep.
        failed: collects the names of trials that fail; a warning says why, and the others go on.
    """
    devices: queue.SimpleQueue[str] = queue.SimpleQueue()
    gpus = visible_gpus() or [""]
    for gpu in gpus:
        devices.put(gpu)

    interrupted = threading.Event()

    def run(trial: Trial) -> dict:
        result = folder / trial.name / "result.json"
        if not result.is_file():
            device = devices.get()
            try:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                _run_trial(trial, recipe, folder, {"CUDA_VISIBLE_DEVICES": device} if device else {})
            except KeyboardInterrupt:
                interrupted.set()
                raise
            finally:
                devices.put(device)
        return json.loads(result.read_text())

    with ThreadPoolExecutor(len(gpus)) as pool:
        running = {pool.submit(run, trial): trial for trial in trials}
        try:
            with tqdm(total=sum(trial.epochs for trial in trials), desc=folder.name, unit="epoch", disable=None) as bar:
                while running:
                    for done in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                        trial = running.pop(done)
                        try:
                            result = done.result()
                        except UserError as error:
                            failed.append(trial.name)
                            tqdm.write(f"warning: {error}", file=sys.stderr)
                        else:
                            yield trial, result
                    bar.update(sum(len(read_metrics(folder / trial.name)) for trial in trials) - bar.n)
        except BaseException:  # Ctrl-C too, which the running trials have received as well
            pool.shutdown(cancel_futures=True)
            raise


def _run_trial(trial: Trial, recipe: list[str], folder: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "classification.train", *recipe, *trial.overrides]
    command += ["--output", str(folder), "--name", trial.name]
    if (folder / trial.name).is_dir():
        command.append("--resume")
    finished = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        **ENDS_WITH_PARENT,
    )
    if finished.returncode == 130:  # of Ctrl-C this process does not hear where a script has put both in the background
        raise KeyboardInterrupt
    if finished.returncode:
        where = f"{folder / trial.name}: "
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise UserError(f"{where}{reason.removeprefix(where)}")


def _failure(failed: Sequence[str], folder: Path) -> UserError:
    return UserError(f"{folder}: {', '.join(failed)} failed, see the warnings; called again, those go on")


def sweep_grid(lrs: Sequence[float], epochs: Sequence[int], recipe: list[str], folder: Path) -> None:
    """Tries every rate with every number of epochs; prints a line a trial; writes sweep.csv and sweep.png.

    Raises:
        UserError: a trial failed; both files are of the others.
    """
    settings = {f"lr{lr:g}-epochs{count}": (lr, count) for lr, count in product(lrs, epochs)}
    trials = [Trial(name, count, (f"lr={lr}", f"epochs={count}")) for name, (lr, count) in settings.items()]
    results: list[dict] = []
    failed: list[str] = []
    for number, (_, result) in enumerate(run_trials(trials, recipe, folder, failed), start=1):
        # Chosen by the validation figure; the test figure of a held-out recipe must not choose.
        is_best = all(result["validation_top1"] > other["validation_top1"] for other in results)
        results.append(result)
        tqdm.write(
            f"[{number}/{len(trials)}] lr {result['lr']:g}, {result['epochs']} epochs: validation top-1 "
            f"{result['validation_top1']:.2f} %{'  <- new best' if is_best else ''}"
        )
    if not results:
        raise _failure(failed, folder)
    table = pd.DataFrame(results)[OF_GRID].rename(columns=TITLES)
    # Ties: the cheapest trial first, whatever order they finished in.
    table = table.sort_values(["validation top-1", "epochs", "lr"], ascending=[False, True, True])
    write_table(folder / "sweep.csv", table, index=False, float_format="%g")
    write_figure(folder / "sweep.png", _draw_grid(table), dpi=120)
    print(f"\n{table.to_markdown(index=False, floatfmt='.4g')}\n")
    print(f"Compared on {result['validated_on']}. {folder}/sweep.csv, sweep.png")
    if failed:
        raise _failure(failed, folder)


def compare_pretraining(recipe: list[str], epochs: int, folder: Path) -> None:
    """Trains once pretrained and once from random weights; writes comparison.csv and both in one set of curves.

    Raises:
        UserError: one of the two failed; there is nothing to compare then.
    """
    shared = [override for override in recipe if not override.startswith(("weights=", "pretrained="))]
    weights = [override for override in recipe if override.startswith("weights=")]
    trials = [
        Trial("pretrained", epochs, ("pretrained=true", *weights)),
        Trial("random", epochs, ("pretrained=false", "weights=null")),
    ]
    results = {}
    failed: list[str] = []
    for trial, result in run_trials(trials, shared, folder, failed):
        results[trial.name] = result
        tqdm.write(f"{trial.name}: test top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %")
    if failed:
        raise _failure(failed, folder)
    if not results["pretrained"]["pretrained"]:
        print("NO PRETRAINED WEIGHTS could be had: on the sample both runs started from random ones.")
    curves = {trial.name: pd.DataFrame(read_metrics(folder / trial.name)) for trial in trials}
    table = pd.DataFrame([{"start": name, **results[name]} for name in curves])[OF_PAIR].rename(columns=TITLES)
    write_table(folder / "comparison.csv", table, index=False, float_format="%g")
    write_figure(folder / "comparison.png", _draw_curves(curves), dpi=120)
    print(f"\n{table.to_markdown(index=False, floatfmt='.4g')}\n")
    print(f"The epoch of each is {results['pretrained']['chosen']}. {folder}/comparison.csv, comparison.png")


def _draw_grid(table: pd.DataFrame) -> Figure:
    grid = table.pivot(index="lr", columns="epochs", values="validation top-1")
    figure = Figure(figsize=(2.5 + 1.2 * grid.shape[1], 1.6 + 0.7 * grid.shape[0]), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(grid, cmap="viridis", aspect="auto")
    values = grid.to_numpy(dtype=float)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    axes.set_xticks(range(grid.shape[1]), grid.columns)
    axes.set_yticks(range(grid.shape[0]), [f"{lr:g}" for lr in grid.index])
    axes.set(xlabel="epochs", ylabel="learning rate")
    figure.colorbar(picture, ax=axes, label="validation top-1, %")
    return figure


def _draw_curves(curves: dict[str, pd.DataFrame]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, quantity, unit in zip(panels, ("top1", "loss"), ("top-1, %", "loss"), strict=True):
        for (name, curve), colour in zip(curves.items(), ("#4477aa", "#cc6644"), strict=True):
            marker = "o" if len(curve) < 30 else ""
            for part, line in (("train", "--"), ("validation", "-")):
                values, label = curve[f"{part}_{quantity}"], f"{name}, {part}"
                axes.plot(curve["epoch"], values, line, color=colour, marker=marker, markersize=3, label=label)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, None)
    panels[1].legend(fontsize=8)
    return figure


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a command line; None takes that of the process."""
    parser = ArgumentParser(description="Several training runs and their comparison.")
    parser.add_argument("kind", choices=("grid", "pretraining"))
    add_recipe_argument(parser)
    parser.add_argument("--lrs", type=_numbers(float), default=[0.005, 0.01, 0.02], help="rates of the grid")
    parser.add_argument("--epochs", type=_numbers(int), help="numbers of epochs of the grid; the recipe's")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--name", help="name of the sweep's folder, instead of the one made of model, recipe and kind")
    return parser.parse_intermixed_args(argv)


@exits_on_user_error
def main() -> None:
    """Reads the command line and runs the sweep or the comparison."""
    arguments = parse_args()
    request = parse_request(arguments.recipe)
    path, recipe, _, is_sample = resolve(request)
    shared = [str(path), *request.changes]
    if arguments.kind == "grid" and recipe.choose == "last" and not recipe.holdout:
        # The runs of a grid are compared, which must not be done on the test split.
        recipe = dataclasses.replace(recipe, holdout=COMPARED_ON)
        shared.append(f"holdout={COMPARED_ON}")
    name = arguments.name or f"{run_name(recipe, path, is_sample)}-{arguments.kind}"
    folder = _sweep_folder(arguments.output, name, recipe)
    print(folder)
    if arguments.kind == "grid":
        sweep_grid(arguments.lrs, arguments.epochs or [recipe.epochs], shared, folder)
    else:
        compare_pretraining(shared, recipe.epochs, folder)


def _numbers(kind: type) -> Callable[[str], list]:
    def numbers(text: str) -> list:
        with contextlib.suppress(ValueError):
            if found := [kind(word) for word in text.split()]:
                return found
        raise UserError(f"{text!r}: expected one or more numbers with blanks between them")

    return numbers


def _sweep_folder(root: Path, name: str, recipe: Recipe) -> Path:
    """The newest folder of this sweep if its trials had the same settings, else a new one."""
    for folder in find_run_folders(root, name)[-1:]:
        if not any(folder.iterdir()):  # killed as soon as it was made
            save_recipe(recipe, folder / "config.yaml")
            return folder
        with contextlib.suppress(UserError):  # begun by another version, or not written to its end
            if not differences(load_recipe(folder / "config.yaml"), recipe):
                return folder
    folder = create_run_folder(root, name)
    save_recipe(recipe, folder / "config.yaml")
    return folder


if __name__ == "__main__":
    main()
