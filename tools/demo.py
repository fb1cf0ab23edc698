"""Every experiment of the study on drawn data, and the report of them: `make demo`, without network or GPU.

The stages run one after the other, each a command line of this project, into `output/demo`; what a stage printed is in
`output/demo/logs`. Called again after an interruption, finished stages are left alone and the one that was interrupted
goes on from its last checkpoint.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.data_root import SAMPLE
from common.errors import UserError, exits_on_user_error
from common.processes import ENDS_WITH_PARENT
from common.run_folder import METRICS, read_metrics, write_atomically
from common.sample import draw_sample

OTHER_SAMPLE = SAMPLE.with_name("sample-other")  # birds to learn from first, and photographs from outside
FINISHED = "demo.json"
# Where the F1 of the demo's Faster R-CNN on its test split is highest (0.93; at 0.5, with a fifth of them wrong, 0.87).
SCORE = "0.65"
LOSSES = ("total_loss", "train_loss")  # as metrics.json calls them, of a detector and of a classifier


@dataclass(frozen=True)
class Stage:
    """One command line.

    Attributes:
        name: what the progress display calls it.
        arguments: of `python -m`.
        seconds: what it took on two cores: its share of the progress bar.
        run: the folder that shows that it has begun; it is then called with `--resume`.
    """

    name: str
    arguments: list[str]
    seconds: int
    run: Path | None = None


def plan(output: Path) -> list[Stage]:
    """The stages of the demo in their order; both samples must have been drawn."""
    runs = ["--output", str(output)]
    frcnn, yolov3 = output / "faster_rcnn_R_50_FPN-sample", output / "yolov3_darknet53-sample"
    birds, first_birds = output / "resnet18-sample-pretraining", output / "resnet18-other-birds"
    # So short a run shows what the weights bring along only where the layers below the head may follow it.
    bird = ["sample", f"data={SAMPLE}", f"weights={first_birds / 'model_best.pth'}", "lr=0.2", "backbone_lr_scale=0.3"]
    detect = ["tools.launch", "detection.train_net", "--data", str(SAMPLE), *runs, "--model"]
    compare = ["tools.compare_detectors", *runs]
    outside = [str(path) for path in sorted((OTHER_SAMPLE / "VOC2007" / "JPEGImages").glob("*.jpg"))[:3]]
    pretraining = ["sample", f"data={OTHER_SAMPLE}", "pretrained=false", "epochs=8", "--name", first_birds.name]
    return [
        Stage(
            "ResNet-18 on other birds",
            ["tools.launch", "classification.train", *pretraining, *runs],
            105,
            first_birds,
        ),
        Stage(
            "pretrained against random",
            ["classification.sweep", "pretraining", *bird, "epochs=4", *runs],
            110,
        ),
        Stage(
            "sweep of rates and epochs",
            ["classification.sweep", "grid", *bird, "--lrs", "0.05 0.2", "--epochs", "1 3", *runs],
            115,
        ),
        Stage(
            "evaluating the classifier",
            ["classification.evaluate", str(birds / "pretrained" / "model_best.pth"), "--data", str(SAMPLE)],
            12,
        ),
        Stage("training Faster R-CNN", [*detect, "faster_rcnn"], 190, frcnn),
        Stage("evaluating Faster R-CNN", [*detect, "faster_rcnn", "--eval-only"], 15),
        Stage("proposals", ["tools.visualize_proposals", "--score", SCORE, *runs], 20),
        Stage("training YOLOv3", [*detect, "yolov3"], 165, yolov3),
        Stage("evaluating YOLOv3", [*detect, "yolov3", "--eval-only"], 12),
        Stage("both detectors on photographs from outside", [*compare, *outside], 12),
        Stage("their errors on the test split", compare, 25),
    ]


def latest_loss(output: Path, since: float) -> str:
    """The last loss that a training has written since a time in seconds, such as "total_loss 0.844"; "" for none."""
    written = [(path.stat().st_mtime, path.parent) for path in output.rglob(METRICS)]
    rows = read_metrics(max(written)[1]) if written and max(written)[0] >= since else []
    losses = [f"{key} {row[key]:.3f}" for row in rows for key in LOSSES if key in row]
    return losses[-1] if losses else ""


def run_stage(stage: Stage, log: Path, bar: tqdm) -> float:
    """Runs one stage to its end; moves the bar and shows the loss meanwhile.

    The folder of its log lies in that of all runs.

    Returns:
        The seconds it took.

    Raises:
        UserError: it failed; the message ends with the last line of its log.
    """
    command = [sys.executable, "-m", *stage.arguments]
    if stage.run is not None and stage.run.exists():
        command.append("--resume")
    start, began, shown = time.perf_counter(), time.time(), 0.0
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **ENDS_WITH_PARENT)
        while process.poll() is None:
            time.sleep(0.2)
            if not bar.disable:
                bar.set_description_str(f"{stage.name} {latest_loss(log.parent.parent, began)}", refresh=False)
            progress = min(time.perf_counter() - start, stage.seconds) - shown
            shown += progress
            bar.update(progress)
    bar.update(stage.seconds - shown)
    if process.returncode:
        raise UserError(f"{log}: {stage.name} failed: {_last_line(log)}; mend it and call `make demo` again")
    return time.perf_counter() - start


def summary(output: Path) -> str:
    """The figures of the finished demo, read from its files."""
    figures = {
        name: json.loads((output / run / "evaluation" / "evaluation.json").read_text())["AP50_11point"]
        for name, run in (
            ("Faster R-CNN", "faster_rcnn_R_50_FPN-sample"),
            ("YOLOv3", "yolov3_darknet53-sample"),
        )
    }
    top1 = {
        start: json.loads((output / "resnet18-sample-pretraining" / start / "result.json").read_text())["top1"]
        for start in ("pretrained", "random")
    }
    return "\n".join(
        [
            "On the drawn data, which says nothing about Pascal VOC or real birds:",
            *(f"  {name}: {figure:.3f} mAP (11 points)" for name, figure in figures.items()),
            *(f"  ResNet-18, {start}: {figure:.1f} % top-1" for start, figure in top1.items()),
            f"Look first at {output / 'report' / 'index.html'}: its second section tells which findings of the study",
            "were seen here. With real data: make datasets, then make train-frcnn, make train-yolov3, make finetune.",
        ]
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1].removeprefix("error: ")


@exits_on_user_error
def main() -> None:
    """Runs what is not finished yet, and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the demo's runs")
    output = parser.parse_args().output

    (output / "logs").mkdir(parents=True, exist_ok=True)
    draw_sample(SAMPLE, seed=0)
    draw_sample(OTHER_SAMPLE, seed=1)
    finished_file = output / FINISHED
    finished = json.loads(finished_file.read_text()) if finished_file.exists() else {}
    stages = plan(output)
    bar = tqdm(
        total=sum(stage.seconds for stage in stages),
        bar_format="{percentage:3.0f}% |{bar}| {elapsed}, {remaining} to go: {desc}",
        disable=None,
    )
    with bar:
        for number, stage in enumerate(stages, start=1):
            if finished.get(stage.name) == stage.arguments:
                bar.update(stage.seconds)
                continue
            bar.set_description_str(stage.name)
            seconds = run_stage(stage, output / "logs" / f"{stage.name.replace(' ', '-')}.txt", bar)
            finished[stage.name] = stage.arguments
            write_atomically(finished_file, lambda file: file.write(json.dumps(finished, indent=1).encode()))
            bar.write(f"[{number:2d}/{len(stages)}] {stage.name}: {seconds:.0f} s", file=sys.stdout)
    report = ["-m", "tools.report", "--runs", str(output), "--out", str(output / "report"), "--pdf"]
    if code := subprocess.run([sys.executable, *report], check=False).returncode:
        sys.exit(code)
    print(summary(output))


if __name__ == "__main__":
    main()
