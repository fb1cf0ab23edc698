"""Each model on two GPUs, and the same run resumed on them: real ones where there are two, and else pretended ones."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.run_folder import read_metrics
from tests.birds import draw_birds
from tests.classification.runs import TINY
from tests.conftest import ROOT
from tests.detection import conftest as detection
from tests.processes import together
from tests.test_on_gpu import EVERYWHERE, SMALL, losses

voc_folder, tiny_opts = detection.voc_folder, detection.tiny_opts
ARE_REAL = torch.cuda.device_count() >= 2
STEPS = 10 if ARE_REAL else 2


def command_line(module: str, *words: str) -> None:
    """Runs it in this process, one of two with a pretended GPU each."""
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


def run(arguments: list[str]) -> None:
    if not ARE_REAL:
        together(2, command_line, *arguments, has_gpus=True)
        return
    command = [sys.executable, "-m", "tools.launch", *arguments]
    variables = {**os.environ, "NGPU": "2"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("model", ["classifier", "faster_rcnn", "yolov3"])
def test_two_gpus_train_and_resume(voc_folder: Path, tiny_opts: list[str], tmp_path: Path, model: str) -> None:
    if model == "classifier":
        # With eight images a process no statistics are shared, which pretended GPUs could not.
        settings = {**TINY, "batch_size": 16, "snapmix": 5.0, "mix_prob": 0.5, "workers": 0}
        settings["data"] = draw_birds(tmp_path / "birds")
        words = ["classification.train", "study", *(f"{key}={value}" for key, value in settings.items())]
        words, resume = [*words, "--name", "two"], ["classification.train", "epochs=4", "--name", "two", "--resume"]
        last = 3
    else:
        settings = {**EVERYWHERE, **SMALL[model], "SOLVER.MAX_ITER": STEPS}
        opts = tiny_opts if model == "faster_rcnn" else []
        opts = opts + [str(word) for pair in settings.items() for word in pair]
        start = ["detection.train_net", "--model", model]
        words = [*start, "--data", str(voc_folder), "--pretrained", "0", *opts]
        resume = [*start, "--resume", "SOLVER.MAX_ITER", str(2 * STEPS)]
        last = 2 * STEPS - 1
    for arguments in (words, resume):
        run([*arguments, "--output", str(tmp_path / "runs")])
    (folder,) = (tmp_path / "runs").iterdir()
    rows = read_metrics(folder)
    losses(rows)
    assert rows[-1]["iteration"] == last
