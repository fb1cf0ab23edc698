"""The run folder of both halves: one layout, `output/<name>/`, whichever network was trained.

    config.yaml        the whole configuration of the run
    log.txt            what was printed
    environment.json   one object a session: versions, machine, command, data, start, seconds, end
    metrics.json       one JSON object a line, one line a step of the log; the only source of the files below
    results.csv        the same as a table, one row an iteration
    results.png        losses, accuracies or APs, and learning rate
    result.json        of a classifier, its figures on the test split and how the epoch was chosen
    results_per_class.png  of a detector, the AP of each class at every evaluation
    model_best.pth     the weights with the best validation figure, or those of the last epoch where a recipe says so
    evaluation.json    of a detector, what those weights reach; also .csv and .md; detections.json, confusion.csv,
                       f1_curves.csv, and pictures: pr_curves.png, f1_curves.png, confusion.png
    model_last.pth     the newest complete checkpoint, from which a run resumes
    events.out.*       TensorBoard

Every file that a later step depends on is written aside and renamed, so a run killed at any moment leaves whole files.
"""

import datetime
import json
import logging
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from common.errors import UserError, first_line
from common.files import append_line, write_figure, write_json, write_table, write_text
from common.processes import is_main_process, world_size
from common.runtime import gpu_count

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
ENVIRONMENT = "environment.json"


def create_run_folder(root: Path, name: str) -> Path:
    """Makes `root/name`, or the next free of `root/name-2`, `root/name-3`, ...: runs never share a folder.

    Args:
        root: folder of all runs, usually `output`.
        name: name of the run, without a number.
    """
    root.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        run = root / (name if number == 1 else f"{name}-{number}")
        try:
            run.mkdir()
            return run
        except FileExistsError:
            number += 1


def refuse_taken_name(root: Path, name: str) -> None:
    """Refuses a name that the user gives a new run, where the run could not have it.

    Raises:
        UserError: it is a path, or there is a run of that name.
    """
    if Path(name).name != name:
        raise UserError(f"RUN={name}: expected the name of a folder in {root}, not a path")
    if (root / name).exists():
        raise UserError(f"{root / name}: is there already; RESUME=1 goes on in it, or name another one with RUN=")


def run_to_resume(root: Path, names: Iterable[str], name: str | None = None) -> Path:
    """The run folder to go on in.

    Args:
        root: folder of all runs.
        names: names that the run may have, without a number; of several folders, the last one trained in is taken.
        name: exact name of the folder, if the user gives one.

    Raises:
        UserError: there is none.
    """
    names = [name] if name else list(names)
    runs = [run for each in names for run in find_run_folders(root, each) if name in (None, run.name)]
    if not runs:
        raise UserError(
            f"{root / names[0]}: no run to resume; expected a folder of that name: start one without RESUME=1"
        )
    # An evaluation also changes the folder's time, but never writes to its metrics.
    return max(runs, key=lambda run: next(path for path in (run / METRICS, run) if path.exists()).stat().st_mtime)


def find_run_folders(root: Path, name: str) -> list[Path]:
    """All folders `create_run_folder` made for `name`, in the order of their numbers."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    paths = root.iterdir() if root.is_dir() else ()
    found = [(int(match[1] or 1), path) for path in paths if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_weights(runs: Iterable[Path]) -> Path | None:
    """`model_best.pth` of the run that wrote one last; None if none has."""
    found = [run / "model_best.pth" for run in runs if (run / "model_best.pth").exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@contextmanager
def record_session(folder: Path, **facts: object) -> Iterator[None]:
    """Adds to `environment.json` where and how the block ran: versions, machine, command, start and seconds.

    Every resumption of a run is a session of its own. One that was killed keeps null for its seconds; `finished` tells
    whether the block came to its end. Of several processes the first alone writes.

    Args:
        folder: an existing folder of a run or of an evaluation.
        facts: what else the session is to be remembered by, such as its data; JSON types only.
    """
    if not is_main_process():
        yield
        return
    path = folder / ENVIRONMENT
    session = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seconds": None,
        "finished": False,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "processes": world_size(),
        "machine": machine(),
        "versions": _versions(),
        **facts,
    }
    sessions = [*read_sessions(folder), session]
    write_json(path, sessions)
    start = time.perf_counter()
    try:
        yield
        session["finished"] = True
    finally:
        session["seconds"] = round(time.perf_counter() - start, 1)
        write_json(path, sessions)


def read_sessions(folder: Path) -> list[dict]:
    """The sessions that `record_session` kept, oldest first.

    Raises:
        UserError: the file is not a list of JSON objects.
    """
    path = folder / ENVIRONMENT
    if not path.exists():
        return []
    try:
        return [dict(session) for session in json.loads(path.read_text())]
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a JSON list of sessions: delete the file") from None


def machine() -> str:
    """What a session ran on, such as "AMD EPYC 9654, 2 cores, 16 GB, NVIDIA H200"."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found[1] if found else processor
    gpus = [torch.cuda.get_device_name(number) for number in range(gpu_count())]
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GB"
    return ", ".join([processor, f"{os.cpu_count()} cores", memory, *gpus])


def _versions() -> dict[str, str]:
    loaded = {name: sys.modules.get(name) for name in ("torch", "torchvision", "timm", "detectron2")}
    versions = {name: module.__version__ for name, module in loaded.items() if module is not None}
    return {"python": platform.python_version(), **versions}


def append_metrics(run: Path, row: dict) -> None:
    """Appends one row to `metrics.json` and waits until it is on disk."""
    append_line(run / METRICS, json.dumps(row))


def read_metrics(run: Path) -> list[dict]:
    """Rows of `metrics.json` in the order written; a last line that a kill cut short is left out.

    Raises:
        UserError: a line other than the last is not a JSON object.
    """
    path = run / METRICS
    if not path.exists():
        return []
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}: line {number} is {line[:40]!r}, expected a JSON object: delete the line or the file"
            ) from None
    return rows


def truncate_metrics(run: Path, iteration: int) -> None:
    """Keeps the rows before `iteration`: what was written after the checkpoint a run resumes from will come again.

    What a kill left half written goes too.
    """
    for unfinished in run.glob(".*.unfinished"):
        unfinished.unlink(missing_ok=True)
    rows = [row for row in read_metrics(run) if row["iteration"] < iteration]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(run / METRICS, text)


def write_results(run: Path) -> None:
    """Writes `results.csv` and `results.png` from `metrics.json`; without rows it does nothing."""
    import pandas as pd  # here, since pandas and matplotlib cost a second that most command lines do not need

    rows = read_metrics(run)
    if not rows:
        return
    # Rows of one iteration (losses and, later, the evaluation) become one line of the table.
    table = pd.DataFrame(rows).groupby("iteration", as_index=False).last()
    write_table(run / "results.csv", table, index=False, float_format="%.6g")
    with failures_as_warnings(run / "results.png"):
        write_figure(run / "results.png", _plot(table, run.name))


@contextmanager
def failures_as_warnings(picture: Path) -> Iterator[None]:
    """Logs what is raised while a picture is drawn, so that training goes on; a full disk still ends it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        logger.warning("%s: not drawn (%s); the figures are in the tables beside it", picture, first_line(error))


def _plot(table: "pd.DataFrame", title: str) -> "Figure":
    from matplotlib.figure import Figure

    columns = [str(key) for key in table if not str(key).startswith("per_class")]  # too many for a panel
    panels = {
        "loss": [key for key in columns if "loss" in key],
        "accuracy": [key for key in columns if key.startswith("AP") or "top1" in key or "top5" in key],
        "learning rate": [key for key in columns if key == "lr"],
    }
    panels = {name: keys for name, keys in panels.items() if keys}
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    figure.suptitle(title, parse_math=False)
    for axes, (name, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key in keys:
            points = table[["iteration", key]].dropna()
            # A quantity measured seldom is drawn with its points, or a single evaluation would be invisible.
            axes.plot(points["iteration"], points[key], marker="o" if len(points) < 30 else "", markersize=3, label=key)
        axes.set(xlabel="iteration", title="average precision" if any(key.startswith("AP") for key in keys) else name)
        axes.grid(alpha=0.3)
        if name == "accuracy":
            axes.set_ylim(0, None)
        if len(keys) > 1:
            axes.legend(fontsize=7)
    return figure
