import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from classification.model import build_model

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["study", "model=test_resnet", "image_size=32", "batch_size=8"]


def sweep(root: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "classification.sweep", *arguments, f"data={root}", "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_grid_is_a_line_a_trial_a_table_and_a_map_and_goes_on_where_it_was(tiny_root, tmp_path):
    grid = ["grid", *SETTINGS, "pretrained=0"]
    first = sweep(tiny_root, tmp_path, *grid, "--lrs", "1e-9", "--epochs", "2")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "test_resnet-study-random-grid"
    assert "[1/1] lr 1e-09, 2 epochs" in first.stdout
    # A result that no training would give shows that finished trials are taken as they are.
    finished = folder / "lr1e-09-epochs2" / "result.json"
    finished.write_text(json.dumps(json.loads(finished.read_text()) | {"validation_top1": 12.25}))
    second = sweep(tiny_root, tmp_path, *grid, "--lrs", "1e-9 0.05", "--epochs", "2")
    assert second.returncode == 0, second.stderr
    assert "12.25 %" in second.stdout
    assert "<- new best" in second.stdout
    assert "Chosen on the test split" in second.stdout
    table = pd.read_csv(folder / "sweep.csv")
    assert sorted(table["lr"]) == [1e-9, 0.05]
    assert list(table["validation top-1"]) == sorted(table["validation top-1"], reverse=True)
    assert Image.open(folder / "sweep.png").size[0] > 100
    other = sweep(tiny_root, tmp_path, *grid, "seed=1", "--lrs", "1e30", "--epochs", "1")
    assert other.returncode == 2
    assert "test_resnet-study-random-grid-2" in other.stderr
    assert "the run diverged" in other.stderr


def test_pretrained_and_random_are_compared_with_equal_settings(tiny_root, tmp_path):
    torch.save(build_model("test_resnet", 10).state_dict(), tmp_path / "weights.pth")
    done = sweep(tiny_root, tmp_path, "pretraining", *SETTINGS, "epochs=1", f"weights={tmp_path / 'weights.pth'}")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "test_resnet-study-pretraining"
    table = pd.read_csv(folder / "comparison.csv")
    assert list(table["start"]) == ["pretrained", "random"]
    assert "left out, the head of other classes" in (folder / "pretrained" / "log.txt").read_text()
    configs = [(folder / name / "config.yaml").read_text().splitlines() for name in ("pretrained", "random")]
    assert {line.split(":")[0] for line in set(configs[0]) ^ set(configs[1])} == {"pretrained", "weights"}
    assert Image.open(folder / "comparison.png").size[0] > 300
