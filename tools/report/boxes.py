"""What the report says of the detectors."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from detection.comparison import agreements
from tools.report.document import Block, Missing, Table, figure
from tools.report.figures import curves, taken_over
from tools.report.runs import Evaluation, Run, Runs, of_seeds
from tools.report.study import is_voc07_test

MAX_PROPOSALS, MAX_PHOTOGRAPHS = 4, 6
MAX_KINDS = 6  # columns of the table that sets runs of one network side by side
TARGETS = {"Faster R-CNN": "frcnn", "YOLOv3": "yolov3"}


def by_class(runs: Runs) -> Iterator[Block | Missing]:
    """The table of each detector."""
    networks = {run.network: run for run in runs.detectors}
    for name, target in TARGETS.items():
        if name not in networks:
            yield Missing(f"{name}: curves, table by class, PR curves", f"make train-{target}")
        elif not networks[name].evaluation:
            command = f"make eval-{target} WEIGHTS={networks[name].path / 'model_best.pth'}"
            yield Missing(f"{name}: table by class, PR curves", command)
    tables: list[Block] = []
    for run, evaluation in runs.evaluated:
        weights = runs.name(evaluation.session.get("weights") or run.path)
        state = "" if evaluation.session else ", last evaluation while training"
        caption = f"{run.network} on {_split(run, evaluation)}: {weights}{state}."
        table = run.by_class.rename(columns={"AP50_11point": "ap, 11 points", "AP50": "ap, area"})
        table = table.rename_axis("class").reset_index()
        tables.append(Table(table, caption + of_seeds(run.comparable), digits=3, strong=[len(table) - 1]))
    are_wide = any(len(run.comparable) > 1 for run, _ in runs.evaluated)
    yield from tables if are_wide else [tables]
    for name in TARGETS:
        kinds = [run for run in runs.different if run.network == name and run.evaluation][:MAX_KINDS]
        kinds.sort(key=lambda run: run.path)
        if len(kinds) > 1:
            table = pd.DataFrame({runs.title(run): run.by_class["AP50_11point"] for run in kinds})
            table = table.rename_axis("class").reset_index()
            caption = f"AP (11 points) of each {name} that differs from the others in more than its seed."
            yield Table(table, caption, digits=3, strong=[len(table) - 1])


def training_curves(runs: Runs) -> Iterator[Block]:
    """Losses and mAP of each detector by epoch, and the AP of each class."""
    losses = {"training": "total_loss", "validation": "validation_loss"}
    precisions = {"AP50, 11 points": "AP50_11point", "AP50, area": "AP50", "AP75": "AP75", "AP 0.50:0.95": "AP"}
    for run in runs.detectors:
        parts = {"loss": losses, "mAP on the test split": precisions}
        panels = {title: {label: run.points(key) for label, key in keys.items()} for title, keys in parts.items()}
        state = "" if run.is_finished else " So far: the run has not finished."
        yield from curves(panels, f"curves-{_slug(run)}", f"{run.network}, {runs.name(run.path)}.{state}")
        caption = f"{run.network}: AP50 (11 points) of each class while training."
        yield from taken_over(runs, run.path / "results_per_class.png", caption, f"classes-{_slug(run)}")


def precision_recall(runs: Runs) -> Iterator[Block]:
    """The curves of each detector, and which class it takes for which."""
    for run, evaluation in runs.evaluated:
        which = f", seed {run.seed}," if len(run.twins) > 1 else ""
        caption = f"{run.network}{which} on {_split(run, evaluation)}, at IoU 0.5."
        for name in ("pr_curves", "f1_curves", "confusion"):
            picture = f"{name.replace('_', '-')}-{_slug(run)}"
            yield from taken_over(runs, evaluation.path / f"{name}.png", caption, picture)


def proposals(runs: Runs, path: Path) -> Iterator[Block]:
    """Recall of the first stage's boxes, and pictures of both stages."""
    if path.with_name("recall.csv").exists():
        recall = pd.read_csv(path.with_name("recall.csv"), index_col="proposals", dtype={"recall": float})
        table = recall.T.rename_axis(index="proposals kept", columns=None).rename({"recall": "recall at IoU 0.5"})
        yield Table(
            table.rename(columns=str).reset_index(), f"Recall of the proposals, {runs.name(path.parent)}.", digits=3
        )
    for number, record in enumerate(json.loads(path.read_text())[:MAX_PROPOSALS], start=1):
        picture = path.with_name(Path(record["picture"]).name)
        caption = f"{picture.stem}: the first stage's best proposals, and what the second made of them."
        yield from taken_over(runs, picture, caption, f"proposals-{number}")


def photographs(runs: Runs, path: Path) -> Iterator[Block]:
    """What both detectors see where there is no ground truth."""
    comparison = json.loads(path.read_text())
    if comparison["split"] is not None:
        return
    detectors, rows, pictures = list(comparison["weights"]), [], []
    kinds = agreements(detectors)
    for number, photo in enumerate(comparison["photographs"], start=1):
        name, objects = Path(photo["file_name"]).name, Counter(pair["agreement"] for pair in photo["objects"])
        times = [photo["milliseconds"].get(detector) for detector in detectors]
        rows.append([name, *(objects[kind] for kind in kinds), *times])
        if photo.get("picture") and number <= MAX_PHOTOGRAPHS:
            picture = path.parent / "pictures" / Path(photo["picture"]).name
            pictures += taken_over(runs, picture, name, f"photograph-{number}")
    table = pd.DataFrame(rows, columns=["photograph", *kinds, *(f"{name}, ms" for name in detectors)])
    caption = f"Objects with score {comparison['score']:g} or more, by which detector found them, and time on"
    yield Table(table, f"{caption} {comparison['machine']}.", digits=0)
    yield from pictures


def errors(runs: Runs, path: Path) -> Iterator[Block]:
    """Errors of both detectors by kind."""
    analyses = json.loads(path.read_text())
    words = f"On {analyses.pop('photographs')} photographs of {analyses.pop('split')}, AP50 (area): "
    yield words + ", ".join(f"{name} {figure(analysis['ap50'], 3)}" for name, analysis in analyses.items()) + "."
    comparison = json.loads(path.with_name("comparison.json").read_text())
    weights = "; ".join(f"{name} is {runs.name(file)}" for name, file in comparison["weights"].items())
    difference = comparison["ap50"]["difference"]
    low, high = (figure(end, 3, is_difference=True) for end in difference["interval"])
    yield (
        f"{weights}. The first less the second is {figure(difference['ap50'], 3, is_difference=True)}; on resampled "
        f"photographs it is {low} to {high} (95 %)."
    )
    columns = {}
    for name, analysis in analyses.items():
        columns[f"{name}, number"] = pd.Series(analysis["count"], dtype=int)
        columns[f"{name}, cost"] = pd.Series(analysis["cost"], dtype=float)
    yield Table(pd.DataFrame(columns).rename_axis("error").reset_index(), digits=3)
    yield from taken_over(runs, path.with_name("errors.png"), "What errors cost.")


def _split(run: Run, evaluation: Evaluation) -> str:
    """What a detector was evaluated on."""
    return "VOC07 test" if is_voc07_test(evaluation) else run.tested_on


def _slug(run: Run) -> str:
    return run.network.lower().replace(" ", "-")
