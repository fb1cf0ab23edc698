"""Finds every run, sweep, evaluation and comparison below a folder and reads what they wrote.

What a folder is, its files tell: `config.yaml` a run or a sweep, `comparison.json` a comparison of detectors, and so
on. A file that is not what it should be becomes one line of `Findings.problems`; it never stops the report.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd
import yaml

from common.errors import UserError
from tools.run_folder import METRICS, read_metrics, read_sessions

DETECTORS = {"GeneralizedRCNN": "Faster R-CNN", "YOLOv3": "YOLOv3"}  # by Detectron2's name of the architecture
FIRST_WORDS, LAST_WORDS = "Training iterations", "Everything is in"  # of a detector's log, as it begins and ends

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        path: its folder.
        network: such as "resnet18" or "YOLOv3".
        config: `config.yaml`.
        rows: `metrics.json`, numbers only.
        sessions: `environment.json`.
        result: `result.json` of a classifier; empty before its end.
        is_finished: whether it came to its end.
        written: time of the last step, in seconds; the newest run is the one that is shown.
    """

    path: Path
    network: str
    config: dict
    rows: list[dict[str, float]]
    sessions: list[dict]
    result: dict
    is_finished: bool
    written: float

    @property
    def is_detector(self) -> bool:
        """Whether it is one of `DETECTORS`."""
        return self.network in DETECTORS.values()


@dataclass(frozen=True)
class Sweep:
    """Several runs of one recipe: a grid over rates and epochs, or pretrained against random."""

    path: Path
    trials: list[Run]
    written: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a test split: of a detector or of a classifier.

    Attributes:
        path: its folder.
        figures: name -> figure; nan where there is none.
        per_class: class -> figures, of a detector.
        pairs: rows of `confused_pairs.csv`, of a classifier.
        session: the newest of `environment.json`; empty where there is none.
        written: time in seconds.
    """

    path: Path
    figures: dict[str, float]
    per_class: dict[str, dict[str, float]]
    pairs: list[dict[str, str]]
    session: dict
    written: float


@dataclass(frozen=True)
class Photograph:
    """One photograph of a comparison: objects by agreement, and milliseconds by detector."""

    name: str
    picture: Path | None
    agreements: dict[str, int]
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Both detectors on the same photographs, or on those of a test split."""

    path: Path
    weights: dict[str, str]
    split: str | None
    score: float
    machine: str
    photographs: list[Photograph]
    written: float


@dataclass(frozen=True)
class Errors:
    """Kinds of errors: detector -> `ap50`, and `count` and `cost` by kind."""

    path: Path
    split: str
    photographs: int
    analyses: dict[str, dict]
    written: float


@dataclass(frozen=True)
class Proposals:
    """Pictures of proposals beside detections, and the recall of the proposals by the number kept."""

    path: Path
    pictures: list[Path]
    recall: dict[int, float]
    written: float


@dataclass
class Findings:
    """Everything below a folder, the newest of each kind first."""

    root: Path
    runs: list[Run] = field(default_factory=list)
    grids: list[Sweep] = field(default_factory=list)
    pretrainings: list[Sweep] = field(default_factory=list)
    detector_evaluations: dict[Path, Evaluation] = field(default_factory=dict)  # by the folder of the run
    bird_evaluations: list[Evaluation] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    errors: list[Errors] = field(default_factory=list)
    proposals: list[Proposals] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def gather(root: Path) -> Findings:
    """Reads everything below `root`, and `root` itself.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected the folder of all runs: run make demo, or give RUNS=folder")
    findings = Findings(root)
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        if not any(folder.iterdir()):
            findings.problems.append(f"{folder}: an empty folder")
        elif (folder / "config.yaml").is_file():
            _read_run_or_sweep(folder, findings)
        elif (folder / METRICS).is_file():
            findings.problems.append(f"{folder}: has {METRICS} but no config.yaml, so it cannot be told what ran")
        for file, parse, found in (
            ("report.json", _parse_bird_evaluation, findings.bird_evaluations),
            ("comparison.json", _parse_comparison, findings.comparisons),
            ("errors.json", _parse_errors, findings.errors),
            ("proposals.json", _parse_proposals, findings.proposals),
        ):
            if content := _attempt(findings, parse, folder / file):
                found.append(content)
    # A sweep's trials are told of with their sweep.
    in_sweeps = {trial.path for sweep in findings.grids + findings.pretrainings for trial in sweep.trials}
    findings.runs = [run for run in findings.runs if run.path not in in_sweeps]
    for found in (findings.grids, findings.pretrainings, findings.bird_evaluations, findings.comparisons,
                  findings.errors, findings.proposals):  # fmt: skip
        found.sort(key=lambda item: -item.written)
    # A run that is still going is the newest of its kind only where no other has come to an end.
    findings.runs.sort(key=lambda run: (not run.is_finished, -run.written))
    return findings


def _attempt(findings: Findings, parse: Callable[[Path], T], path: Path) -> T | None:
    """What `parse` makes of a file; None if it is missing, or broken, which is then a problem."""
    if not path.exists():
        return None
    try:
        return parse(path)
    except UserError as error:
        findings.problems.append(str(error))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160]
        findings.problems.append(f"{path}: not what was expected ({type(error).__name__}: {reason}); left out")
    return None


def _read_run_or_sweep(folder: Path, findings: Findings) -> None:
    config = _attempt(findings, _parse_config, folder / "config.yaml")
    if config is None:
        return
    children = sorted(path for path in folder.iterdir() if (path / "config.yaml").is_file())
    names = {path.name for path in children}
    if "model" in config and (names & {"pretrained", "random"} or any(name.startswith("lr") for name in names)):
        trials = [trial for path in children if (trial := _read_run(path, findings, Findings(folder)))]
        sweep = Sweep(folder, trials, max((trial.written for trial in trials), default=0.0))
        (findings.pretrainings if names & {"pretrained", "random"} else findings.grids).append(sweep)
    elif run := _read_run(folder, findings, findings):
        findings.runs.append(run)


def _read_run(folder: Path, findings: Findings, to_tell: Findings) -> Run | None:
    """Reads a run; what is wrong with it goes to `to_tell`, since a trial is met again as a folder of its own."""
    config = _attempt(to_tell, _parse_config, folder / "config.yaml")
    if config is None:
        return None
    architecture = config.get("MODEL", {}).get("META_ARCHITECTURE")
    network = DETECTORS.get(str(architecture), config.get("model"))
    if not isinstance(network, str):
        to_tell.problems.append(f"{folder / 'config.yaml'}: names no network that is known here; left out")
        return None
    if network in DETECTORS.values():
        evaluations = (
            _attempt(to_tell, _parse_detector_evaluation, folder / name)
            for name in ("evaluation/evaluation.json", "evaluation.json")
        )
        if evaluation := next(filter(None, evaluations), None):
            findings.detector_evaluations[folder] = evaluation
    result = _attempt(to_tell, _parse_result, folder / "result.json") or {}
    metrics = folder / METRICS
    return Run(
        path=folder,
        network=network,
        config=config,
        rows=_attempt(to_tell, _parse_metrics, metrics) or [],
        sessions=_attempt(to_tell, lambda path: read_sessions(path.parent), folder / "environment.json") or [],
        result=result,
        is_finished=bool(result) or bool(_attempt(to_tell, _has_ended, folder / "log.txt")),
        written=(metrics if metrics.exists() else folder / "config.yaml").stat().st_mtime,
    )


def _parse_config(path: Path) -> dict:
    config = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(config, dict):
        raise ValueError("expected settings by name")
    for key in ("MODEL", "DATASETS", "SOLVER"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{key}: expected settings by name")
    return config


def _parse_metrics(path: Path) -> list[dict[str, float]]:
    rows = [
        {key: value for key, value in row.items() if isinstance(value, int | float)}
        for row in read_metrics(path.parent)
    ]
    if not all(math.isfinite(row["iteration"]) and math.isfinite(row.get("epoch", 0)) for row in rows):
        raise ValueError("an iteration or epoch is no number")
    return rows


def _parse_result(path: Path) -> dict:
    result = json.loads(path.read_text())
    numbers = ("top1", "top5", "validation_top1", "validation_top5", "lr", "epochs", "epoch", "seed")
    return {**result, **{key: result[key] + 0 for key in numbers}, "chosen_on": str(result["chosen_on"])}


def _has_ended(log: Path) -> bool:
    return LAST_WORDS in log.read_text(errors="replace").rpartition(FIRST_WORDS)[2]


def _last_session(folder: Path) -> dict:
    return (read_sessions(folder) or [{}])[-1]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _parse_detector_evaluation(path: Path) -> Evaluation:
    content = json.loads(path.read_text())
    figures = {key: _number(content[key]) for key in ("AP50_11point", "AP50", "AP75", "AP")}
    keys = ("gts", "dets", "recall", "AP50_11point", "AP50")
    per_class = {name: {key: _number(row[key]) for key in keys} for name, row in content["per_class"].items()}
    session = _last_session(path.parent) if path.parent.name == "evaluation" else {}
    return Evaluation(path.parent, figures, per_class, [], session, path.stat().st_mtime)


def _parse_bird_evaluation(path: Path) -> Evaluation:
    figures = {key: _number(value) for key, value in json.loads(path.read_text()).items()}
    keys = {"images", "top1", "top5", "mean_class_accuracy", "calibration_error", "loss"}
    if missing := keys - set(figures):
        raise ValueError(f"has no {', '.join(sorted(missing))}")
    pairs = pd.read_csv(path.with_name("confused_pairs.csv"), dtype=str, keep_default_na=False)
    pairs = pairs[["true", "predicted", "images"]].to_dict("records")
    return Evaluation(path.parent, figures, {}, pairs, _last_session(path.parent), path.stat().st_mtime)


def _parse_comparison(path: Path) -> Comparison:
    content = json.loads(path.read_text())
    photographs = []
    for photograph in content["photographs"]:
        agreements: dict[str, int] = {}
        for pair in photograph["objects"]:
            agreements[pair["agreement"]] = agreements.get(pair["agreement"], 0) + 1
        picture = photograph.get("picture")
        photographs.append(
            Photograph(
                Path(photograph["file_name"]).name,
                path.parent / "pictures" / Path(picture).name if picture else None,
                agreements,
                {name: float(value) for name, value in photograph["milliseconds"].items()},
            )
        )
    return Comparison(
        path.parent,
        {name: str(weights) for name, weights in content["weights"].items()},
        content["split"],
        float(content["score"]),
        str(content["machine"]),
        photographs,
        path.stat().st_mtime,
    )


def _parse_errors(path: Path) -> Errors:
    content = json.loads(path.read_text())
    analyses = {name: analysis for name, analysis in content.items() if name not in ("split", "photographs")}
    for name, analysis in analyses.items():
        analyses[name] = {
            "ap50": _number(analysis["ap50"]),
            "count": {kind: int(count) for kind, count in analysis["count"].items()},
            "cost": {kind: _number(analysis["cost"][kind]) for kind in analysis["count"]},
        }
    return Errors(path.parent, str(content["split"]), int(content["photographs"]), analyses, path.stat().st_mtime)


def _parse_proposals(path: Path) -> Proposals:
    pictures = [path.parent / Path(record["picture"]).name for record in json.loads(path.read_text())]
    table = path.with_name("recall.csv")
    recall = {}
    if table.exists():
        recall = {int(row["proposals"]): float(row["recall"]) for row in pd.read_csv(table).to_dict("records")}
    return Proposals(path.parent, pictures, recall, path.stat().st_mtime)
