"""A run that was stopped, however and whenever, ends with what the undisturbed one ends with, bit for bit."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from classification import evaluate
from classification.cub import read_cub
from classification.model import build_model
from classification.recipe import Recipe
from classification.run import Run
from common.errors import Interrupted
from common.run_folder import read_metrics
from tests.classification.runs import (
    EVERYTHING,
    TINY,
    assert_same_runs,
    ended,
    goes_on,
    launch,
    start,
    train_in,
    wait_for_checkpoints,
    words,
)

MANY = {**EVERYTHING, "epochs": 8, "precision": "float32"}


def assert_says_how_to_go_on(said: Path, run: Path) -> None:
    """In one line, and nothing that looks like a fault."""
    text = said.read_text()
    lines = [line for line in text.splitlines() if "interrupted" in line]
    assert len(lines) == 1, text
    assert str(run) in lines[0]
    assert "RESUME=1" in lines[0]
    assert "Traceback" not in text
    assert "error" not in text.lower()


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, kept_root) -> dict[int, Path]:
    """The undisturbed run, by its number of processes."""
    output = tmp_path_factory.mktemp("undisturbed")
    started = {n: start(words(kept_root, output, f"of {n}", **MANY), output / f"{n}.txt", n) for n in (1, 2)}
    for processes, children in started.items():
        assert ended(children) == [0] * processes, (output / f"{processes}.txt").read_text()
    return {processes: output / f"of {processes}" for processes in started}


@pytest.mark.parametrize(("processes", "most"), [(1, 10), (2, 5)])
def test_killed_at_random_moments(kept_root, wholes, tmp_path, processes, most):
    run, said = tmp_path / "run", tmp_path / "said.txt"
    generator, kills = random.Random(0), 0
    while True:
        # What the first command asked for need not be said again.
        begun = goes_on(tmp_path, "run") if run.exists() else words(kept_root, tmp_path, "run", **MANY)
        children = start(begun, said, processes)
        if kills < most:
            wait_for_checkpoints(run / "model_last.pth", generator.randint(0, 3), children[0].is_alive)
            children[0].join(timeout=generator.uniform(0, 0.2))
            if children[0].exitcode is None:
                for child in children:
                    child.kill()
                codes = ended(children)
                if codes[0] == 0:
                    break  # it had just come to its end
                assert codes == [-signal.SIGKILL] * processes
                kills += 1
                continue
        assert ended(children) == [0] * processes, said.read_text()
        break
    assert kills >= most // 2
    assert_same_runs(run, wholes[processes])


def test_ctrl_c(kept_root, wholes, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said.txt"
    for attempt, checkpoints in enumerate((2, 5)):
        children = start(goes_on(tmp_path, "run") if attempt else words(kept_root, tmp_path, "run", **MANY), said)
        wait_for_checkpoints(run / "model_last.pth", checkpoints, children[0].is_alive)
        os.kill(children[0].pid, signal.SIGINT)
        assert ended(children) == [130], said.read_text()
        assert_says_how_to_go_on(said, run)
    assert ended(start(goes_on(tmp_path, "run"), said)) == [0], said.read_text()
    assert_same_runs(run, wholes[1])


def test_ctrl_c_for_two_processes_and_for_their_launcher_alone(kept_root, wholes, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said.txt"
    children = start(words(kept_root, tmp_path, "run", **MANY), said, 2)
    wait_for_checkpoints(run / "model_last.pth", 2, children[0].is_alive)
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    assert ended(children) == [130, 130], said.read_text()
    assert_says_how_to_go_on(said, run)
    launcher = launch(goes_on(tmp_path, "run"), said, 2)
    wait_for_checkpoints(run / "model_last.pth", 3, lambda: launcher.poll() is None)
    os.kill(launcher.pid, signal.SIGINT)
    assert launcher.wait() == 130, said.read_text()
    assert_says_how_to_go_on(said, run)
    assert ended(start(goes_on(tmp_path, "run"), said, 2)) == [0, 0], said.read_text()
    assert_same_runs(run, wholes[2])


@pytest.mark.parametrize("step", [2, 3, 6], ids=["within an epoch", "at its end", "at the end of the run"])
def test_ctrl_c_at_a_known_step(kept_root, tmp_path, step):
    """An epoch ends after three: it is then validated first, and its sums do not run into the next one."""
    settings = {**EVERYTHING, "epochs": 2}
    train_in(tmp_path / "whole", kept_root, **settings)
    recipe = Recipe(**{**TINY, **settings})
    torch.manual_seed(recipe.seed)
    training = Run(recipe, read_cub(kept_root), build_model("test_resnet", 5, drop_rate=0.2), torch.device("cpu"))
    augment = training.trainer.augment

    def interrupted(*arguments):
        if training.trainer.iteration == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return augment(*arguments)

    training.trainer.augment = interrupted
    (tmp_path / "run").mkdir()
    with pytest.raises(Interrupted, match=f"saved after iteration {step}; RESUME=1"):
        training.train(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == step // 3
    train_in(tmp_path / "run", kept_root, **settings)
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_validation_is_of_the_weights_that_are_saved(kept_root, wholes, tmp_path, run_main, processes):
    """The buffers of several processes differ: those of the first are kept, and must be measured."""
    run = wholes[processes]
    best = torch.load(run / "model_best.pth", weights_only=True)
    code, _, complaint = run_main(
        evaluate.main, str(run / "model_best.pth"), "--data", str(kept_root), "--out", str(tmp_path)
    )
    assert code == 0, complaint
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["top1"] == pytest.approx(best["validation_top1"])
    assert report["loss"] == pytest.approx(best["validation_loss"], rel=1e-5)
    assert read_metrics(run)[best["epoch"] - 1]["validation_loss"] == best["validation_loss"]
