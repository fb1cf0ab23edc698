"""Each model on two real GPUs, and the same run resumed on them."""

import os
import subprocess
import sys

import pytest
import torch

from common.run_folder import read_metrics
from tests.classification.runs import TINY
from tests.conftest import ROOT
from tests.detection import conftest as detection
from tests.test_on_gpu import EVERYWHERE, SMALL, draw_birds, losses

voc_folder, tiny_opts = detection.voc_folder, detection.tiny_opts


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here")
@pytest.mark.parametrize("model", ["classifier", "faster_rcnn", "yolov3"])
def test_two_gpus_train_and_resume(voc_folder, tiny_opts, tmp_path, model):
    if model == "classifier":
        words = [
            "classification.train",
            "study",
            f"data={draw_birds(tmp_path / 'birds')}",
            *(f"{key}={value}" for key, value in TINY.items()),
        ]
        words, resume = [*words, "--name", "two"], ["classification.train", "epochs=4", "--name", "two", "--resume"]
    else:
        settings = {**EVERYWHERE, **SMALL[model], "SOLVER.ACCUMULATE": 1, "SOLVER.MAX_ITER": 10}
        opts = tiny_opts if model == "faster_rcnn" else []
        opts = opts + [str(word) for pair in settings.items() for word in pair]
        start = ["detection.train_net", "--model", model]
        words = [*start, "--data", str(voc_folder), "--pretrained", "0", *opts]
        resume = [*start, "--resume", "SOLVER.MAX_ITER", "20"]
    for arguments in (words, resume):
        command = [sys.executable, "-m", "tools.launch", *arguments, "--output", str(tmp_path / "runs")]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "NGPU": "2"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    rows = read_metrics(run)
    losses(rows)
    assert rows[-1]["iteration"] == (11 if model == "classifier" else 19)
