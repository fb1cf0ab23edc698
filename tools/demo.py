"""Every experiment of the study on drawn data, and the report of them: `make demo`, without network or GPU.

The stages of `tools.study`, shortened, into `output/demo`. Called again after an interruption, it goes on where it was.
"""

import argparse
import json
from pathlib import Path

from common.data_root import SAMPLE
from common.errors import exits_on_user_error
from common.sample import draw_sample
from tools import study
from tools.study import Stage, run_stages

OTHER_SAMPLE = SAMPLE.with_name("sample-other")  # birds to learn from first, and photographs from outside
# Where the F1 of the demo's Faster R-CNN on its test split is highest (0.93; at 0.5, with a fifth of them wrong, 0.87).
SCORE = "0.65"


def plan(output: Path) -> list[Stage]:
    """The stages of the demo in their order; both samples must have been drawn."""
    first_birds = output / "resnet18-other-birds"
    pretraining = ["sample", f"data={OTHER_SAMPLE}", "pretrained=false", "epochs=8", "--name", first_birds.name]
    train = ["tools.launch", "classification.train", *pretraining, "--output", str(output)]
    return [
        Stage("ResNet-18 on other birds", train, 105, first_birds),
        *study.plan(
            output,
            SAMPLE,
            "best",
            # So short a run shows what the weights bring along only where the layers below the head may follow it.
            ["sample", f"weights={first_birds / 'model_best.pth'}", "lr=0.2", "backbone_lr_scale=0.3"],
            pair=["epochs=4"],
            grid=["--lrs", "0.05 0.2", "--epochs", "1 3"],
            outside=sorted((OTHER_SAMPLE / "VOC2007" / "JPEGImages").glob("*.jpg"))[:3],
            score=SCORE,
        ),
    ]


def summary(output: Path) -> str:
    """The figures of the finished demo, read from its files, and where to go from there."""
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
            "were seen here. With real data: make datasets, then make study.",
        ]
    )


@exits_on_user_error
def main() -> None:
    """Runs what is not finished yet, and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the demo's runs")
    output = parser.parse_args().output

    draw_sample(SAMPLE, seed=0)
    draw_sample(OTHER_SAMPLE, seed=1)
    run_stages(plan(output), output, "demo", times="{elapsed}, {remaining} to go")
    print(summary(output))


if __name__ == "__main__":
    main()
