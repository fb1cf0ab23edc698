"""Every experiment of the study on real data, and the report of them: `make study`.

The stages run one after the other, each a command line of this project, into one folder; what a stage printed is in its
`logs/`. A stage that fails is named, and the others go on. Called again, finished stages are left alone, and the one
that was interrupted goes on from its last checkpoint. `tools.demo` is the same list on drawn data.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path

from tqdm import tqdm

from common.data_root import OFFICIAL
from common.errors import UserError, exits_on_user_error
from common.images import find_images
from common.processes import ENDS_WITH_PARENT
from common.run_folder import METRICS, read_metrics, write_atomically
from common.sample import sample_seed
from detection.config import leaf_name

NEEDED = ("CUB_200_2011", "VOC2007", "VOC2012")
FINISHED = "stages.json"
LOSSES = ("total_loss", "train_loss")  # as metrics.json calls them, of a detector and of a classifier


@dataclass(frozen=True)
class Stage:
    """One command line.

    Attributes:
        name: what the progress display calls it.
        arguments: of `python -m`.
        seconds: what it took on the drawn data, on two cores: its share of the progress bar.
        run: the folder that shows that it has begun; it is then called with `--resume`.
    """

    name: str
    arguments: list[str]
    seconds: int
    run: Path | None = None


def plan(
    output: Path,
    data: Path,
    recipe: str,
    bird: list[str],
    *,
    pair: Sequence[str] = (),
    grid: Sequence[str] = (),
    outside: Sequence[Path] = (),
    score: str = "0.5",
) -> list[Stage]:
    """The stages of the study in their order.

    Args:
        output: folder of all runs.
        data: root of the data.
        recipe: of the detectors.
        bird: recipe of the classifiers, and KEY=VALUE over it.
        pair: more of these for the runs from pretrained and from random weights.
        grid: options of the sweep.
        outside: photographs on which the detectors are compared; none leaves that out.
        score: detections drawn beside the proposals have at least this one.
    """
    runs, kind = ["--output", str(output)], [] if sample_seed(data) is None else ["sample"]
    birds = output / "-".join([*dict.fromkeys(["resnet18", bird[0], *kind]), "pretraining"])
    bird = [*bird, f"data={data}"]
    detect = ["tools.launch", "detection.train_net", "--data", str(data), "--recipe", recipe, *runs, "--model"]
    frcnn, yolov3 = (output / "-".join([leaf_name(model, recipe), *kind]) for model in ("faster_rcnn", "yolov3"))
    compare = ["tools.compare_detectors", "--recipe", recipe, *runs]
    evaluate = ["classification.evaluate", str(birds / "pretrained" / "model_best.pth"), "--data", str(data)]
    proposals = ["tools.visualize_proposals", "--recipe", recipe, "--score", score, *runs]
    photographs = [*compare, *map(str, outside)]
    return [
        Stage("sweep of rates and epochs", ["classification.sweep", "grid", *bird, *grid, *runs], 115),
        Stage("pretrained against random", ["classification.sweep", "pretraining", *bird, *pair, *runs], 110),
        Stage("evaluating the classifier", evaluate, 12),
        Stage("training Faster R-CNN", [*detect, "faster_rcnn"], 190, frcnn),
        Stage("evaluating Faster R-CNN", [*detect, "faster_rcnn", "--eval-only"], 15),
        Stage("proposals", proposals, 20),
        Stage("training YOLOv3", [*detect, "yolov3"], 165, yolov3),
        Stage("evaluating YOLOv3", [*detect, "yolov3", "--eval-only"], 12),
        *([Stage("both detectors on photographs from outside", photographs, 12)] if outside else []),
        Stage("their errors on the test split", compare, 25),
    ]


def latest_loss(output: Path, since: float) -> str:
    """The last loss that a training has written since a time in seconds, such as "total_loss 0.844"; "" for none."""
    written = [(path.stat().st_mtime, path.parent) for path in output.rglob(METRICS)]
    rows = read_metrics(max(written)[1]) if written and max(written)[0] >= since else []
    losses = [f"{key} {row[key]:.3f}" for row in rows for key in LOSSES if key in row]
    return losses[-1] if losses else ""


def run_stage(stage: Stage, output: Path, bar: tqdm) -> float:
    """Runs one stage to its end; moves the bar and shows the loss meanwhile.

    Returns:
        The seconds it took.

    Raises:
        UserError: it failed; the message ends with the last line of its log.
    """
    log = output / "logs" / f"{stage.name.replace(' ', '-')}.txt"
    command = [sys.executable, "-m", *stage.arguments]
    if stage.run is not None and stage.run.exists():
        command.append("--resume")
    start, began, shown = time.perf_counter(), time.time(), 0.0
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **ENDS_WITH_PARENT)
        while process.poll() is None:
            time.sleep(0.2)
            if not bar.disable:
                bar.set_description_str(f"{stage.name} {latest_loss(output, began)}")
            progress = min(time.perf_counter() - start, stage.seconds) - shown
            shown += progress
            bar.update(progress)
    bar.update(stage.seconds - shown)
    if process.returncode:
        raise UserError(f"{log}: {stage.name} failed: {_last_line(log)}")
    return time.perf_counter() - start


def run_stages(stages: Sequence[Stage], output: Path, target: str, times: str = "{elapsed}") -> None:
    """Runs what is not finished yet, and the report of all there is.

    Args:
        stages: in their order.
        output: folder of all runs.
        target: of make, that runs these stages again.
        times: what the bar says of time, in tqdm's words; `{remaining}` is right where the stages take their seconds.

    Raises:
        UserError: stages failed; each has been named, and the others have run.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    finished, failed = finished_stages(output), []
    bar_format = f"{{percentage:3.0f}}% |{{bar}}| {times}: {{desc}}"
    with tqdm(total=sum(stage.seconds for stage in stages), bar_format=bar_format, disable=None) as bar:
        for number, stage in enumerate(stages, start=1):
            if finished.get(stage.name) == stage.arguments:
                bar.update(stage.seconds)
                continue
            bar.set_description_str(stage.name)
            try:
                words = f"{stage.name}: {run_stage(stage, output, bar):.0f} s"
                finished[stage.name] = stage.arguments
                write_atomically(output / FINISHED, methodcaller("write", json.dumps(finished, indent=1).encode()))
            except UserError as error:
                failed.append(stage.name)
                words = str(error)
            bar.write(f"[{number:2d}/{len(stages)}] {words}", file=sys.stdout)
    report = ["-m", "tools.report", "--runs", str(output), "--out", str(output / "report"), "--pdf"]
    if code := subprocess.run([sys.executable, *report], check=False).returncode:
        sys.exit(code)
    if failed:
        raise UserError(
            f"{output / 'logs'}: {len(failed)} of {len(stages)} stages failed: {', '.join(failed)}; mend what they say "
            f"and call `make {target}` again"
        )


def finished_stages(output: Path) -> dict[str, list[str]]:
    """The stages that have come to their end, each with its arguments then."""
    path = output / FINISHED
    return json.loads(path.read_text()) if path.exists() else {}


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1].removeprefix("error: ")


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study, or prints what it would run.

    Args:
        argv: the command line without the program's name; None takes that of the process.
    """
    parser = argparse.ArgumentParser(prog="tools.study", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="photographs from outside, to compare the detectors on")
    parser.add_argument("--data", type=Path, default=OFFICIAL, help=f"folder that holds {', '.join(NEEDED)}")
    parser.add_argument("--recipe", choices=["study", "best"], default="study")
    parser.add_argument("--output", type=Path, default=Path("output/study"), help="folder of the study's runs")
    parser.add_argument("--plan", action="store_true", help="print the stages, and end")
    args = parser.parse_args(argv)

    if missing := [name for name in NEEDED if not (args.data / name).is_dir()]:
        raise UserError(
            f"{args.data}: no {', no '.join(missing)} in it; expected {', '.join(NEEDED)}: make datasets fetches them, "
            "DATA=path names another root, and make demo runs on drawn data"
        )
    outside = find_images(args.images)
    stages = plan(args.output, args.data, args.recipe, [args.recipe], outside=outside)
    alexnet = ["study", "model=alexnet", f"data={args.data}", "--name", "alexnet", "--output", str(args.output)]
    stages.append(Stage("AlexNet", ["tools.launch", "classification.train", *alexnet], 60, args.output / "alexnet"))
    finished = finished_stages(args.output)
    for number, stage in enumerate(stages, start=1):
        is_finished, has_begun = finished.get(stage.name) == stage.arguments, stage.run and stage.run.exists()
        state = "finished" if is_finished else "to go on" if has_begun else "to do"
        print(f"[{number:2d}/{len(stages)}] {stage.name}: {state}\n        python -m {' '.join(stage.arguments)}")
    if not outside:
        print('Without photographs the detectors are not compared outside the test split: IMAGES="a.jpg b.jpg c.jpg"')
    if not args.plan:
        run_stages(stages, args.output, "study")


if __name__ == "__main__":
    main()
