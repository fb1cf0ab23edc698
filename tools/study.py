"""Every experiment of the study on real data, and the report of them: `make study`.

The stages of a list (`tools.plan`) run one after the other, each a command line of this project, into one folder; what
each printed is in its `logs/`. Before the first, the plan says what there is to do, how long it takes here and how much
disk it needs. A stage that fails is named, and all but those that need it go on. Called again, finished stages are left
alone, and the one that was interrupted goes on from its last checkpoint. `STUDY=file.yaml` is another list, and
`tools.demo` one on drawn data.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from classification.cub import FOLDER, is_folder_tree
from common.data_root import OFFICIAL
from common.errors import ArgumentParser, Interrupted, UserError, exits_on_user_error
from common.files import read_json, write_json
from common.images import find_images
from common.processes import ENDS_WITH_PARENT
from common.run_folder import METRICS, read_metrics
from common.runtime import visible_gpus
from detection.voc_lists import OFFICIAL_FOLDERS, is_voc_folder
from tools.plan import COMMANDS, Entry, Stage, estimate_key, list_stages, read_entries
from tools.report.document import duration

STUDIES = Path(__file__).parent / "studies"
STAGES, ESTIMATES = "stages.json", "estimates.json"
LOSSES = ("total_loss", "train_loss")  # as metrics.json calls them, of a detector and of a classifier
STARTING = 15  # seconds of a stage that are no step: libraries, data, tables and pictures


@dataclass(frozen=True)
class Running:
    """A stage that has been started."""

    stage: Stage
    process: subprocess.Popen
    log: Path
    gpu: str
    begun: float

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.time() - self.begun


def check_data(entries: Sequence[Entry], data: Path) -> None:
    """Checks that the data root has what a list of runs needs; a user's own folder is checked when it is read.

    Raises:
        UserError: something is missing.
    """
    halves = {COMMANDS[entry.command].is_of_birds for entry in entries if not entry.data}
    needed = [FOLDER] if True in halves and not is_folder_tree(data) else []
    if False in halves and not is_voc_folder(data):
        needed += OFFICIAL_FOLDERS.values()
    if missing := [name for name in needed if not (data / name).is_dir()]:
        raise UserError(
            f"{data}: no {', no '.join(missing)} in it; expected {', '.join(needed)}: make datasets fetches them, "
            "DATA=path names another root, and make demo runs on drawn data"
        )


def left_to_do(stages: Sequence[Stage], output: Path) -> list[Stage]:
    """The stages that have not finished with these arguments, whose run is gone, or that need one of these.

    Raises:
        UserError: a training has begun with other arguments, or from another that is to be trained again, so that going
            on would give another run than is asked for.
    """
    records, left = _read_json(output / STAGES), list[Stage]()
    for stage in stages:
        record = records.get(stage.name, {"arguments": stage.arguments, "is_finished": False})
        is_there = stage.run is None or stage.run.exists()
        if stage.run and is_there and record["arguments"] != stage.arguments:
            before, asked = (shlex.join(arguments) for arguments in (record["arguments"], stage.arguments))
            raise UserError(
                f"{stage.run}: was begun as {before}; asked for is {asked}: delete that folder, or give the run "
                "another name or the list another file"
            )
        renewed = sorted({other.name for other in left}.intersection(stage.needs))
        if renewed and stage.run and is_there:
            raise UserError(
                f"{stage.run}: began from {', '.join(renewed)}, which is unfinished or was deleted: delete this folder "
                "too, so that it begins anew"
            )
        is_done = record["is_finished"] and record["arguments"] == stage.arguments and is_there
        if renewed or not is_done:
            left.append(stage)
    return left


def read_plan(path: Path, output: Path, data: Path, **given: Any) -> list[Stage]:
    """The stages of a list of runs, with what they take on this machine; prints them all.

    A few steps of each training are timed, once: `output` keeps what was found.

    Args:
        path: the list, see `tools.plan`.
        output: folder of all runs.
        data: root of the data.
        given: what else `list_stages` takes.

    Raises:
        UserError: the list is malformed, data is missing, or a training has begun with other arguments.
        SystemExit: a training could not begin; which and why has been printed.
    """
    entries = read_entries(path)
    check_data(entries, data)
    stages = list_stages(entries, output, data, **given)
    first: dict[str, list[str]] = {}
    for stage in stages:
        if stage.run:
            first.setdefault(stage.entry, stage.arguments)
    known = _read_json(output / ESTIMATES)
    if any(estimate_key(arguments) not in known for arguments in first.values()):
        print("Timing a few steps of each training ...", flush=True)
        output.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-m", "tools.estimate", str(output / ESTIMATES), json.dumps(first)]
        if code := subprocess.run(command, check=False, **ENDS_WITH_PARENT).returncode:
            sys.exit(code)
        known = _read_json(output / ESTIMATES)
    estimates = {entry: known[estimate_key(arguments)] for entry, arguments in first.items()}
    entry_of = {stage.name: stage.entry for stage in stages}

    def seconds(stage: Stage) -> float:
        if stage.run:
            return STARTING + estimates[stage.entry]["seconds"]
        of = [estimates[entry_of[name]] for name in stage.needs]
        return STARTING + sum(min(stage.images or math.inf, e["test_images"]) * e["test_seconds"] for e in of)

    stages = [replace(stage, seconds=seconds(stage)) for stage in stages]
    left = left_to_do(stages, output)
    for number, stage in enumerate(stages, start=1):
        state = "finished" if stage not in left else "to go on" if stage.run and stage.run.exists() else "to do"
        print(f"[{number:2d}/{len(stages)}] {stage.name}: {state}, {duration(stage.seconds)}")
        print(f"        python -m {shlex.join(stage.arguments)}")
    size = sum(estimates[stage.entry]["size"] for stage in stages if stage.run)
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    seconds_left = sum(stage.seconds for stage in left)
    print(
        f"About {duration(seconds_left)} to go, and {size / 1e9:.1f} GB of disk for all runs, {free / 1e9:.1f} GB are "
        "free; from a few timed steps of each training."
    )
    if skipped := [entry.name for entry in entries if entry.name not in {stage.entry for stage in stages}]:
        print(f'Left out for want of photographs from outside: {", ".join(skipped)}; IMAGES="a.jpg b.jpg c.jpg"')
    return stages


def devices() -> list[str]:
    """The GPUs to hand out, one a stage; `[""]` where every stage sees all of them.

    They are handed out with `NGPU=1`, so that several seeds of one training run beside one another.
    """
    if os.environ.get("NGPU") != "1":
        return [""]
    return visible_gpus() or [""]


def latest_loss(output: Path, since: float) -> str:
    """The last loss that a training has written since a time in seconds, such as "total_loss 0.844"; "" for none."""
    written = [(path.stat().st_mtime, path.parent) for path in output.rglob(METRICS)]
    rows = read_metrics(max(written)[1]) if written and max(written)[0] >= since else []
    losses = [f"{key} {row[key]:.3f}" for row in rows for key in LOSSES if key in row]
    return losses[-1] if losses else ""


def start_stage(stage: Stage, output: Path, gpu: str = "") -> Running:
    """Starts a stage; a training that has begun goes on.

    Args:
        stage: the stage.
        output: folder of all runs, with `logs/` in it.
        gpu: the only one that it sees; "" for all.
    """
    _record(stage, output, is_finished=False)
    log = output / "logs" / f"{stage.name}.txt"
    command = [sys.executable, "-m", *stage.arguments]
    if stage.resumes and stage.run is not None and stage.run.exists():
        command.append("--resume")
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, **ENDS_WITH_PARENT)
    return Running(stage, process, log, gpu, time.time())


def run_together(stages: Sequence[Stage], output: Path, gpus: Sequence[str], bar: tqdm) -> Iterator[Running]:
    """Runs stages, as many at once as there are GPUs to share out; moves the bar and shows the loss meanwhile.

    Yields:
        Each as it ends.

    Raises:
        Interrupted: Ctrl-C, once all have saved what they have.
    """
    waiting, free, running = list(stages), list(gpus), list[Running]()
    began, ended = time.time(), float(bar.n)
    try:
        while waiting or running:
            while waiting and free:
                running.append(start_stage(waiting.pop(0), output, free.pop(0)))
            time.sleep(0.2)
            for work in [work for work in running if work.process.poll() is not None]:
                running.remove(work)
                if work.process.returncode == 130:
                    raise KeyboardInterrupt
                free.append(work.gpu)
                ended += work.stage.seconds
                yield work
            bar.n = ended + sum(min(work.seconds, work.stage.seconds) for work in running)
            if running and not bar.disable:
                names = ", ".join(work.stage.name for work in running)
                bar.set_description_str(f"{names} {latest_loss(output, began)}")
    except KeyboardInterrupt:  # the terminal has told all of them, and they save what they have
        for work in running:
            work.process.wait()
        raise Interrupted(f"the same command goes on in {output}") from None


def run_stages(stages: Sequence[Stage], output: Path, gpus: Sequence[str] = ("",)) -> None:
    """Runs what is not finished yet, and the report of all there is.

    Args:
        stages: in their order.
        output: folder of all runs.
        gpus: see `devices`.

    Raises:
        UserError: stages failed; each has been named, and all that do not need one of them have run.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    left, failed = left_to_do(stages, output), []
    total = sum(stage.seconds for stage in stages)
    done = total - sum(stage.seconds for stage in left)
    form = "{percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go: {desc}"
    with tqdm(total=total, initial=done, bar_format=form, disable=None) as bar:

        def say(stage: Stage, words: str) -> None:
            bar.write(f"[{stages.index(stage) + 1:2d}/{len(stages)}] {words}", file=sys.stdout)

        for _, group in groupby(left, key=lambda stage: stage.entry or stage.name):
            ready = []
            for stage in group:
                if missed := [name for name in stage.needs if name in failed]:
                    failed.append(stage.name)
                    say(stage, f"{stage.name} is left out, since it needs {', '.join(missed)}")
                    bar.update(stage.seconds)
                else:
                    ready.append(stage)
            for work in run_together(ready, output, gpus, bar):
                stage = work.stage
                if work.process.returncode:
                    failed.append(stage.name)
                    say(stage, f"{work.log}: {stage.name} failed: {_last_line(work.log)}")
                else:
                    _record(stage, output, is_finished=True)
                    say(stage, f"{stage.name}: {duration(work.seconds)}")
    report = ["-m", "tools.report", "--runs", str(output), "--out", str(output / "report"), "--pdf"]
    if code := subprocess.run([sys.executable, *report], check=False).returncode:
        sys.exit(code)
    if failed:
        raise UserError(
            f"{output / 'logs'}: {len(failed)} of {len(stages)} stages are missing: {', '.join(failed)}; mend what "
            "failed and give the same command again"
        )


def _record(stage: Stage, output: Path, is_finished: bool) -> None:
    records = _read_json(output / STAGES)
    records[stage.name] = {"arguments": stage.arguments, "is_finished": is_finished}
    write_json(output / STAGES, records)


def _read_json(path: Path) -> dict:
    return read_json(path, "an object of stages: delete it") if path.exists() else {}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1].removeprefix("error: ")


def _seeds(text: str) -> list[int]:
    words = text.split()
    if not words or not all(map(str.isdecimal, words)) or len({*words}) < len(words):
        raise UserError(f"SEEDS={text}: expected different whole numbers with blanks between them")
    return [int(word) for word in words]


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Says what there is to run, and runs it.

    Args:
        argv: the command line without the program's name; None takes that of the process.
    """
    parser = ArgumentParser(prog="tools.study", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="photographs from outside, to compare the detectors on")
    parser.add_argument("--study", type=Path, help="a list of runs of your own; default the experiments of the study")
    parser.add_argument("--data", type=Path, default=OFFICIAL, help="root of the data")
    parser.add_argument("--recipe", choices=["study", "best"], help="of trainings that name none")
    parser.add_argument("--start", help="of detectors that name none")
    parser.add_argument("--seeds", default="0", help="of trainings that name none")
    parser.add_argument("--output", type=Path, help="folder of all runs; default that of the list's name in output/")
    parser.add_argument("--plan", action="store_true", help="say what there is to run, and end")
    args = parser.parse_args(argv)

    path = args.study or STUDIES / "study.yaml"
    output = args.output or Path("output") / path.stem
    stages = read_plan(
        path,
        output,
        args.data,
        recipe=args.recipe,
        fallback=None if args.study else "study",
        start=args.start,
        seeds=_seeds(args.seeds),
        images=list(map(str, find_images(args.images))),
    )
    if not args.plan:
        run_stages(stages, output, devices())


if __name__ == "__main__":
    main()
