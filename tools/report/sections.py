"""What the report says, section by section: the newest of each kind in full, all others in the table of runs."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import yaml

from common.run_folder import read_sessions
from tools.report.document import NONE, Block, Commands, Listing, Picture, Section, Table, figure
from tools.report.figures import draw_curves, shrink
from tools.report.findings import Evaluation, Findings, Run, finished

STUDY_TOP1 = 73.70  # per cent, ResNet-18 from ImageNet weights on the test split of CUB-200-2011
STUDY_AP = 0.754  # Faster R-CNN R50-FPN, 11 points at IoU 0.5, on VOC07 test
CUB_TEST = {"classes": 200, "test_images": 5794}
# Objects of VOC07 test by class, difficult ones not counted: what tells that an evaluation was on it.
VOC07_TEST = {
    "aeroplane": 285, "bicycle": 337, "bird": 459, "boat": 263, "bottle": 469, "bus": 213, "car": 1201, "cat": 358,
    "chair": 756, "cow": 244, "diningtable": 206, "dog": 489, "horse": 348, "motorbike": 325, "person": 4528,
    "pottedplant": 480, "sheep": 242, "sofa": 239, "train": 282, "tvmonitor": 308,
}  # fmt: skip
MAX_PROPOSALS, MAX_PHOTOGRAPHS = 4, 6
ENVIRONMENT = ["machine", "processes", "python", "torch", "torchvision", "timm", "detectron2"]


def compose(found: Findings) -> list[Section]:
    """Writes the report; a section that has nothing to say stays out."""
    sections = []
    for id, title, write, *file in SECTIONS:
        blocks = found.newest(file[0], partial(_blocks, write, found)) if file else _blocks(write, found)
        if blocks:
            sections.append(Section(id, title, blocks))
        elif id in LACKING:
            found.missing.append(LACKING[id])
    return sections


def _blocks(write: Callable[..., Iterator[Block]], *arguments: object) -> list[Block]:
    return [block for block in write(*arguments) if block]


def _results(found: Findings) -> Iterator[Block]:
    rows = []
    birds = [("fine-tuned", found.birds)] if found.birds in found.runs else []
    birds += [(f"started {trial.path.name}", trial) for trial in found.pair]
    birds += [("best of the sweep", trial) for trial in finished(found.grid)[:1]]
    for what, run in birds:
        if run.result:
            is_same = {key: run.result.get(key) for key in CUB_TEST} == CUB_TEST
            is_compared = is_same and run.network.partition(".")[0] == "resnet18" and run.start != "random"
            row = [f"{run.network}, {what}", "CUB-200-2011, test" if is_same else run.data(), found.name(run.start)]
            study: str | float = f"{STUDY_TOP1:.2f} %" if is_compared else NONE
            rows.append([*row, "top-1", f"{run.result['top1']:.2f} %", study])
    for run, evaluation in found.evaluated:
        is_same, means = _is_voc07_test(evaluation), evaluation.table.loc["mAP"]
        data = "VOC07 test" if is_same else run.data(evaluation.session)
        study = STUDY_AP if is_same and run.network == "Faster R-CNN" else NONE
        row = [run.network, data, found.name(run.start)]
        rows.append([*row, "mAP, 11 points", means["AP50_11point"], study])
        rows.append([*row, "mAP, area", means["AP50"], NONE])
    if rows:
        table = pd.DataFrame(rows, columns=["what", "data", "started from", "metric", "measured", "the study"])
        is_compared = any(table["the study"] != NONE)
        note = (
            "Top-1 in per cent, average precision (IoU 0.5, difficult objects ignored) from 0 to 1, all on test splits"
        )
        yield Table(table if is_compared else table.drop(columns="the study"), f"{note}.", digits=3)
        if not is_compared:
            yield "None of this was measured on the data of the study, so its figures are not set beside these."


def _what_ran(found: Findings) -> Iterator[Block]:
    shown = [run for run in (found.birds, *found.detectors) if run]
    runs, rows = sorted(found.runs, key=lambda run: run.path), []
    for run in runs:
        state = "finished" if run.is_finished else "not finished: still going, or interrupted"
        rows.append([found.name(run.path), run.network, run.data(), found.name(run.start), run.settings, run.seed,
                     run.length, _duration([run]), state])  # fmt: skip
    for trials in found.sweeps:
        first, done, number = trials[0], sum(trial.is_finished for trial in trials), len(trials)
        state = "finished" if done == number else f"{done} of {number} runs finished"
        rows.append([f"{found.name(first.path.parent)} ({number} runs)", first.network, first.data(), "", "",
                     first.seed, "", _duration(trials), state])  # fmt: skip
    if rows:
        columns = ["run", "network", "data", "started from", "settings", "seed", "length", "time", "state"]
        caption = "All runs; those in bold are shown below: the newest finished one of each kind."
        strong = [number for number, run in enumerate(runs) if run in shown]
        yield Table(pd.DataFrame(rows, columns=columns), caption, strong=strong)
    runs += [trial for trials in found.sweeps for trial in trials]
    sessions = [{**session, "runs": str(run.path)} for run in runs for session in run.sessions]
    sessions = [{**s, **s["versions"]} if isinstance(s.get("versions"), dict) else s for s in sessions]
    if sessions:
        table = pd.DataFrame(sessions, columns=[*ENVIRONMENT, "runs"], dtype=object).map(figure)
        yield Table(table.groupby(ENVIRONMENT, as_index=False).nunique(), "Where, and with which versions.")
    for run in shown:
        commands = "\n".join(f"# {session.get('command')}" for session in run.sessions)
        text = yaml.safe_dump(run.config, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
        yield Listing(f"{found.name(run.path)}/config.yaml", f"{commands}\n{text}".lstrip())


def _sweep(found: Findings) -> Iterator[Block]:
    if best := finished(found.grid):
        run, result = best[0], best[0].result
        words = (
            f"{run.network} on {run.data()}. Best: rate {result['lr']:g} with {result['epochs']} epochs, validation "
            f"top-1 {result['validation_top1']:.2f} %, test top-1 {result['top1']:.2f} %; chosen on the "
            f"{result['chosen_on']}."
        )
        if unfinished := len(found.grid) - len(best):
            words += f" {unfinished} of {len(found.grid)} runs have not finished."
        yield words
        columns = {"rate": "learning rate", "epochs": "epochs", "validation_top1": "validation top-1, %",
                   "validation_top5": "validation top-5, %", "epoch": "best epoch",
                   "top1": "test top-1, %"}  # fmt: skip
        caption = f"Every run of {found.name(run.path.parent)}, the best first."
        heat_map = _picture(found, run.path.parent / "sweep.png", "Validation top-1 by learning rate and epochs.")
        yield [Table(_of_trials(found, best, columns), caption, strong=[0]), *heat_map]


def _pretraining(found: Findings) -> Iterator[Block]:
    trials = [trial for trial in found.pair if trial.rows]
    words = [_pretrained_means(found, trial) for trial in trials if trial.path.name == "pretrained"]
    words += [f"The run {trial.path.name} has not finished." for trial in trials if not trial.is_finished]
    yield " ".join(words)
    if done := [trial for trial in trials if trial.result]:
        columns = {"start": "start", "weights": "weights", "epochs": "epochs", "rate": "rate", "seed": "seed",
                   "top1": "test top-1, %", "top5": "test top-5, %", "epoch": "best epoch"}  # fmt: skip
        yield Table(_of_trials(found, done, columns), found.name(done[0].path.parent))
    yield from _bird_curves({f"{trial.path.name}, ": trial for trial in trials}, "pretraining")


def _pretrained_means(found: Findings, trial: Run) -> str:
    data, start = trial.data(), trial.start
    if start == "random":
        return f"No pretrained weights could be had on {data}, so that both runs started from random ones."
    if start == "ImageNet":
        return f"Trained on {data}; pretrained means ImageNet weights."
    origin = [f", from a run on {run.data()}" for run in found.runs if run.path == Path(start).parent]
    return f"Trained on {data}; pretrained means the weights {found.name(start)}{''.join(origin)}."


def _classifier(found: Findings) -> Iterator[Block]:
    if birds := found.birds:
        words = f"{found.name(birds.path)}: {birds.network} on {birds.data()}, {birds.length}"
        if birds.result:
            result = "test top-1 {top1:.2f} %, top-5 {top5:.2f} % (epoch {epoch}, chosen on the {chosen_on})"
            words += f"; {result.format(**birds.result)}"
        yield f"{words}."
        if birds in found.runs:  # the curves of a run of a sweep stand there
            yield from _bird_curves({"": birds}, "classifier")
    else:
        found.missing.append(("a fine-tuned classifier", "make finetune"))
    evaluation = found.newest("report.json", lambda path: list(_evaluation_of_birds(found, path)))
    yield from evaluation
    if not evaluation:
        weights = birds.path / "model_best.pth" if birds else "..."
        found.missing.append(("confused pairs and calibration", f"make eval-classifier WEIGHTS={weights}"))


def _evaluation_of_birds(found: Findings, path: Path) -> Iterator[Block]:
    columns = {"images": "images", "top1": "top-1, %", "top5": "top-5, %", "mean_class_accuracy": "mean of classes, %",
               "calibration_error": "calibration error, %", "loss": "loss"}  # fmt: skip
    table = pd.DataFrame([json.loads(path.read_text())])[list(columns)].astype(float).astype({"images": int})
    table["loss"] = table["loss"].map(partial(figure, digits=3))
    weights = (read_sessions(path.parent) or [{}])[-1].get("weights") or path.parent
    yield Table(table.rename(columns=columns), f"Evaluation of {found.name(weights)}.")
    pairs = pd.read_csv(path.with_name("confused_pairs.csv"), dtype=str, keep_default_na=False)
    pairs = pairs[["true", "predicted", "images"]].set_axis(["true class", "taken for", "images"], axis=1)
    if len(pairs):
        yield Table(pairs, "Most confused pairs.")
    caption = "Most confused pairs: a picture taken for the other, and one of the class it was taken for."
    yield from _picture(found, path.with_name("confused_pairs.png"), caption)
    matrix = _picture(found, path.with_name("confusion_matrix.png"), "Confusion matrix.")
    yield [*matrix, *_picture(found, path.with_name("calibration.png"), "Confidence against accuracy.")]


def _per_class(found: Findings) -> Iterator[Block]:
    runs = {run.network: run for run in found.detectors}
    for name, target in (("Faster R-CNN", "frcnn"), ("YOLOv3", "yolov3")):
        if name not in runs:
            found.missing.append((f"{name}: curves, table by class, PR curves", f"make train-{target}"))
        elif not runs[name].evaluation:
            command = f"make eval-{target} WEIGHTS={runs[name].path / 'model_best.pth'}"
            found.missing.append((f"{name}: table by class, PR curves", command))
    words = [
        "ap is the average precision at IoU 0.5; gts are objects to find, difficult ones left out; dets all detections."
    ]
    tables: list[Block] = []
    for run, evaluation in found.evaluated:
        session, table = evaluation.session, evaluation.table
        if run.network == "Faster R-CNN" and _is_voc07_test(evaluation):
            words.append(
                f"On the same data, VOC07 test, the study's Faster R-CNN has {STUDY_AP:.3f} mAP (11 points), this one "
                f"{table.loc['mAP', 'AP50_11point']:.3f}. The study's figures by class are not at hand."
            )
        weights = found.name(session.get("weights") or run.path)
        state = "" if session else ", last evaluation while training"
        caption = f"{run.network} on {_split(run, evaluation)}: {weights}{state}."
        table = table.rename(columns={"AP50_11point": "ap, 11 points", "AP50": "ap, area"}).rename_axis("class")
        tables.append(Table(table.reset_index(), caption, digits=3, strong=[len(table) - 1]))
    if tables:
        yield " ".join(words)
        yield tables


def _detector_curves(found: Findings) -> Iterator[Block]:
    losses = {"training": "total_loss", "validation": "validation_loss"}
    precisions = {"AP50, 11 points": "AP50_11point", "AP50, area": "AP50", "AP75": "AP75", "AP 0.50:0.95": "AP"}
    for run in found.detectors:
        parts = {"loss": losses, "mAP on the test split": precisions}
        panels = {title: {label: run.points(key) for label, key in keys.items()} for title, keys in parts.items()}
        state = "" if run.is_finished else " So far: the run has not finished."
        yield from _curves(panels, f"curves-{_slug(run)}", f"{run.network}, {found.name(run.path)}.{state}")


def _pr_curves(found: Findings) -> Iterator[Block]:
    for run, evaluation in found.evaluated:
        caption = f"{run.network} on {_split(run, evaluation)}, at IoU 0.5."
        yield from _picture(found, evaluation.path / "pr_curves.png", caption, f"pr-curves-{_slug(run)}")


def _proposals(found: Findings, path: Path) -> Iterator[Block]:
    if path.with_name("recall.csv").exists():
        recall = pd.read_csv(path.with_name("recall.csv"), index_col="proposals", dtype={"recall": float})
        table = recall.T.rename_axis(index="proposals kept", columns=None).rename({"recall": "recall at IoU 0.5"})
        yield Table(table.reset_index(), f"Recall of the proposals, {found.name(path.parent)}.", digits=3)
    for number, record in enumerate(json.loads(path.read_text())[:MAX_PROPOSALS], start=1):
        picture = path.with_name(Path(record["picture"]).name)
        caption = f"{picture.stem}: the first stage's best proposals, and what the second made of them."
        yield from _picture(found, picture, caption, f"proposals-{number}")


def _photographs(found: Findings, path: Path) -> Iterator[Block]:
    comparison = json.loads(path.read_text())
    if comparison["split"] is not None:
        return
    detectors, rows, pictures = list(comparison["weights"]), [], []
    kinds = ["both", "other class", *(f"only {name}" for name in detectors)]
    for number, photo in enumerate(comparison["photographs"], start=1):
        name, objects = Path(photo["file_name"]).name, Counter(pair["agreement"] for pair in photo["objects"])
        times = [photo["milliseconds"].get(detector) for detector in detectors]
        rows.append([name, *(objects[kind] for kind in kinds), *times])
        if photo.get("picture") and number <= MAX_PHOTOGRAPHS:
            picture = path.parent / "pictures" / Path(photo["picture"]).name
            pictures += _picture(found, picture, name, f"photograph-{number}")
    table = pd.DataFrame(rows, columns=["photograph", *kinds, *(f"{name}, ms" for name in detectors)])
    caption = f"Objects with score {comparison['score']:g} or more, by which detector found them, and time on"
    yield Table(table, f"{caption} {comparison['machine']}.", digits=0)
    yield from pictures


def _errors(found: Findings, path: Path) -> Iterator[Block]:
    analyses = json.loads(path.read_text())
    words = f"On {analyses.pop('photographs')} photographs of {analyses.pop('split')}, AP50 (area): "
    words += ", ".join(f"{name} {figure(analysis['ap50'], 3)}" for name, analysis in analyses.items())
    yield f"{words}. The cost of a kind is the rise of AP50 if its errors alone were mended; costs do not add up."
    columns = {}
    for name, analysis in analyses.items():
        columns[f"{name}, number"] = pd.Series(analysis["count"], dtype=int)
        columns[f"{name}, cost"] = pd.Series(analysis["cost"], dtype=float)
    yield Table(pd.DataFrame(columns).rename_axis("error").reset_index(), digits=3)
    yield from _picture(found, path.with_name("errors.png"), "What errors cost.")


def _speed(found: Findings) -> Iterator[Block]:
    rows = []
    for run in (*([found.birds] if found.birds else found.pair[:1]), *found.detectors):
        batch = run.config.get("SOLVER", {}).get("IMS_PER_BATCH")
        speeds = [row["images_per_second"] for row in run.rows if "images_per_second" in row]
        if run.is_detector and isinstance(batch, int):
            speeds = [batch / row["time"] for row in run.rows if row.get("time")]
        if speeds:
            machine = run.sessions[-1].get("machine", "") if run.sessions else "not recorded"
            speed = f"{statistics.median(speeds):.1f} images/s"
            rows.append([f"training {run.network}", speed, "median of the steps of the log", machine])
    rows += found.newest("comparison.json", _inference)
    if rows:
        yield Table(pd.DataFrame(rows, columns=["what", "speed", "measured as", "machine"]))


def _inference(path: Path) -> list[list[str]]:
    comparison, rows = json.loads(path.read_text()), []
    for name in comparison["weights"]:
        photographs = [photo["milliseconds"] for photo in comparison["photographs"]]
        if times := [times[name] for times in photographs if name in times]:
            how = f"median of {len(times)} photographs, one at a time"
            speed = f"{statistics.median(times):.0f} ms/image"
            rows.append([f"detecting with {name}", speed, how, comparison["machine"]])
    return rows


def _missing(found: Findings) -> Iterator[Block]:
    if found.missing:
        yield "What no run has given yet, and the command that would make it:"
        yield Commands(found.missing)


SECTIONS = (
    ("results", "Results at a glance", _results),
    ("runs", "What ran", _what_ran),
    ("sweep", "Sweep over learning rates and epochs", _sweep),
    ("pretraining", "Pretrained against random weights", _pretraining),
    ("classifier", "The bird classifier", _classifier),
    ("detectors", "Both detectors, class by class", _per_class),
    ("curves", "Loss and average precision while training", _detector_curves),
    ("precision-recall", "Precision against recall", _pr_curves),
    ("proposals", "Proposals beside detections", _proposals, "proposals.json"),
    ("photographs", "Both detectors on photographs from outside", _photographs, "comparison.json"),
    ("errors", "Kinds of errors", _errors, "errors.json"),
    ("speed", "Speed", _speed),
    ("missing", "Not there", _missing),
)
LACKING = {  # section -> what is missing without it, and the command that makes it
    "sweep": ("the sweep over learning rates and epochs", "make sweep"),
    "pretraining": ("pretrained against random weights", "make compare-pretraining"),
    "proposals": ("proposals beside detections, and their recall", "make visualize-proposals"),
    "photographs": ("both detectors on photographs from outside", 'make compare-detectors IMAGES="a.jpg b.jpg c.jpg"'),
    "errors": ("kinds of errors of both detectors", "make compare-detectors"),
}


def _duration(runs: Sequence[Run]) -> str:
    """Time of all sessions of some runs; a session that was killed has left none."""
    times = [session.get("seconds") for run in runs for session in run.sessions]
    known = [time for time in times if isinstance(time, int | float) and math.isfinite(time)]
    if not known:
        return NONE
    minutes, seconds = divmod(round(sum(known)), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return text if len(known) == len(times) else f"{text} and more"


def _of_trials(found: Findings, trials: Sequence[Run], columns: dict[str, str]) -> pd.DataFrame:
    """The results of finished trials."""
    rows = [
        {**run.result, "start": run.path.name, "weights": found.name(run.start), "rate": f"{run.result['lr']:g}"}
        for run in trials
    ]
    return pd.DataFrame(rows)[list(columns)].rename(columns=columns)


def _is_voc07_test(evaluation: Evaluation) -> bool:
    """Whether a detector's evaluation was on the official VOC07 test split, to the last object."""
    return evaluation.table["gts"].drop("mAP").to_dict() == VOC07_TEST


def _split(run: Run, evaluation: Evaluation) -> str:
    """What a detector was evaluated on."""
    if _is_voc07_test(evaluation):
        return "VOC07 test"
    session = evaluation.session or (run.sessions or [{}])[-1]
    splits = session.get("test") or run.config.get("DATASETS", {}).get("TEST") or []
    return f"{', '.join(map(str, splits))} of {run.data(session)}"


def _slug(run: Run) -> str:
    return run.network.lower().replace(" ", "-")


def _picture(found: Findings, path: Path, caption: str, name: str = "") -> list[Picture]:
    """A picture of a run, unless it is missing or broken."""
    picture = found.attempt(lambda path: Picture(f"{name or path.stem}.webp", shrink(path), caption), path)
    return [picture] if picture else []


def _curves(panels: Mapping[str, dict], name: str, caption: str) -> list[Picture]:
    """Panels of curves by epoch, of those that have points."""
    panels = {title: {label: points for label, points in curves.items() if points} for title, curves in panels.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    return [Picture(f"{name}.svg", draw_curves(panels), caption)] if panels else []


def _bird_curves(runs: Mapping[str, Run], name: str) -> list[Picture]:
    panels = {
        title: {
            f"{label}{part}": run.points(f"{prefix}_{key}")
            for label, run in runs.items()
            for part, prefix in (("validation", "validation"), ("training", "train"))
        }
        for title, key in (("top-1, %", "top1"), ("loss", "loss"))
    }
    return _curves(panels, name, "Validation in full lines, training dashed.")
