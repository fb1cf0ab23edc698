"""What the report says: the findings as sections of text, tables and pictures, for either template."""

import datetime
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tools.report.figures import Curve, curves, shrink
from tools.report.gather import Comparison, Evaluation, Findings, Run, Sweep

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
LONG = 16  # characters of a cell that may wrap
VERSIONS = ("python", "torch", "torchvision", "timm", "detectron2")
NONE = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table of finished strings; `strong` are the positions of rows that stand out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: Sequence[int] = ()
    kind: str = "table"

    def align(self, column: int) -> str:
        """How a column is set: "number", "long" where its cells may wrap, else "short"."""
        cells = [row[column] for row in self.rows if row[column] not in ("", NONE)]
        if cells and all(re.fullmatch(r"[\d.]+( %)?", cell) for cell in cells):
            return "number"
        return "long" if any(len(cell) > LONG for cell in cells) else "short"


@dataclass(frozen=True)
class Picture:
    """A picture: name of its file, its bytes and what is to be seen on it."""

    name: str
    content: bytes
    caption: str
    kind: str = "picture"


@dataclass(frozen=True)
class Listing:
    """A text file to be unfolded."""

    title: str
    text: str
    kind: str = "listing"


@dataclass(frozen=True)
class Side:
    """Blocks that stand side by side where there is room."""

    blocks: Sequence
    kind: str = "side"


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    id: str
    title: str
    blocks: list


@dataclass
class Document:
    """The whole report."""

    root: Path
    sections: list[Section] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def add(self, id: str, title: str, blocks: Iterable) -> None:
        """Adds a section unless it is empty."""
        if blocks := [block for block in blocks if block is not None]:
            self.sections.append(Section(id, title, blocks))

    def name(self, path: Path | str) -> str:
        """A folder or file as the report calls it: as seen from that of all runs if it is in there."""
        path = Path(path)
        return path.relative_to(self.root).as_posix() if self.root in path.parents else str(path)

    def picture(self, path: Path, name: str, caption: str) -> Picture | None:
        """A picture of a run; None where it is missing, or broken, which is then a problem."""
        if not path.is_file():
            return None
        try:
            return Picture(f"{name}.webp", shrink(path), caption)
        except (OSError, ValueError, SyntaxError) as error:
            self.problems.append(f"{path}: not a whole picture ({error}); left out")
            return None


def compose(findings: Findings) -> Document:
    """Writes the report: the newest of each kind in full, all others in the table of runs."""
    document = Document(findings.root, problems=list(findings.problems))
    birds = _birds(findings)
    detectors = [
        run
        for name in ("Faster R-CNN", "YOLOv3")
        if (run := next((run for run in findings.runs if run.network == name), None))
    ]
    grid = next(iter(findings.grids), None)
    pretraining = next(iter(findings.pretrainings), None)
    measured = [(run, findings.detector_evaluations.get(run.path)) for run in detectors]

    document.add("results", "Results at a glance", _results(document, findings, birds, pretraining, grid, measured))
    document.add("runs", "What ran", _what_ran(document, findings, [run for run in [birds, *detectors] if run]))
    document.add("sweep", "Sweep over learning rates and epochs", _sweep(document, grid))
    document.add("pretraining", "Pretrained against random weights", _pretraining(document, findings, pretraining))
    document.add("classifier", "The bird classifier", _classifier(document, findings, birds))
    document.add("detectors", "Both detectors, class by class", _per_class(document, measured))
    document.add("curves", "Loss and average precision while training", _detector_curves(document, detectors))
    document.add("precision-recall", "Precision against recall", _pr_curves(document, measured))
    document.add("proposals", "Proposals beside detections", _proposals(document, findings))
    document.add("photographs", "Both detectors on photographs from outside", _photographs(document, findings))
    document.add("errors", "Kinds of errors", _errors(document, findings))
    document.add("speed", "Speed", _speed(findings, birds, pretraining, detectors))
    return document


def duration(sessions: Sequence[dict]) -> str:
    """Time of all sessions of a run; a session that was killed has left none."""
    times = [session.get("seconds") for session in sessions]
    known = [time for time in times if isinstance(time, int | float) and math.isfinite(time)]
    if not known:
        return NONE
    minutes, seconds = divmod(round(sum(known)), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return text if len(known) == len(times) else f"{text} and more"


def figure(value: float | None, digits: int) -> str:
    """A figure with so many decimals; a dash for nan and None."""
    return NONE if value is None or math.isnan(value) else f"{value:.{digits}f}"


def data_of(sessions: Sequence[dict], config: dict) -> str:
    """What the data was: the drawn sample and its seed, or the folder."""
    session = sessions[-1] if sessions else {}
    data = session.get("data") or config.get("data") or config.get("DATASETS", {}).get("ROOT")
    if session.get("sample_seed") is not None:
        return f"drawn sample, seed {session['sample_seed']}"
    return str(data) if data else "not recorded"


def start_of(run: Run) -> str:
    """The weights that a run started from."""
    if run.is_detector:
        weights = run.config["MODEL"].get("WEIGHTS")
        return str(weights) if weights else "random"
    if not run.config.get("pretrained"):
        return "random"
    return str(run.config.get("weights") or "ImageNet")


def length_of(run: Run) -> str:
    """How long it was to train, and how far it has come if it is not at its end."""
    if run.is_detector:
        total, unit = run.config.get("SOLVER", {}).get("MAX_ITER"), "iterations"
        done = int(run.rows[-1]["iteration"]) + 1 if run.rows else 0
    else:
        total, unit = run.config.get("epochs"), "epochs"
        done = int(run.rows[-1].get("epoch", 0)) if run.rows else 0
    return f"{total} {unit}" if done == total else f"{done} of {total} {unit}"


def settings_of(run: Run) -> str:
    """Learning rate and batch."""
    solver = run.config.get("SOLVER", {})
    rate, batch = (solver.get("BASE_LR"), solver.get("IMS_PER_BATCH")) if run.is_detector else (
        run.config.get("lr"), run.config.get("batch_size")
    )  # fmt: skip
    size = "" if run.is_detector else f", {run.config.get('image_size')} px"
    return f"rate {rate}, batch {batch}{size}"


def is_voc07_test(evaluation: Evaluation) -> bool:
    """Whether the objects are those of the official VOC07 test split, to the last one."""
    return {name: row["gts"] for name, row in evaluation.per_class.items()} == VOC07_TEST


def is_cub_test(result: dict) -> bool:
    """Whether the result is of the official test split of CUB-200-2011."""
    return {key: result.get(key) for key in CUB_TEST} == CUB_TEST


def _birds(findings: Findings) -> Run | None:
    """The classifier to show: the newest run that is no mere source of weights, else the best of the comparisons."""
    trials = [trial for sweep in (*findings.pretrainings, *findings.grids) for trial in sweep.trials]
    sources = {Path(str(run.config.get("weights"))).parent for run in (*findings.runs, *trials) if not run.is_detector}
    alone = (run for run in findings.runs if not run.is_detector and run.path not in sources)
    finished = [trial for trial in trials if trial.result]
    return next(alone, None) or max(finished, key=lambda trial: trial.result["validation_top1"], default=None)


def _results(
    document: Document, findings: Findings, birds: Run | None, pretraining: Sweep | None, grid: Sweep | None,
    measured: Sequence[tuple[Run, Evaluation | None]],
) -> list:  # fmt: skip
    rows = []
    candidates = [("fine-tuned", birds)] if birds in findings.runs else []
    candidates += [(f"started {trial.path.name}", trial) for trial in (pretraining.trials if pretraining else [])]
    if best := _best(grid):
        candidates.append(("best of the sweep", best))
    for what, run in candidates:
        if run.result:
            data = "CUB-200-2011, test" if is_cub_test(run.result) else data_of(run.sessions, run.config)
            study = (
                f"{STUDY_TOP1:.2f} %"
                if is_cub_test(run.result) and run.network.partition(".")[0] == "resnet18"
                else NONE
            )
            if start_of(run) == "random":
                study = NONE  # the study's figure is from ImageNet weights
            rows.append(
                [
                    f"{run.network}, {what}",
                    data,
                    document.name(start_of(run)),
                    "top-1",
                    f"{run.result['top1']:.2f} %",
                    study,
                ]
            )
    for run, evaluation in measured:
        if evaluation:
            is_same = is_voc07_test(evaluation)
            sessions = [evaluation.session] if evaluation.session else run.sessions
            data = "VOC07 test" if is_same else data_of(sessions, run.config)
            for metric, label in (("AP50_11point", "mAP, 11 points"), ("AP50", "mAP, area")):
                is_compared = is_same and run.network == "Faster R-CNN" and metric == "AP50_11point"
                study = f"{STUDY_AP:.3f}" if is_compared else NONE
                rows.append(
                    [
                        run.network,
                        data,
                        document.name(start_of(run)),
                        label,
                        figure(evaluation.figures[metric], 3),
                        study,
                    ]
                )
    if not rows:
        return []
    columns = ["what", "data", "started from", "metric", "measured", "the study"]
    blocks = []
    if all(row[-1] == NONE for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
        blocks = [Text("None of this was measured on the data of the study, so its figures are not set beside these.")]
    note = "Top-1 in per cent, average precision (IoU 0.5, difficult objects ignored) from 0 to 1, all on test splits."
    return [Table(columns, rows, note), *blocks]


def _what_ran(document: Document, findings: Findings, shown: Sequence[Run]) -> list:
    rows, strong, environments = [], [], {}
    for run in sorted(findings.runs, key=lambda run: str(run.path)):
        if run in shown:
            strong.append(len(rows))
        state = "finished" if run.is_finished else "not finished: still going, or interrupted"
        data, time = data_of(run.sessions, run.config), duration(run.sessions)
        rows.append([document.name(run.path), run.network, data, document.name(start_of(run)), settings_of(run),
                     _seed(run), length_of(run), time, state])  # fmt: skip
    for sweep in (*findings.grids, *findings.pretrainings):
        done, number = sum(trial.is_finished for trial in sweep.trials), len(sweep.trials)
        sessions = [session for trial in sweep.trials for session in trial.sessions]
        network, data, seed = NONE, NONE, NONE
        if sweep.trials:
            first = sweep.trials[0]
            network, data, seed = first.network, data_of(first.sessions, first.config), _seed(first)
        state = "finished" if done == number else f"{done} of {number} runs finished"
        rows.append(
            [f"{document.name(sweep.path)} ({number} runs)", network, data, "", "", seed, "", duration(sessions), state]
        )
    if not rows:
        return []
    trials = [trial for sweep in (*findings.grids, *findings.pretrainings) for trial in sweep.trials]
    for run in (*findings.runs, *trials):
        for session in run.sessions:
            versions = session.get("versions") if isinstance(session.get("versions"), dict) else {}
            key = (str(session.get("machine", NONE)), str(session.get("processes", NONE)),
                   *(str(versions.get(name, NONE)) for name in VERSIONS))  # fmt: skip
            environments.setdefault(key, set()).add(run.path)
    columns = ["run", "network", "data", "started from", "settings", "seed", "length", "time", "state"]
    blocks = [
        Table(columns, rows, "All runs; those in bold are shown below: the newest finished one of each kind.", strong)
    ]
    if environments:
        table = [[*key, str(len(paths))] for key, paths in sorted(environments.items())]
        blocks.append(Table(["machine", "processes", *VERSIONS, "runs"], table, "Where, and with which versions."))
    for run in shown:
        commands = "\n".join(f"# {session.get('command')}" for session in run.sessions)
        text = yaml.safe_dump(run.config, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
        blocks.append(Listing(f"{document.name(run.path)}/config.yaml", f"{commands}\n{text}".lstrip()))
    return blocks


def _seed(run: Run) -> str:
    return str(run.config.get("SEED" if run.is_detector else "seed", NONE))


def _best(grid: Sweep | None) -> Run | None:
    finished = [trial for trial in grid.trials if trial.result] if grid else []
    # By the validation figure; the test figure of a recipe that holds images out must not choose.
    return min(finished, key=_rank, default=None)


def _rank(trial: Run) -> tuple[float, int, float]:
    """Sorts trials by accuracy; of equals the one that costs least comes first, as in `sweep.csv`."""
    return -trial.result["validation_top1"], trial.result["epochs"], trial.result["lr"]


def _sweep(document: Document, grid: Sweep | None) -> list:
    best = _best(grid)
    if best is None:
        document.missing.append(("the sweep over learning rates and epochs", "make sweep"))
        return []
    finished = sorted((t for t in grid.trials if t.result), key=_rank)
    rows = [
        [f"{t.result['lr']:g}", str(t.result["epochs"]), f"{t.result['validation_top1']:.2f}",
         f"{t.result['validation_top5']:.2f}", str(t.result["epoch"]), f"{t.result['top1']:.2f}"]
        for t in finished
    ]  # fmt: skip
    columns = ["learning rate", "epochs", "validation top-1, %", "validation top-5, %", "best epoch", "test top-1, %"]
    unfinished = len(grid.trials) - len(finished)
    words = (
        f"{best.network} on {data_of(best.sessions, best.config)}. Best: rate {best.result['lr']:g} with "
        f"{best.result['epochs']} epochs, validation top-1 {best.result['validation_top1']:.2f} %, test top-1 "
        f"{best.result['top1']:.2f} %; chosen on the {best.result['chosen_on']}."
    )
    if unfinished:
        words += f" {unfinished} of {len(grid.trials)} runs have not finished."
    heat_map = document.picture(grid.path / "sweep.png", "sweep", "Validation top-1 by learning rate and epochs.")
    blocks = [Table(columns, rows, f"Every run of {document.name(grid.path)}, the best first.", [0]), heat_map]
    return [Text(words), Side([block for block in blocks if block])]


def _pretraining(document: Document, findings: Findings, sweep: Sweep | None) -> list:
    if sweep is None or not any(trial.rows for trial in sweep.trials):
        document.missing.append(("pretrained against random weights", "make compare-pretraining"))
        return []
    trials = {trial.path.name: trial for trial in sweep.trials if trial.rows}
    words = []
    if "pretrained" in trials:
        words.append(_pretrained_means(document, trials["pretrained"], findings))
    words += [f"The run {name} has not finished." for name, trial in trials.items() if not trial.is_finished]
    rows = [
        [name, document.name(start_of(trial)), str(trial.result["epochs"]), f"{trial.result['lr']:g}",
         str(trial.result["seed"]), f"{trial.result['top1']:.2f}", f"{trial.result['top5']:.2f}",
         str(trial.result["epoch"])]
        for name, trial in trials.items() if trial.result
    ]  # fmt: skip
    columns = ["start", "weights", "epochs", "rate", "seed", "test top-1, %", "test top-5, %", "best epoch"]
    picture = _bird_curves(trials, "pretraining", "Validation in full lines, training dashed.")
    return [
        Text(" ".join(words)) if words else None,
        Table(columns, rows, document.name(sweep.path)) if rows else None,
        picture,
    ]


def _pretrained_means(document: Document, trial: Run, findings: Findings) -> str:
    data = data_of(trial.sessions, trial.config)
    if start_of(trial) == "random":
        return f"No pretrained weights could be had on {data}, so that both runs started from random ones."
    if start_of(trial) == "ImageNet":
        return f"Trained on {data}; pretrained means ImageNet weights."
    source = next((run for run in findings.runs if run.path == Path(start_of(trial)).parent), None)
    origin = f", from a run on {data_of(source.sessions, source.config)}" if source else ""
    return f"Trained on {data}; pretrained means the weights {document.name(start_of(trial))}{origin}."


def _bird_curves(runs: Mapping[str, Run], name: str, caption: str) -> Picture | None:
    panels = {}
    for title, key in (("top-1, %", "top1"), ("loss", "loss")):
        panels[title] = [
            Curve(f"{label}, {part}".lstrip(", "), points, number, part == "training")
            for number, (label, run) in enumerate(runs.items())
            for part, prefix in (("validation", "validation"), ("training", "train"))
            if (points := _points(run, f"{prefix}_{key}"))
        ]
    return _curves(panels, name, caption)


def _points(run: Run, key: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in run.rows if key in row and "epoch" in row]


def _curves(panels: Mapping[str, list[Curve]], name: str, caption: str) -> Picture | None:
    panels = {title: lines for title, lines in panels.items() if lines}
    return Picture(f"{name}.svg", curves(panels, "epoch"), caption) if panels else None


def _classifier(document: Document, findings: Findings, birds: Run | None) -> list:
    blocks: list = []
    if birds is None:
        document.missing.append(("a fine-tuned classifier", "make finetune"))
    else:
        data = data_of(birds.sessions, birds.config)
        words = f"{document.name(birds.path)}: {birds.network} on {data}, {length_of(birds)}"
        if birds.result:
            words += (
                f"; test top-1 {birds.result['top1']:.2f} %, top-5 {birds.result['top5']:.2f} % (epoch "
                f"{birds.result['epoch']}, chosen on the {birds.result['chosen_on']})"
            )
        blocks.append(Text(f"{words}."))
        if birds in findings.runs:  # the curves of a run of a sweep stand there
            caption = "Validation in full lines, training dashed."
            blocks.append(_bird_curves({"": birds}, "classifier", caption))
    evaluation = next(iter(findings.bird_evaluations), None)
    if evaluation is None:
        weights = f"{birds.path}/model_best.pth" if birds else "..."
        document.missing.append(("confused pairs and calibration", f"make eval-classifier WEIGHTS={weights}"))
        return blocks
    of = document.name(evaluation.session.get("weights") or evaluation.path)
    figures = evaluation.figures
    row = [figure(figures["images"], 0), *(figure(figures[key], 2) for key in
           ("top1", "top5", "mean_class_accuracy", "calibration_error")), figure(figures["loss"], 3)]  # fmt: skip
    columns = ["images", "top-1, %", "top-5, %", "mean of classes, %", "calibration error, %", "loss"]
    blocks.append(Table(columns, [row], f"Evaluation of {of}."))
    pairs = [[pair["true"], pair["predicted"], pair["images"]] for pair in evaluation.pairs]
    if pairs:
        blocks.append(Table(["true class", "taken for", "images"], pairs, "Most confused pairs."))
    for name, caption in (
        (
            "confused_pairs",
            "Most confused pairs: a picture taken for the other, and one of the class it was taken for.",
        ),
    ):
        blocks.append(document.picture(evaluation.path / f"{name}.png", name, caption))
    sides = [
        document.picture(evaluation.path / "confusion_matrix.png", "confusion_matrix", "Confusion matrix."),
        document.picture(evaluation.path / "calibration.png", "calibration", "Confidence against accuracy."),
    ]
    return [*blocks, Side([side for side in sides if side])]


def _per_class(document: Document, measured: Sequence[tuple[Run, Evaluation | None]]) -> list:
    for name, target in (("Faster R-CNN", "frcnn"), ("YOLOv3", "yolov3")):
        found = next(((run, evaluation) for run, evaluation in measured if run.network == name), None)
        if found is None:
            document.missing.append((f"{name}: curves, table by class, PR curves", f"make train-{target}"))
        elif found[1] is None:
            weights = found[0].path / "model_best.pth"
            document.missing.append((f"{name}: table by class, PR curves", f"make eval-{target} WEIGHTS={weights}"))
    tables, words = [], []
    for run, evaluation in measured:
        if evaluation is None:
            continue
        rows = [
            [name, figure(row["gts"], 0), figure(row["dets"], 0), figure(row["recall"], 3),
             figure(row["AP50_11point"], 3), figure(row["AP50"], 3)]
            for name, row in evaluation.per_class.items()
        ]  # fmt: skip
        rows.append(
            ["mAP", "", "", "", figure(evaluation.figures["AP50_11point"], 3), figure(evaluation.figures["AP50"], 3)]
        )
        weights = document.name(evaluation.session.get("weights") or run.path)
        weights += "" if evaluation.session else ", last evaluation while training"
        caption = f"{run.network} on {_test_of(run, evaluation)}: {weights}."
        tables.append(
            Table(["class", "gts", "dets", "recall", "ap, 11 points", "ap, area"], rows, caption, [len(rows) - 1])
        )
        if run.network == "Faster R-CNN" and is_voc07_test(evaluation):
            words.append(
                f"On the same data, VOC07 test, the study's Faster R-CNN has {STUDY_AP:.3f} mAP (11 points), this one "
                f"{evaluation.figures['AP50_11point']:.3f}. The study's figures by class are not at hand."
            )
    if not tables:
        return []
    note = (
        "ap is the average precision at IoU 0.5; gts are objects to find, difficult ones left out; dets all detections."
    )
    return [Text(" ".join([note, *words])), Side(tables)]


def _test_of(run: Run, evaluation: Evaluation) -> str:
    if is_voc07_test(evaluation):
        return "VOC07 test"
    session = evaluation.session or (run.sessions[-1] if run.sessions else {})
    split = session.get("test") or run.config.get("DATASETS", {}).get("TEST") or []
    return f"{', '.join(map(str, split))} of {data_of([session], run.config)}"


def _detector_curves(document: Document, detectors: Sequence[Run]) -> list:
    blocks = []
    for run in detectors:
        keys = {"AP50_11point": "AP50, 11 points", "AP50": "AP50, area", "AP75": "AP75", "AP": "AP 0.50:0.95"}
        losses = [("training", "total_loss", 0, True), ("validation", "validation_loss", 0, False)]
        panels = {
            "loss": [Curve(label, points, color, dashed) for label, key, color, dashed in losses
                     if (points := _points(run, key))],
            "mAP on the test split": [Curve(label, points, number) for number, (key, label) in enumerate(keys.items())
                                      if (points := _points(run, key))],
        }  # fmt: skip
        state = "" if run.is_finished else " So far: the run has not finished."
        name = run.network.lower().replace(" ", "-")
        blocks.append(_curves(panels, f"curves-{name}", f"{run.network}, {document.name(run.path)}.{state}"))
    return blocks


def _pr_curves(document: Document, measured: Sequence[tuple[Run, Evaluation | None]]) -> list:
    return [
        document.picture(
            evaluation.path / "pr_curves.png",
            f"pr-curves-{run.network.lower().replace(' ', '-')}",
            f"{run.network} on {_test_of(run, evaluation)}, at IoU 0.5.",
        )
        for run, evaluation in measured
        if evaluation
    ]


def _proposals(document: Document, findings: Findings) -> list:
    proposals = next(iter(findings.proposals), None)
    blocks = []
    if proposals:
        if proposals.recall:
            columns = ["proposals kept", *map(str, proposals.recall)]
            row = ["recall at IoU 0.5", *(figure(value, 3) for value in proposals.recall.values())]
            blocks.append(Table(columns, [row], f"Recall of the proposals, {document.name(proposals.path)}."))
        for number, path in enumerate(proposals.pictures[:MAX_PROPOSALS], start=1):
            caption = f"{path.stem}: the first stage's best proposals, and what the second made of them."
            blocks.append(document.picture(path, f"proposals-{number}", caption))
    if not any(blocks):
        document.missing.append(("proposals beside detections, and their recall", "make visualize-proposals"))
    return blocks


def _photographs(document: Document, findings: Findings) -> list:
    comparison = next((found for found in findings.comparisons if found.split is None), None)
    if comparison is None:
        command = 'make compare-detectors IMAGES="a.jpg b.jpg c.jpg"'
        document.missing.append(("both detectors on photographs from outside", command))
        return []
    names = list(comparison.weights)
    kinds = ["both", "other class", *(f"only {name}" for name in names)]
    rows = [
        [photo.name, *(str(photo.agreements.get(kind, 0)) for kind in kinds),
         *(figure(photo.milliseconds.get(name), 0) for name in names)]
        for photo in comparison.photographs
    ]  # fmt: skip
    columns = ["photograph", *kinds, *(f"{name}, ms" for name in names)]
    caption = (
        f"Objects with score {comparison.score:g} or more, by which detector found them, and time on "
        f"{comparison.machine}."
    )
    pictures = [
        document.picture(photo.picture, f"photograph-{number}", photo.name)
        for number, photo in enumerate(comparison.photographs[:MAX_PHOTOGRAPHS], start=1)
        if photo.picture
    ]
    return [Table(columns, rows, caption), *pictures]


def _errors(document: Document, findings: Findings) -> list:
    errors = next(iter(findings.errors), None)
    if errors is None:
        document.missing.append(("kinds of errors of both detectors", "make compare-detectors"))
        return []
    columns, rows = ["error"], []
    for name in errors.analyses:
        columns += [f"{name}, number", f"{name}, cost"]
    for kind in next(iter(errors.analyses.values()))["count"] if errors.analyses else []:
        row = [kind]
        for analysis in errors.analyses.values():
            row += [str(analysis["count"].get(kind, 0)), figure(analysis["cost"].get(kind), 3)]
        rows.append(row)
    precision = ", ".join(f"{name} {figure(analysis['ap50'], 3)}" for name, analysis in errors.analyses.items())
    words = (
        f"On {errors.photographs} photographs of {errors.split}, AP50 (area): {precision}. The cost of a kind is the "
        "rise of AP50 if its errors alone were mended; costs do not add up."
    )
    return [
        Text(words),
        Table(columns, rows),
        document.picture(errors.path / "errors.png", "errors", "What errors cost."),
    ]


def _speed(findings: Findings, birds: Run | None, pretraining: Sweep | None, detectors: Sequence[Run]) -> list:
    rows = []
    bird_runs = [birds] if birds else pretraining.trials[:1] if pretraining else []
    for run in (*bird_runs, *detectors):
        if run.is_detector:
            batch = run.config.get("SOLVER", {}).get("IMS_PER_BATCH")
            speeds = [batch / row["time"] for row in run.rows if row.get("time") and isinstance(batch, int)]
        else:
            speeds = [row["images_per_second"] for row in run.rows if "images_per_second" in row]
        if speeds:
            machine = str(run.sessions[-1].get("machine", "")) if run.sessions else "not recorded"
            speed = f"{statistics.median(speeds):.1f} images/s"
            rows.append([f"training {run.network}", speed, "median of the steps of the log", machine])
    for comparison in findings.comparisons[:1]:
        rows += _inference(comparison)
    return [Table(["what", "speed", "measured as", "machine"], rows)] if rows else []


def _inference(comparison: Comparison) -> list[list[str]]:
    rows = []
    for name in comparison.weights:
        if times := [photo.milliseconds[name] for photo in comparison.photographs if name in photo.milliseconds]:
            how = f"median of {len(times)} photographs, one at a time"
            rows.append([f"detecting with {name}", f"{statistics.median(times):.0f} ms/image", how, comparison.machine])
    return rows


def made_on() -> str:
    """The date, the only line of a report that differs from one making to the next."""
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
