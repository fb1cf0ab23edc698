"""What the report says of the classifiers of birds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from tools.report.document import Block, Missing, Picture, Table, figure, spread
from tools.report.figures import curves, taken_over
from tools.report.runs import Run, Runs, finished, of_seeds

COLUMNS = {"start": "start", "weights": "weights", "rate": "learning rate", "epochs": "epochs", "seed": "seed",
           "validation_top1": "validation top-1, %", "validation_top5": "validation top-5, %", "epoch": "epoch kept",
           "top1": "test top-1, %", "top5": "test top-5, %"}  # fmt: skip
OF_GRID = ("rate", "epochs", "validation_top1", "validation_top5", "epoch", "top1")
OF_PAIR = ("start", "weights", "epochs", "rate", "seed", "top1", "top5", "epoch")


def sweep(runs: Runs) -> Iterator[Block]:
    """The grid over rates and epochs, the best first."""
    if best := finished(runs.grid):
        run, result = best[0], best[0].result
        validation, test = (figure(run.measured(key)) for key in ("validation_top1", "top1"))
        words = (
            f"{run.network} on {run.data()}. Best: rate {result['lr']:g} with {result['epochs']} epochs, validation "
            f"top-1 {validation} %, test top-1 {test} %; compared on {result['validated_on']}."
        )
        if unfinished := len(runs.grid) - len(best):
            words += f" {unfinished} of {len(runs.grid)} runs have not finished."
        yield words
        caption = f"Every run of {runs.name(run.path.parent)}, the best first.{of_seeds(run.twins)}"
        words = "Validation top-1 by learning rate and epochs" + f", seed {run.seed}" * (len(run.twins) > 1)
        heat_map = taken_over(runs, run.path.parent / "sweep.png", f"{words}.")
        table = Table(_trials(runs, best, OF_GRID), caption, strong=[0])
        if len(run.twins) > 1:  # a deviation in every cell needs the whole width
            yield table
            yield [*heat_map]
        else:
            yield [table, *heat_map]


def pretraining(runs: Runs) -> Iterator[Block]:
    """The same training from pretrained and from random weights."""
    trials = [trial for trial in runs.pair if trial.rows]
    words = [_meaning_of_pretrained(runs, trial) for trial in trials if trial.path.name == "pretrained"]
    words += [f"The run {trial.path.name} has not finished." for trial in trials if not trial.is_finished]
    yield " ".join(words)
    if done := [trial for trial in trials if trial.result]:
        caption = f"Both runs of {runs.name(done[0].path.parent)}.{of_seeds(done[0].twins)}"
        yield Table(_trials(runs, done, OF_PAIR), caption)
    yield from _curves({f"{trial.path.name}, ": trial for trial in trials}, "pretraining")


def classifier(runs: Runs) -> Iterator[Block | Missing]:
    """One classifier, and the evaluation of that one."""
    run = runs.birds
    if run is None:
        yield Missing("A fine-tuned classifier", "make finetune")
        yield Missing("Its confused pairs and calibration", "make eval-classifier")
        return
    words = f"{runs.name(run.path)}: {run.network} on {run.data()}, {run.length}"
    if run.result:
        words += (
            f"; test top-1 {figure(run.measured('top1'))} %, top-5 {figure(run.measured('top5'))} % (epoch "
            f"{run.result['epoch']}, {run.result['chosen']})"
        )
    yield f"{words}.{of_seeds(run.twins)}"
    if run in runs.single:  # the curves of a run of a sweep stand there
        yield from _curves({"": run}, "classifier")
    evaluation = runs.newest("report.json", lambda path: list(_evaluation(runs, run, path)), run)
    yield from evaluation
    if not evaluation:
        command = f"make eval-classifier WEIGHTS={run.path / 'model_best.pth'}"
        yield Missing(f"Confused pairs and calibration of {runs.name(run.path)}", command)


def _evaluation(runs: Runs, run: Run, path: Path) -> Iterator[Block]:
    columns = {"images": "images", "top1": "top-1, %", "top5": "top-5, %", "mean_class_accuracy": "mean of classes, %",
               "calibration_error": "calibration error, %", "loss": "loss"}  # fmt: skip
    # Of a twin the same evaluation, not one with test-time augmentation or of exported weights.
    paths = {run: path}
    if path.is_relative_to(run.path):
        paths = {twin: twin.path / path.relative_to(run.path) for twin in run.twins}
    reports = {twin: report for twin, each in paths.items() if (report := runs.attempt(_report, each))}
    figures = {key: spread([float(report[key]) for report in reports.values()]) for key in columns}
    figures |= {"images": int(reports[run]["images"]), "loss": figure(figures["loss"], digits=3)}
    caption = f"Evaluation in {runs.name(path.parent)}.{of_seeds([*reports])}"
    yield Table(pd.DataFrame([figures]).rename(columns=columns), caption)
    pairs = pd.read_csv(path.with_name("confused_pairs.csv"), dtype=str, keep_default_na=False)
    pairs = pairs[["true", "predicted", "images"]].set_axis(["true class", "taken for", "images"], axis=1)
    if len(pairs):
        yield Table(pairs, "Most confused pairs.")
    caption = "Most confused pairs: a picture taken for the other, and one of the class it was taken for."
    yield from taken_over(runs, path.with_name("confused_pairs.png"), caption)
    caption = (
        "Confusion matrix: a row is a class, a column what its pictures were taken for; right ones are on the line."
    )
    matrix = taken_over(runs, path.with_name("confusion_matrix.png"), caption)
    caption = "Calibration: on the line, what is 80 % sure is right in 80 % of the cases; below it, too sure."
    yield [*matrix, *taken_over(runs, path.with_name("calibration.png"), caption)]


def _report(path: Path) -> dict:
    return json.loads(path.read_text())


def _meaning_of_pretrained(runs: Runs, trial: Run) -> str:
    if trial.start == "random":
        return f"No pretrained weights could be had on {trial.data()}, so that both runs started from random ones."
    if trial.start == "ImageNet":
        return f"Trained on {trial.data()}; pretrained means ImageNet weights."
    origin = [f", from a run on {run.data()}" for run in runs.single if run.is_source_of(trial)]
    return f"Trained on {trial.data()}; pretrained means the weights {runs.name(trial.start)}{''.join(origin)}."


def _trials(runs: Runs, trials: Sequence[Run], columns: Sequence[str]) -> pd.DataFrame:
    """The results of finished trials."""
    rows = []
    for run in trials:
        figures = {key: run.measured(key) for key in ("validation_top1", "validation_top5", "top1", "top5")}
        epochs = ", ".join(str(twin.result["epoch"]) for twin in run.twins)
        named = {"start": run.path.name, "weights": runs.name(run.start), "rate": f"{run.result['lr']:g}"}
        rows.append({**run.result, **figures, **named, "epoch": epochs, "seed": run.seeds})
    return pd.DataFrame(rows)[list(columns)].rename(columns=COLUMNS)


def _curves(trials: Mapping[str, Run], name: str) -> list[Picture]:
    panels = {
        title: {
            f"{label}{part}": run.points(f"{prefix}_{key}")
            for label, run in trials.items()
            for part, prefix in (("validation", "validation"), ("training", "train"))
        }
        for title, key in (("top-1, %", "top1"), ("loss", "loss"))
    }
    return curves(panels, name, "Validation in full lines, training dashed.")
