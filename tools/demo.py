"""Every experiment of the study on drawn data, and the report of them: `make demo`, without network or GPU.

The engine of `tools.study` with a shorter list, into `output/demo`. Called again after an interruption, it goes on
where it was.
"""

import json
from pathlib import Path

from common.data_root import SAMPLE
from common.errors import ArgumentParser, exits_on_user_error
from common.sample import draw_sample
from tools.study import STUDIES, read_plan, run_stages

OTHER_SAMPLE = SAMPLE.with_name("sample-other")  # birds to learn from first, and photographs from outside


def summary(output: Path) -> str:
    """The figures of the finished demo, read from its files, and where to go from there."""
    figures = {
        name: json.loads((output / run / "evaluation" / "evaluation.json").read_text())["AP50_11point"]
        for name, run in (
            ("Faster R-CNN", "faster_rcnn-seed0"),
            ("YOLOv3", "yolov3-seed0"),
        )
    }
    top1 = {
        start: json.loads((output / "pretraining-seed0" / start / "result.json").read_text())["top1"]
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
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the demo's runs")
    output = parser.parse_args().output

    draw_sample(SAMPLE, seed=0)
    draw_sample(OTHER_SAMPLE, seed=1)
    outside = sorted(map(str, (OTHER_SAMPLE / "VOC2007" / "JPEGImages").glob("*.jpg")))[:3]
    run_stages(read_plan(STUDIES / "demo.yaml", output, SAMPLE, images=outside), output)
    print(summary(output))


if __name__ == "__main__":
    main()
