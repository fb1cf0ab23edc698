import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from classification.cub import read_cub
from classification.model import build_model, load_classifier
from classification.recipe import Recipe
from classification.train import build_model_for, train
from common.errors import UserError
from tools.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = {"model": "test_resnet", "pretrained": False, "image_size": 32, "batch_size": 8, "epochs": 3, "lr": 0.05}
EVERYTHING = {
    "train_crop": "random_resized",
    "rotation": 20,
    "random_erasing": 0.5,
    "cutmix": 1.0,
    "mixup": 0.4,
    "mix_prob": 0.7,
    "label_smoothing": 0.1,
    "drop_rate": 0.2,
    "ema_decay": 0.9,
    "schedule": "cosine",
    "warmup": 0.3,
    "clip_grad": 1.0,
    "checkpoint_every": 1,
}


def run(folder: Path, root: Path, **settings) -> dict:
    recipe = Recipe(**{**TINY, **settings})
    cub = read_cub(root)
    model, recipe = build_model_for(recipe, len(cub.class_names), is_sample=False)
    folder.mkdir(exist_ok=True)
    return train(recipe, cub, model, folder, torch.device("cpu"))


def command(root: Path, output: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    settings = [f"{key}={value}" for key, value in TINY.items()]
    program = [sys.executable, "-m", "tools.launch", "classification.train", "study"]
    return subprocess.run(
        [*program, *settings, f"data={root}", *arguments, "--output", str(output)],
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "NGPU": str(processes), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_learns_colours_and_leaves_a_whole_run_folder(tiny_root, tmp_path):
    result = run(tmp_path / "run", tiny_root, epochs=8)
    assert result["top1"] >= 80
    assert result["chosen_on"] == "test split"
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(2, 24, 3))
    assert result["validation_top1"] == max(row["validation_top1"] for row in rows)
    assert result["top1"] == pytest.approx(result["validation_top1"], abs=10)  # of ten images, bfloat16 may move one
    assert {"results.csv", "results.png", "model_best.pth", "model_last.pth"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert list((tmp_path / "run").glob("events.out.*"))
    model, card = load_classifier(tmp_path / "run" / "model_best.pth")
    assert card["class_names"][0] == "Red Bird"
    assert card["validation_top1"] == result["validation_top1"]
    assert not model.training


def _child(folder: Path, root: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    run(folder, root, **settings)


def test_killed_at_ten_random_moments_the_final_weights_are_the_same_bit_for_bit(tiny_root, tmp_path):
    context = get_context("forkserver")
    context.set_forkserver_preload(["classification.train", "pandas", "matplotlib.figure"])

    def start(folder: Path):
        child = context.Process(target=_child, args=(folder, tiny_root, {**EVERYTHING, "epochs": 5}))
        child.start()
        return child

    whole = start(tmp_path / "whole")
    last, kills, generator = tmp_path / "killed" / "model_last.pth", 0, random.Random(0)
    while kills < 10:
        child = start(tmp_path / "killed")
        for _ in range(generator.randint(0, 2)):
            seen = changed(last)
            while child.is_alive() and changed(last) == seen:
                time.sleep(0.001)
        child.join(timeout=generator.uniform(0, 0.1))
        if child.exitcode is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    else:
        child = start(tmp_path / "killed")
        child.join()
    whole.join()
    assert kills >= 5
    assert child.exitcode == whole.exitcode == 0
    for name in ("model_last.pth", "model_best.pth"):
        ours, theirs = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("killed", "whole"))
        assert_same(ours, theirs)
    for killed, never in zip(*(read_metrics(tmp_path / folder) for folder in ("killed", "whole")), strict=True):
        timing = ("images_per_second", "data_share", "iterations")
        assert {k: v for k, v in killed.items() if k not in timing} == {
            k: v for k, v in never.items() if k not in timing
        }


def changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def assert_same(ours, theirs) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs


def test_loading_processes_and_the_cache_change_nothing(tiny_root, tmp_path):
    weights = []
    for name, settings in {
        "cached": {},
        "decoded": {"cache": False, "workers": 0},
        "workers": {"cache": False},
    }.items():
        run(tmp_path / name, tiny_root, **{**EVERYTHING, "epochs": 2, **settings})
        weights.append(torch.load(tmp_path / name / "model_last.pth", weights_only=True)["trainer"])
    assert_same(weights[0], weights[1])
    assert_same(weights[0], weights[2])


def test_held_out_images_choose_and_the_test_split_is_used_once(tiny_root, tmp_path):
    result = run(tmp_path / "run", tiny_root, holdout=0.34, epochs=2)
    assert result["chosen_on"] == "10 images held out of the training split"
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["iteration"] == 2 * (20 // 8) - 1
    assert result["validation_top1"] == max(row["validation_top1"] for row in rows)
    # Spoilt test images go unnoticed until the very end.
    for bird in read_cub(tiny_root).test:
        bird.path.write_bytes(b"spoilt")
    with pytest.raises(UserError, match="unreadable image"):
        run(tmp_path / "spoilt", tiny_root, holdout=0.34, epochs=2)
    assert len(read_metrics(tmp_path / "spoilt")) == 2


def test_patience_stops_and_a_stopped_run_stays_stopped(tiny_root, tmp_path, caplog):
    caplog.set_level("INFO", logger="classification")
    settings = {"epochs": 30, "patience": 2, "lr": 1e-12, "flip": 0.0}
    first = run(tmp_path / "run", tiny_root, **settings)
    assert "Stopped early" in caplog.text
    assert len(read_metrics(tmp_path / "run")) == first["epoch"] + 2
    assert run(tmp_path / "run", tiny_root, **settings) == first
    assert len(read_metrics(tmp_path / "run")) == first["epoch"] + 2


def test_a_diverging_run_says_so(tiny_root, tmp_path):
    with pytest.raises(UserError, match="the run diverged; lower the rate"):
        run(tmp_path / "run", tiny_root, lr=1e30)


def test_a_batch_larger_than_the_data_is_refused(tiny_root, tmp_path):
    with pytest.raises(UserError, match="at most the 30 training images"):
        run(tmp_path / "run", tiny_root, batch_size=32)


def test_alexnet_trains_too(tiny_root, tmp_path):
    assert run(tmp_path / "run", tiny_root, model="alexnet", image_size=64, epochs=1)["epoch"] == 1


def test_the_command_line_trains_resumes_and_refuses_other_settings(tiny_root, tmp_path):
    first = command(tiny_root, tmp_path, "epochs=1")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "test_resnet-study-random"
    assert "Test split, 10 images" in (folder / "log.txt").read_text()
    assert "waiting for data" in first.stderr + first.stdout
    other = command(tiny_root, tmp_path, "epochs=1", "lr=0.5", "--resume")
    assert other.returncode == 2
    assert "lr: 0.05 -> 0.5" in other.stderr
    assert "Traceback" not in other.stderr


def test_two_processes_share_the_work_and_resume_together(tiny_root, tmp_path):
    finished = command(tiny_root, tmp_path, "epochs=2", processes=2)
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "test_resnet-study-random"
    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == [2, 5]
    alone = run(tmp_path / "alone", tiny_root, epochs=2)
    # BatchNorm sees half a batch in each, so the figures are close and not equal.
    assert rows[0]["train_loss"] == pytest.approx(read_metrics(tmp_path / "alone")[0]["train_loss"], rel=0.2)
    assert json.loads((folder / "result.json").read_text()).keys() == alone.keys()


def test_weights_of_the_wrong_model_stop_the_run(tiny_root, tmp_path):
    torch.save(build_model("resnet18", 1000).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match="weights of another model"):
        run(tmp_path / "run", tiny_root, pretrained=True, weights=str(tmp_path / "resnet18.pth"))
