"""What the report says, section by section: the newest of each kind in full, all others in the table of runs."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from tools.report import birds, boxes, study
from tools.report.document import NONE, Block, Listing, Missing, Section, Spread, Table, duration, figure
from tools.report.runs import Run, Runs, finished

ENVIRONMENT = ["machine", "processes", "python", "torch", "torchvision", "timm", "detectron2"]


class Part(NamedTuple):
    """A section that the report may have.

    Attributes:
        id, title, explanation: of the section.
        write: yields its blocks, given the runs, and the path of `file` if it has one.
        command: what gives it something to say.
        file: name of the file that it tells of: of the newest that is whole and has anything to give.
    """

    id: str
    title: str
    explanation: str
    write: Callable[..., Iterator[Block | Missing]]
    command: str = ""
    file: str = ""


def compose(runs: Runs) -> tuple[list[Section], list[Missing]]:
    """Writes the report.

    Returns:
        The sections, without those that have nothing to say, and what no run has given.
    """
    sections, missing = [], []
    for part in PARTS:
        write = partial(_written, part, runs)
        written = runs.newest(part.file, write) if part.file else write()
        missing += [block for block in written if isinstance(block, Missing)]
        if blocks := [block for block in written if block and not isinstance(block, Missing)]:
            sections.append(Section(part.id, part.title, part.explanation, blocks))
        elif part.command:
            missing.append(Missing(part.title, part.command))
    if missing:
        table = pd.DataFrame([(what, f"`{command}`") for what, command in missing], columns=["what", "command"])
        explanation = "What no run has given yet, and the command that makes it."
        sections.append(Section("missing", "Not there", explanation, [Table(table)]))
    return sections, missing


def _written(part: Part, runs: Runs, *path: Path) -> list[Block | Missing]:
    return list(part.write(runs, *path))


def _results(runs: Runs) -> Iterator[Block]:
    rows: list[list[str | float | None]] = []
    kinds = Counter(run.network for run in runs.different)
    classifiers = [("fine-tuned", run) for run in runs.different if not run.is_detector]
    classifiers += [(f"started {trial.path.name}", trial) for trial in runs.pair]
    classifiers += [("best of the sweep", trial) for trial in finished(runs.grid)[:1]]
    for what, run in classifiers:
        if run.result:
            data = "CUB-200-2011, test" if study.is_cub_test(run) else run.data()
            own = f" {runs.title(run)}" if what == "fine-tuned" and kinds[run.network] > 1 else ""
            row = [f"{run.network}, {what}{own}", data, runs.name(run.start), "top-1"]
            rows.append([*row, _over_seeds(run.measured("top1"), 2, " %"), _over_seeds(study.top1(run), 2, " %")])
    for run in sorted(runs.different, key=lambda run: (run.network, run.path)):
        if run.is_detector and run.evaluation:
            data = "VOC07 test" if study.is_voc07_test(run.evaluation) else run.data(run.evaluation.session)
            own = f", {runs.title(run)}" if kinds[run.network] > 1 else ""
            row, means = [run.network + own, data, runs.name(run.start)], dict(run.by_class.loc["mAP"])
            rows.append([*row, "mAP, 11 points", _over_seeds(means["AP50_11point"]), study.mean_ap(run)])
            rows.append([*row, "mAP, area", _over_seeds(means["AP50"]), None])
    if rows:
        table = pd.DataFrame(rows, columns=["what", "data", "started from", "metric", "measured", "the study"])
        is_compared = any(figure(value) != NONE for value in table["the study"])
        yield Table(table if is_compared else table.drop(columns="the study"), digits=3)
        if not is_compared:
            yield "None of this was measured on the data of the study, so its figures are not set beside these."


def _over_seeds(value: Any, digits: int = 3, unit: str = "") -> str:
    """A figure, and of how many runs its mean and deviation are."""
    runs = f" ({value.number} runs)" if isinstance(value, Spread) else ""
    written = figure(value, digits)
    return written + (unit if written != NONE else "") + runs


def _what_ran(runs: Runs) -> Iterator[Block]:
    shown = [run for run in (runs.birds, *runs.detectors) if run]
    single, rows = sorted(runs.single, key=lambda run: run.path), []
    for run in single:
        state = "finished" if run.is_finished else "not finished: still going, or interrupted"
        rows.append([runs.name(run.path), run.network, run.data(), runs.name(run.start), run.settings, run.seed,
                     run.length, _duration([run]), state])  # fmt: skip
    for trials in runs.sweeps:
        first, done, number = trials[0], sum(trial.is_finished for trial in trials), len(trials)
        state = "finished" if done == number else f"{done} of {number} runs finished"
        rows.append([f"{runs.name(first.path.parent)} ({number} runs)", first.network, first.data(), "", "",
                     first.seed, "", _duration(trials), state])  # fmt: skip
    if rows:
        columns = ["run", "network", "data", "started from", "settings", "seed", "length", "time", "state"]
        strong = [number for number, run in enumerate(single) if run in shown]
        yield Table(pd.DataFrame(rows, columns=columns), strong=strong)
    every = single + [trial for trials in runs.sweeps for trial in trials]
    sessions = [{**session, "runs": str(run.path)} for run in every for session in run.sessions]
    sessions = [{**s, **s["versions"]} if isinstance(s.get("versions"), dict) else s for s in sessions]
    if sessions:
        table = pd.DataFrame(sessions, columns=[*ENVIRONMENT, "runs"], dtype=object).map(figure)
        yield Table(table.groupby(ENVIRONMENT, as_index=False).nunique(), "Where, and with which versions.")
    for run in shown:
        commands = "\n".join(f"# {session.get('command')}" for session in run.sessions)
        text = (run.path / "config.yaml").read_text()
        yield Listing(f"{runs.name(run.path)}/config.yaml", f"{commands}\n{text}".lstrip())


def _speed(runs: Runs) -> Iterator[Block]:
    rows = []
    for run in (*([runs.birds] if runs.birds else runs.pair[:1]), *runs.detectors):
        batch = run.config.get("SOLVER", {}).get("IMS_PER_BATCH")
        speeds = [row["images_per_second"] for row in run.rows if "images_per_second" in row]
        if run.is_detector and isinstance(batch, int):
            speeds = [batch / row["time"] for row in run.rows if row.get("time")]
        if speeds:
            machine = run.sessions[-1].get("machine", "") if run.sessions else "not recorded"
            speed = f"{statistics.median(speeds):.1f} images/s"
            rows.append([f"training {run.network}", speed, "median of the steps of the log", machine])
    rows += runs.newest("comparison.json", _inference)
    if rows:
        yield Table(pd.DataFrame(rows, columns=["what", "speed", "measured as", "machine"]))


def _inference(path: Path) -> list[list[str]]:
    comparison, rows = json.loads(path.read_text()), []
    for name in comparison["weights"]:
        photographs = [photo["milliseconds"] for photo in comparison["photographs"]]
        if times := [times[name] for times in photographs if name in times]:
            how = f"median of {len(times)} photographs, one at a time"
            speed = f"{1000 / statistics.median(times):.1f} images/s"
            rows.append([f"detecting with {name}", speed, how, comparison["machine"]])
    return rows


def _duration(trials: Sequence[Run]) -> str:
    """Time of all sessions of some runs; a session that was killed has left none."""
    times = [session.get("seconds") for run in trials for session in run.sessions]
    known = [time for time in times if isinstance(time, int | float) and math.isfinite(time)]
    if not known:
        return NONE
    return duration(sum(known)) + " and more" * (len(known) < len(times))


PARTS = (
    Part(
        "results", "Results at a glance",
        "One figure a row, all on test splits. Top-1 is the share of pictures whose likeliest class is the right one. "
        "mAP is the mean over the classes of average precision (AP), from 0 to 1: 1 where every object is found before "
        "anything else is; an object counts as found where the boxes share more than half of what they cover together "
        "(IoU over 0.5). Objects marked difficult do not count. 11 points and area are two ways to average. Behind ± "
        "stands the standard deviation over runs that differ in their seed alone.",
        _results,
    ),
    Part(
        "study", "The study beside ours",
        "What the study states, and what these runs found. A figure can be set beside one of the study only where data "
        "and network are the same.",
        study.beside_ours,
    ),
    Part(
        "runs", "What ran",
        "All runs, each with what it was trained on and from; those in bold are shown below: the newest finished one "
        "of each kind.",
        _what_ran,
    ),
    Part(
        "sweep", "Sweep over learning rates and epochs",
        "The same training at several learning rates and lengths. Validation top-1 chooses the best; top-5 counts a "
        "picture as right where its class is among the five likeliest.",
        birds.sweep, "make sweep",
    ),
    Part(
        "pretraining", "Pretrained against random weights",
        "The same training twice: from weights that have seen other pictures before, and from random ones. What lies "
        "between the two full lines is what pretraining is worth.",
        birds.pretraining, "make compare-pretraining",
    ),
    Part(
        "classifier", "The bird classifier",
        "One network in detail: how it learned, which species it takes for which, and whether it is as sure as it is "
        "right.",
        birds.classifier,
    ),
    Part(
        "detectors", "Both detectors, class by class",
        "gts are the objects to find, difficult ones left out; dets all detections, whatever their score; recall the "
        "share of objects found by any of them; ap the average precision at IoU 0.5.",
        boxes.by_class,
    ),
    Part(
        "curves", "Loss and average precision while training",
        "Loss should fall; where the validation loss rises while the training loss falls, the network learns its "
        "pictures by heart. AP 0.50:0.95 is the mean over ten overlaps, and rewards boxes that fit closely.",
        boxes.training_curves,
    ),
    Part(
        "precision-recall", "Precision against recall",
        "Going down the scores: how many of the objects are found (recall), and how many of the detections so far are "
        "right (precision). The area below a curve is the AP of the class.",
        boxes.precision_recall,
    ),
    Part(
        "proposals", "Proposals beside detections",
        "Faster R-CNN has two stages: the first proposes boxes that may hold something, coloured by how sure it is; "
        "the second names them and drops the rest. Recall is the share of objects that a proposal covers.",
        boxes.proposals, "make visualize-proposals", "proposals.json",
    ),
    Part(
        "photographs", "Both detectors on photographs from outside",
        "Photographs that are in no data set of the training, so nobody has said what is right.",
        boxes.photographs, 'make compare-detectors IMAGES="a.jpg b.jpg c.jpg"', "comparison.json",
    ),
    Part(
        "errors", "Kinds of errors",
        "Every wrong detection by its kind, and what each kind costs: the rise of AP50 if its errors alone were "
        "mended. Costs do not add up.",
        boxes.errors, "make compare-detectors", "errors.json",
    ),
    Part("speed", "Speed", "Images a second, on the machine named; compare only rows of one machine.", _speed),
)  # fmt: skip
