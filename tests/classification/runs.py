"""Trainings of the smallest network: in this process, in a child that can be killed, and through the launcher."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from classification import train
from classification.cub import read_cub
from classification.recipe import Recipe
from classification.run import Run
from common.run_folder import read_metrics
from tests.processes import free_port

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
TIMING = ("images_per_second", "data_share")


def train_in(folder: Path, root: Path, **settings) -> dict:
    """Trains, or goes on, in a folder; returns what `result.json` holds."""
    recipe = Recipe(**{**TINY, **settings})
    cub = read_cub(root)
    model, recipe = train.build_model_for(recipe, len(cub.class_names), is_sample=False)
    training = Run(recipe, cub, model, torch.device("cpu"), folder if folder.exists() else None)
    folder.mkdir(exist_ok=True)
    return training.train(folder)


def words(root: Path, output: Path, name: str, **settings) -> list[str]:
    """The command line of a new run `output/name`."""
    changes = [f"{key}={value}" for key, value in {**TINY, "data": root, **settings}.items()]
    return ["study", *changes, "--output", str(output), "--name", name]


def goes_on(output: Path, name: str, *changes: str) -> list[str]:
    """The command line that resumes `output/name`."""
    return [*changes, "--output", str(output), "--name", name, "--resume"]


def _child(arguments: list[str], said: Path, environment: dict[str, str]) -> None:
    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = ["classification.train", *arguments]
    train.main()


def start(arguments: list[str], said: Path, processes: int = 1) -> list[BaseProcess]:
    """Starts the command line in processes that train together; the first writes what it says into a file."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        environment = meeting | {name: str(value) for name, value in place.items()} if processes > 1 else {}
        file = said if rank == 0 else said.with_suffix(f".{rank}{said.suffix}")
        children.append(get_context("forkserver").Process(target=_child, args=(arguments, file, environment)))
        children[-1].start()
    return children


def ended(children: list[BaseProcess]) -> list[int]:
    """Waits for processes, and returns their exit codes."""
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def launch(arguments: list[str], said: Path, processes: int) -> subprocess.Popen:
    """Starts the command line in several processes, which form a process group together with their launcher."""
    with said.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.launch", "classification.train", *arguments],
            cwd=ROOT,
            env={**os.environ, "NGPU": str(processes), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_checkpoints(last: Path, count: int, is_alive: Callable[[], bool]) -> None:
    """Waits until `model_last.pth` was written `count` times more, or its process has ended."""
    for _ in range(count):
        seen = _written(last)
        while is_alive() and _written(last) == seen:
            time.sleep(0.001)


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def assert_same_runs(ours: Path, theirs: Path) -> None:
    """All that two runs ended with is equal bit for bit, but for what measures time."""
    for name in ("model_last.pth", "model_best.pth"):
        assert_same(*(torch.load(run / name, weights_only=True) for run in (ours, theirs)))
    rows = [[{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(run)] for run in (ours, theirs)]
    assert rows[0] == rows[1]
    assert len(rows[0]) > 0
    assert (ours / "result.json").read_text() == (theirs / "result.json").read_text()


def assert_same(ours, theirs) -> None:
    """Two nested values are equal, tensors bit for bit."""
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
