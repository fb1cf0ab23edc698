"""Measures this project against what people use otherwise: `python -m tools.bench [names]`, one table a name."""

import multiprocessing
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import cv2
import detectron2
import pandas as pd
import torch
import torchvision

from common.data_root import resolve_data_root
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.run_folder import machine
from common.runtime import PRECISIONS
from detection.voc import OFFICIAL_FOLDERS
from tools.bench import busy, classification, export, faster_rcnn, pipeline, training_images, voc, yolov3
from tools.bench.rivals import fetched_ultralytics
from tools.bench.timing import rival_precisions, seconds_of

BENCHMARKS: dict[str, Callable[[Path], pd.DataFrame]] = {
    "classification": classification.training_epoch,
    "classification_accuracy": classification.training_accuracy,
    "faster_rcnn": faster_rcnn.speed,
    "faster_rcnn_accuracy": faster_rcnn.accuracy,
    "yolov3": yolov3.speed,
    "yolov3_targets": yolov3.targets,
    "voc_loader": voc.loader,
    "voc_evaluator": voc.evaluator,
    "training_images": training_images.training_images,
    "pipeline": pipeline.pipeline,
    "busy": busy.busy,
    "export": export.speed,
}
WITH_ULTRALYTICS = {"yolov3", "training_images"}


def describe_machine() -> str:
    """One line on what the figures were measured with."""
    capabilities = torch.cpu.get_capabilities()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]
    rates = ", ".join(f"{matmul_rate(name):.0f} GFLOP/s in {name}" for name in rival_precisions("cpu"))
    return (
        f"{machine()}; {torch.get_num_threads()} threads, {' '.join(bf16) or 'no bf16 instructions'}, {rates}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Detectron2 {detectron2.__version__}, OpenCV {cv2.__version__}"
    )


def matmul_rate(precision: str, size: int = 2048, rounds: int = 3) -> float:
    """Operations a second, in 10^9, of a matrix product on the CPU, the best round: what networks are limited by."""
    matrix = torch.rand(size, size, dtype=PRECISIONS[precision])
    return 2e-9 * size**3 / min(seconds_of(lambda: matrix @ matrix) for _ in range(1 + rounds))


@exits_on_user_error
def main() -> None:
    """Reads the command line and prints the table of each benchmark as soon as it is measured."""
    parser = ArgumentParser(description="Benchmarks; times are medians, the contenders taking turns.")
    # argparse also checks the empty list, which means all, against the choices.
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="name", help=", ".join(BENCHMARKS))
    parser.add_argument("--data", help="data root (default: datasets/, else the drawn sample)")
    parser.add_argument("--fetch", action="store_true", help="fetch ultralytics without asking")
    arguments = parser.parse_args()
    root, is_sample = resolve_data_root(arguments.data, OFFICIAL_FOLDERS.values())
    print(f"{describe_machine()}\nData: {root}{' (the drawn sample)' if is_sample else ''}")
    names, failed = arguments.names or list(BENCHMARKS), []
    with fetched_ultralytics(arguments.fetch) if WITH_ULTRALYTICS & set(names) else nullcontext():
        for name in names:
            print(f"\n## {name}\n")
            try:
                # In a process of its own: ours keep freed memory, which would be too much after a few.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    table = process.submit(BENCHMARKS[name], root).result()
            except UserError as error:
                print(f"not measured: {error}", flush=True)
                failed.append(name)
                continue
            print(table.astype(object).fillna("").to_markdown(index=False, floatfmt=".3g"), flush=True)
    if failed:
        raise UserError(f"{', '.join(failed)}: not measured for want of data, see above; the other benchmarks are done")


if __name__ == "__main__":
    main()
