"""What the study states, retyped in study.json, and what was found here."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path

import pandas as pd

from tools.report.document import Block, Table, figure, mean
from tools.report.runs import Evaluation, Run, Runs, finished, of_seeds

STUDY = json.loads(Path(__file__).with_name("study.json").read_text())
CLASSES = pd.DataFrame.from_dict(STUDY["per_class"], orient="index", columns=STUDY["columns"])
OVERFITTED = 30  # epochs, after which its YOLOv3 had


def is_voc07_test(evaluation: Evaluation) -> bool:
    """Whether a detector was evaluated on the official VOC07 test split, to the last object."""
    return evaluation.table["gts"].drop("mAP").to_dict() == CLASSES["gts"].to_dict()


def is_cub_test(run: Run) -> bool:
    """Whether a classifier was tested on the official test split of CUB-200-2011."""
    return {key: run.result.get(key) for key in STUDY["test"]} == STUDY["test"]


def top1(run: Run) -> float | None:
    """The study's top-1, in percent, for a pretrained classifier with the study's network and data; else None."""
    is_its_own = is_cub_test(run) and run.network.partition(".")[0] == STUDY["network"] and run.start != "random"
    return 100 * max(STUDY["sweep"].values()) if is_its_own else None


def mean_ap(run: Run) -> float | None:
    """The study's mAP (11 points) for a detector with the study's network and data; else None."""
    is_its_own = run.network == "Faster R-CNN" and run.evaluation and is_voc07_test(run.evaluation)
    return STUDY["mAP"] if is_its_own else None


def beside_ours(runs: Runs) -> Iterator[Block]:
    """The study's findings and figures beside ours, or alone where nothing was measured on its data."""
    if not runs.single and not runs.sweeps:
        return
    grid = [trial for trial in finished(runs.grid) if top1(trial)]
    detector = next((run for run in runs.detectors if mean_ap(run)), None)
    if not grid and not detector:
        yield (
            "None of these runs was on its data: its figures below stand alone, and of its findings only the direction "
            "can be compared."
        )
    rows = [(claim, find(runs) or "not tested") for claim, find in FINDINGS]
    yield Table(pd.DataFrame(rows, columns=["the study", "here"]), "Its findings, and what was found here.")
    tables: list[Block] = [_classes(detector), _sweep(grid)]
    yield from tables if detector else [tables]  # two evaluations in one table need the whole width


def _sweep(grid: list[Run]) -> Table:
    ours = {(trial.result["lr"], trial.result["epochs"]): trial.measured("top1") for trial in grid}
    rates, top1s = zip(*STUDY["sweep"].items(), strict=True)
    table = pd.DataFrame({"learning rate": rates, "the study, %": [100 * top1 for top1 in top1s]})
    caption = f"Top-1 of the study's sweep, ResNet-18 on CUB-200-2011, {STUDY['epochs']} epochs"
    if not grid:
        return Table(table, f"{caption}: the study's figures alone.")
    table["here, %"] = [ours.get((float(rate), STUDY["epochs"])) for rate in rates]
    table["difference"] = table["here, %"].map(mean) - table["the study, %"]
    return Table(table, f"{caption}, beside ours.{of_seeds(grid[0].twins)}", differences=["difference"])


def _classes(detector: Run | None) -> Table:
    study, caption = CLASSES.rename_axis("class"), "Faster R-CNN R50 on VOC07 test"
    if not detector:
        study = study.astype(object)
        study.loc["mAP"] = ["", "", "", STUDY["mAP"]]
        caption += ": the study's figures alone."
        return Table(study.reset_index(), caption, digits=3, strong=[len(CLASSES)])
    ours = detector.by_class.rename(columns={"AP50_11point": "ap"})
    table = study[["gts"]].copy()
    for column in ("dets", "recall", "ap"):
        table[column], table[f"{column}, study"] = ours[column], study[column]
    table["difference"] = table["ap"].map(mean).astype(float) - table["ap, study"]
    table = table.sort_values("difference", ascending=False, kind="stable").astype(object)
    ap = ours["ap"]["mAP"]
    table.loc["mAP"] = pd.Series(["", "", "", "", "", ap, STUDY["mAP"], mean(ap) - STUDY["mAP"]], table.columns)
    caption += (
        ", ours beside the study's (11 points), the class that is furthest ahead first. gts agree in every class."
    )
    caption += of_seeds(detector.comparable)
    return Table(table.reset_index(), caption, digits=3, strong=[len(CLASSES)], differences=["difference"])


def _pair(runs: Runs) -> dict[str, Run]:
    """The finished runs from pretrained and from random weights, if they are."""
    trials = {trial.path.name: trial for trial in runs.pair if trial.result and trial.rows}
    return trials if len(trials) == 2 and trials["pretrained"].start != "random" else {}


def _pretraining(runs: Runs) -> str:
    if not (pair := _pair(runs)):
        return ""
    pretrained, random = (pair[start].measured("top1") for start in ("pretrained", "random"))
    run = pair["random"]
    return (
        f"Test top-1 is {figure(pretrained)} % pretrained and {figure(random)} % from random weights: pretrained is "
        f"{_apart(mean(pretrained) - mean(random), 2, ' points')}, after {run.length} on {run.data()}."
        f"{of_seeds(run.twins)}"
    )


def _training_accuracy(runs: Runs) -> str:
    last = {start: trial.rows[-1].get("train_top1") for start, trial in _pair(runs).items()}
    if not last:
        return ""
    return (
        f"After {runs.pair[0].length} it is {figure(last['pretrained'])} % pretrained and {figure(last['random'])} % "
        "from random weights."
    )


def _validation_loss(runs: Runs) -> str:
    losses = {start: [loss for _, loss in trial.points("validation_loss")] for start, trial in _pair(runs).items()}
    rises = {start: sum(after > before for before, after in pairwise(values)) for start, values in losses.items()}
    if not losses:
        return ""
    return (
        f"At the end it is {losses['pretrained'][-1]:.3f} pretrained and {losses['random'][-1]:.3f} from random "
        f"weights; from one epoch to the next it rose {rises['pretrained']} and {rises['random']} times."
    )


def _best_rate(runs: Runs) -> str:
    trials = finished(runs.grid)
    rates = sorted({trial.result["lr"] for trial in trials})
    if len(rates) < 2:
        return ""
    best, listed = trials[0], ", ".join(f"{rate:g}" for rate in rates)
    return (
        f"The best of {listed} is {best.result['lr']:g}: {figure(best.measured('validation_top1'))} % validation top-1 "
        f"with {best.result['epochs']} epochs on {best.data()}.{of_seeds(best.twins)}"
    )


def _longer(runs: Runs) -> str:
    trials = sorted(finished(runs.grid), key=lambda trial: (trial.result["lr"], trial.result["epochs"]))
    by_rate = [list(group) for _, group in groupby(trials, key=lambda trial: trial.result["lr"])]
    pairs = [pair for group in by_rate for pair in pairwise(group)]
    top1s = [[mean(trial.measured("validation_top1")) for trial in pair] for pair in pairs]
    lower = sum(long < short for short, long in top1s)
    if not pairs:
        return ""
    return f"Pairs of runs that differ in their length alone: {len(pairs)}; the longer one is lower in {lower}."


def _yolov3_behind(runs: Runs) -> str:
    evaluated = {run.network: run for run, _ in runs.evaluated}
    data = {run.tested_on for run, _ in runs.evaluated}
    if len(evaluated) < 2 or len(data) > 1:
        return ""
    yolov3, frcnn = (evaluated[name].by_class["AP50_11point"]["mAP"] for name in ("YOLOv3", "Faster R-CNN"))
    where = "VOC07 test" if all(is_voc07_test(found) for _, found in runs.evaluated) else data.pop()
    return (
        f"mAP (11 points) of YOLOv3 is {figure(yolov3, 3)}, of Faster R-CNN {figure(frcnn, 3)}: YOLOv3 is "
        f"{_apart(mean(yolov3) - mean(frcnn), 3)} on {where}.{of_seeds(evaluated['YOLOv3'].comparable)}"
    )


def _outside(runs: Runs) -> str:
    def count(path: Path) -> list[str]:
        comparison = json.loads(path.read_text())
        if comparison["split"] is not None or {*comparison["weights"]} != {"Faster R-CNN", "YOLOv3"}:
            return []
        photographs = comparison["photographs"]
        kinds = Counter(pair["agreement"] for photograph in photographs for pair in photograph["objects"])
        return [
            f"On {len(photographs)} photographs from outside, at score {comparison['score']:g} or more, Faster R-CNN "
            f"alone sees {kinds['only Faster R-CNN']} objects, YOLOv3 alone {kinds['only YOLOv3']}, both "
            f"{kinds['both'] + kinds['other class']}."
        ]

    return "".join(runs.newest("comparison.json", count))


def _overfitting(runs: Runs) -> str:
    if not (words := _highest(runs, "YOLOv3")):
        return ""
    epochs = max(epoch for run in runs.detectors for epoch, _ in run.points("AP50_11point") if run.network == "YOLOv3")
    return words if epochs >= OVERFITTED else f"Not tested: the run is shorter. {words}"


def _highest(runs: Runs, network: str) -> str:
    points = [point for run in runs.detectors if run.network == network for point in run.points("AP50_11point")]
    if not points:
        return ""
    (epoch, best), (epochs, last) = max(points, key=lambda point: point[1]), points[-1]
    return f"mAP is highest after {epoch:.3g} of {epochs:.3g} epochs, {best:.3f}; at the end it is {last:.3f}."


def _apart(difference: float, digits: int, unit: str = "") -> str:
    return f"{figure(abs(difference), digits)}{unit} {'ahead' if difference > 0 else 'behind'}"


FINDINGS: tuple[tuple[str, Callable[[Runs], str]], ...] = (
    ("Pretraining is markedly better throughout.", _pretraining),
    (
        "Pretrained, training accuracy is near 100 % within a few epochs; from random weights it rises slowly and "
        "never gets there.",
        _training_accuracy,
    ),
    ("From random weights the validation loss is higher and unsteady.", _validation_loss),
    ("Of the rates 0.005, 0.01 and 0.02 the best is 0.02: 73.70 % with 20 epochs.", _best_rate),
    ("More epochs never lower the validation accuracy.", _longer),
    (
        "The mAP of Faster R-CNN no longer rises after 7 epochs of three passes each.",
        lambda runs: _highest(runs, "Faster R-CNN"),
    ),
    ("YOLOv3 has badly overfitted by epoch 30.", _overfitting),
    ("YOLOv3 is clearly behind Faster R-CNN.", _yolov3_behind),
    ("On three photographs from outside it finds less: on the third it misses the train.", _outside),
)
