"""Finds every run and sweep below a folder and reads what they wrote.

A file that is not what it should be becomes one line of `Runs.problems`; it never stops the report.
"""

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import yaml

from common.errors import UserError
from common.run_folder import ENVIRONMENT, METRICS, read_metrics, read_sessions
from detection.config import NAMES as DETECTORS
from tools.report.document import NONE, mean, spread

GROUPS = ("MODEL", "DATASETS", "SOLVER")  # of settings, in a detector's config.yaml

T = TypeVar("T")


class Evaluation(NamedTuple):
    """Of a detector: its folder, its session if it has its own, and its figures, one class a row and "mAP" the last."""

    path: Path
    session: dict
    table: pd.DataFrame


class Run:
    """One training run: what its files hold, empty where they are missing or broken.

    Attributes:
        network: such as "resnet18" or "YOLOv3".
        rows: `metrics.json`, numbers only.
        sessions: `environment.json`.
        result: `result.json` of a classifier.
        evaluation: of a detector; the last one while training where there is no other.
        written: time of the last step, in seconds.
        start: the weights that it started from.
        settings, seed, length: what it was trained with, and how far it has come if it is not at its end.
        twins: this and the other finished runs that differ from it in their seed alone, in the order of the seeds.
    """

    def __init__(self, folder: Path, config: dict, network: str, attempt: Callable) -> None:
        self.path, self.config, self.network = folder, config, network
        self.rows = attempt(_read_rows, folder / METRICS) or []
        self.sessions = attempt(lambda path: read_sessions(path.parent), folder / ENVIRONMENT) or []
        self.result = attempt(_read_result, folder / "result.json") or {}
        evaluations = [folder / name for name in ("evaluation/evaluation.json", "evaluation.json")]
        self.evaluation = next(filter(None, (attempt(_read_evaluation, path) for path in evaluations)), None)
        self.is_detector = network in DETECTORS.values()
        self.is_finished = bool((self.sessions or [{}])[-1].get("finished") if self.is_detector else self.result)
        last_step = folder / METRICS
        self.written = (last_step if last_step.exists() else folder / "config.yaml").stat().st_mtime
        solver, last = config.get("SOLVER", {}), self.rows[-1] if self.rows else {}
        if self.is_detector:
            self.start = str(config["MODEL"].get("WEIGHTS") or "random")
            self.settings = f"rate {solver.get('BASE_LR')}, batch {solver.get('IMS_PER_BATCH')}"
            done, total, unit = int(last.get("iteration", -1)) + 1, solver.get("MAX_ITER"), "iterations"
        else:
            self.start = str(config.get("weights") or "ImageNet") if config.get("pretrained") else "random"
            self.settings = f"rate {config.get('lr')}, batch {config.get('batch_size')}, {config.get('image_size')} px"
            done, total, unit = int(last.get("epoch", 0)), config.get("epochs"), "epochs"
        self.seed = str(config.get("SEED" if self.is_detector else "seed", NONE))
        self.length = f"{total} {unit}" if done == total else f"{done} of {total} {unit}"
        self.twins = [self]

    @property
    def kind(self) -> str:
        """Everything it was trained with but the seed, which is also removed from the names of runs it started from."""
        settings = {key: value for key, value in self.config.items() if key.lower() != "seed"}
        return re.sub(r"-seed\d+\b", "", json.dumps([settings, self.data()], sort_keys=True, default=str))

    @property
    def seeds(self) -> str:
        """Of its twins."""
        return ", ".join(twin.seed for twin in self.twins)

    def measured(self, key: str) -> Any:
        """A figure of a classifier's result: a `Spread` where it has twins."""
        return spread([twin.result[key] for twin in self.twins if twin.result])

    @property
    def tested_on(self) -> str:
        """The splits and the data of a detector's evaluation."""
        session = (self.evaluation.session if self.evaluation else {}) or (self.sessions or [{}])[-1]
        splits = session.get("test") or self.config.get("DATASETS", {}).get("TEST") or []
        return f"{', '.join(map(str, splits))} of {self.data(session)}"

    @property
    def comparable(self) -> list["Run"]:
        """Of a detector and its twins those that were evaluated on the same data as it."""
        return [twin for twin in self.twins if twin.evaluation and twin.tested_on == self.tested_on]

    @property
    def by_class(self) -> pd.DataFrame:
        """The table of a detector's evaluation; of several comparable ones spreads, and the mean of `dets`."""
        tables = [twin.evaluation.table for twin in self.comparable if twin.evaluation]

        def cell(row: Any, column: Any) -> Any:
            values = [table.at[row, column] for table in tables]
            if column == "dets" and values[0] != "":
                return round(statistics.mean(values))
            return values[0] if column == "gts" or values[0] == "" else spread(values)

        first = tables[0]
        return pd.DataFrame({column: [cell(row, column) for row in first.index] for column in first},
                            index=first.index, dtype=object)  # fmt: skip

    def data(self, session: dict | None = None) -> str:
        """What its data was in a session, its last if none is given: the drawn sample and its seed, or the folder."""
        session = session or (self.sessions or [{}])[-1]
        if session.get("sample_seed") is not None:
            return f"drawn sample, seed {session['sample_seed']}"
        data = session.get("data") or self.config.get("data") or self.config.get("DATASETS", {}).get("ROOT")
        return str(data or "not recorded")

    def points(self, key: str) -> list[tuple[float, float]]:
        """A figure by epoch."""
        return [(row["epoch"], row[key]) for row in self.rows if key in row and "epoch" in row]

    def is_source_of(self, other: "Run") -> bool:
        """Whether another run started from its weights; known by the names alone, since folders move."""
        start = Path(other.start)
        return bool(start.suffix) and start.parent.name == self.path.name and not other.is_detector


class Runs:
    """All runs and sweeps below a folder, the newest first; what is still going only after what came to an end.

    Attributes:
        single: the runs that are of no sweep.
        sweeps: the runs of each sweep.
        grid, pair: of the newest sweep over rates and epochs, and of that from pretrained and random weights; of those
            that came to an end if there is one.
        problems: what could not be read.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            expected = "expected the folder of all runs: run make demo, or give RUNS=folder"
            raise UserError(f"{root}: no such folder; {expected}")
        self.root = root
        self.problems: set[str] = set()
        folders = {root, *(path for path in root.rglob("*") if path.is_dir())}
        closed = {folder for folder in folders if not os.access(folder, os.R_OK | os.X_OK)}
        self.problems |= {f"{folder}: may not be read; left out" for folder in closed}
        self.folders = sorted(folders - closed)
        runs = {folder: run for folder in self.folders if (run := self._read_run(folder))}
        sweeps: dict[Path, list[Run]] = {}
        for folder in self.folders:
            is_trial = re.match("lr|pretrained$|random$", folder.name) and (folder / "config.yaml").exists()
            if is_trial and (folder.parent / "config.yaml").exists():
                trials = sweeps.setdefault(folder.parent, [])
                trials += [runs.pop(folder)] if folder in runs else []
        find_twins(runs.values(), lambda run: run.kind)
        find_twins(chain(*sweeps.values()), lambda trial: trial.path.name + trial.kind)
        newest = sorted(
            filter(None, sweeps.values()),
            key=lambda trials: (not _has_ended(trials), -max(trial.written for trial in trials)),
        )
        grids = [trials for trials in newest if trials[0].path.name.startswith("lr")]
        pairs = [trials for trials in newest if trials not in grids]
        self.sweeps = grids + pairs
        self.grid, self.pair = ([trial.twins[0] for trial in next(iter(sweeps), [])] for sweeps in (grids, pairs))
        self.single = [run for run in runs.values() if run.path not in sweeps]
        self.single.sort(key=lambda run: (not run.is_finished, -run.written))

    @cached_property
    def different(self) -> list[Run]:
        """The runs that are of no sweep and no mere source of weights; of twins the one of the lowest seed."""
        others = self.single + [trial for sweep in self.sweeps for trial in sweep]
        shown = [run for run in self.single if not any(map(run.is_source_of, others))]
        return list({run.kind: run.twins[0] for run in reversed(shown)}.values())[::-1]

    @cached_property
    def birds(self) -> Run | None:
        """The classifier to show: fine-tuned, else the best of the sweeps; one that has an evaluation comes first."""
        trials = dict.fromkeys(trial.twins[0] for sweep in self.sweeps for trial in sweep)
        runs = [run for run in self.different if not run.is_detector] + finished([*trials])
        return min(runs, key=lambda run: not self.files("report.json", run), default=None)

    @cached_property
    def detectors(self) -> list[Run]:
        """The newest run of each, or rather its twin of the lowest seed; one that was evaluated comes first."""
        runs = sorted(self.single, key=lambda run: not (run.evaluation and run.evaluation.session))
        newest_of = {run.network: run.twins[0] for run in reversed(runs)}
        return [newest_of[name] for name in dict.fromkeys(DETECTORS.values()) if name in newest_of]

    @property
    def evaluated(self) -> list[tuple[Run, Evaluation]]:
        """Which of the detectors have an evaluation, each with it."""
        return [(run, run.evaluation) for run in self.detectors if run.evaluation]

    def _read_run(self, folder: Path) -> Run | None:
        """The run in a folder, if there is one."""
        config = self.attempt(_read_config, folder / "config.yaml")
        if not any(folder.iterdir()):
            self.problems.add(f"{folder}: an empty folder")
        elif config is not None:
            network = DETECTORS.get(str(config.get("MODEL", {}).get("META_ARCHITECTURE")), config.get("model"))
            if isinstance(network, str):
                return Run(folder, config, network, self.attempt)
            self.problems.add(f"{folder / 'config.yaml'}: names no network that is known here; left out")
        elif (folder / METRICS).exists() and not (folder / "config.yaml").exists():
            self.problems.add(f"{folder}: has {METRICS} but no config.yaml, so it cannot be told what ran")
        return None

    def title(self, run: Run) -> str:
        """The name of a run; of several that differ in their seed alone it is without that."""
        name = self.name(run.path)
        return re.sub(r"-seed\d+\b", "", name) if len(run.twins) > 1 else name

    def name(self, path: Path | str) -> str:
        """A folder or file as the report calls it: as seen from that of all runs if it is in there."""
        path = Path(path)
        return path.relative_to(self.root).as_posix() if self.root in path.parents else str(path)

    def attempt(self, read: Callable[[Path], T], path: Path) -> T | None:
        """What `read` makes of a file; None if it is missing, or broken, which is then a problem."""
        try:
            return read(path) if path.exists() else None
        except UserError as error:
            self.problems.add(str(error))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:160]
            self.problems.add(f"{path}: not what was expected ({type(error).__name__}: {reason}); left out")
        return None

    def newest(self, name: str, read: Callable[[Path], list[T]], run: Run | None = None) -> list[T]:
        """What `read` makes of the newest file of that name, of a run if one is given, that has anything to give."""
        contents = (self.attempt(read, path) for path in self.files(name, run))
        return next(filter(None, contents), [])

    def files(self, name: str, run: Run | None = None) -> list[Path]:
        """The files of that name, the newest first; of a run those in its folder, and those that name its weights."""

        def is_of_run(folder: Path) -> bool:
            sessions = self.attempt(lambda path: read_sessions(path.parent), folder / ENVIRONMENT) or [{}]
            weights = sessions[-1].get("weights")
            return run is None or run.path in folder.parents or Path(str(weights)).parent == run.path

        paths = [folder / name for folder in self.folders if (folder / name).exists() and is_of_run(folder)]
        return sorted(paths, key=lambda path: -path.stat().st_mtime)


def _has_ended(trials: Sequence[Run]) -> bool:
    """Whether a sweep has written its table, as it does where a trial of a grid has failed too."""
    return any((trials[0].path.parent / name).exists() for name in ("sweep.csv", "comparison.csv"))


def find_twins(runs: Iterable[Run], key: Callable[[Run], str]) -> None:
    """Makes finished runs with one key each other's twins; of several with one seed, the newest is the others' twin."""
    every = sorted(runs, key=lambda run: run.written)
    newest: dict[str, dict[str, Run]] = {}
    for run in filter(lambda run: run.is_finished, every):
        newest.setdefault(key(run), {})[run.seed] = run
    for run in every:
        by_seed = {**(newest[key(run)] if run.is_finished else {}), run.seed: run}
        run.twins = [by_seed[seed] for seed in sorted(by_seed, key=lambda seed: (len(seed), seed))]


def of_seeds(runs: Sequence[Run]) -> str:
    """The note to figures over several twin runs; empty for a single run."""
    if len(runs) == 1:
        return ""
    seeds = ", ".join(run.seed for run in runs)
    return f" Mean ± standard deviation over {len(runs)} runs that differ in their seed alone ({seeds})."


def finished(trials: Sequence[Run]) -> list[Run]:
    """Those at their end, the best first; of equals the one that costs least, as in `sweep.csv`."""

    def rank(trial: Run) -> tuple[float, int, float]:
        # By the validation figure; the test figure of a recipe that holds images out must not choose.
        return -mean(trial.measured("validation_top1")), trial.result["epochs"], trial.result["lr"]

    return sorted((trial for trial in trials if trial.result), key=rank)


def _read_config(path: Path) -> dict:
    config = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    groups = [config.get(key, {}) for key in GROUPS] if isinstance(config, dict) else [config]
    if not all(isinstance(group, dict) for group in groups):
        raise ValueError("expected settings by name")
    return config


def _read_rows(path: Path) -> list[dict[str, float]]:
    rows = read_metrics(path.parent)
    numbers = [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows]
    if not all(math.isfinite(row["iteration"]) and math.isfinite(row.get("epoch", 0)) for row in numbers):
        raise ValueError("an iteration or epoch is no number")
    return numbers


def _read_result(path: Path) -> dict:
    result = json.loads(path.read_text())
    numbers = ("top1", "top5", "validation_top1", "validation_top5", "lr", "epochs", "epoch", "seed")
    words = ("chosen", "validated_on")
    return {**result, **{key: result[key] + 0 for key in numbers}, **{key: str(result[key]) for key in words}}


def _read_evaluation(path: Path) -> Evaluation:
    content = json.loads(path.read_text())
    types = {"gts": int, "dets": int, "recall": float, "AP50_11point": float, "AP50": float}
    table = pd.DataFrame.from_dict(content["per_class"], orient="index")[list(types)].astype(types).astype(object)
    table.loc["mAP"] = ["", "", "", *pd.Series([content["AP50_11point"], content["AP50"]], dtype=float)]
    sessions = read_sessions(path.parent) if path.parent.name == "evaluation" else []
    return Evaluation(path.parent, sessions[-1] if sessions else {}, table)
