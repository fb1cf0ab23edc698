"""The stages of study and demo: each is a command line that exists, runs once, and says what failed."""

import json
import os
from pathlib import Path

import pytest
from tqdm import tqdm

from classification.recipe import load_recipe
from classification.train import run_name
from common.data_root import SAMPLE
from common.errors import UserError
from common.run_folder import append_metrics
from common.sample import sample_seed
from detection.experiment import run_names
from detection.train_net import parse_args
from tools import demo, study
from tools.study import Stage, latest_loss, run_stage, run_stages


@pytest.fixture
def bar() -> tqdm:
    return tqdm(total=100, disable=True)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output" / "logs").mkdir(parents=True)
    return tmp_path / "output"


def test_failing_stage_names_its_log_and_the_last_line(tmp_path: Path, output: Path, bar: tqdm) -> None:
    weights = tmp_path / "nothing.pth"
    stage = Stage("evaluating birds", ["classification.evaluate", str(weights)], 5)
    with pytest.raises(
        UserError, match=r"evaluating-birds\.txt: evaluating birds failed: .*nothing\.pth: no such weights file"
    ):
        run_stage(stage, output, bar)
    assert "error: " in (output / "logs" / "evaluating-birds.txt").read_text()


def test_begun_run_is_resumed(tmp_path: Path, output: Path, bar: tqdm) -> None:
    """What is run tells its arguments: Python's own `compileall` refuses an option that it does not know."""
    stage = Stage("training", ["compileall", "-q"], 5, run=tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="unrecognized arguments: --resume"):
        run_stage(stage, output, bar)


def test_the_loss_shown_is_the_newest_of_the_running_stage(tmp_path: Path) -> None:
    for name, rows in {"first": [{"train_loss": 4.0}], "second/trial": [{"total_loss": 2.0}, {"AP50": 0.5}]}.items():
        (tmp_path / name).mkdir(parents=True)
        for row in rows:
            append_metrics(tmp_path / name, {"iteration": 0, **row})
        os.utime(tmp_path / name / "metrics.json", (1000 + len(rows), 1000 + len(rows)))
    assert latest_loss(tmp_path, since=1000) == "total_loss 2.000"
    assert latest_loss(tmp_path, since=2000) == ""  # all were written before it began


def test_finished_stages_are_left_alone_and_the_others_go_on_after_one_that_failed(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = [tmp_path / name for name in ("first", "second", "third")]
    first, second, third = (Stage(mark.name, ["venv", "--without-pip", str(mark)], 1) for mark in marks)
    fails = Stage("fails", ["tools.sample_data", "--no-such-option"], 1)
    (output / study.FINISHED).write_text(json.dumps({"first": first.arguments, "second": ["other arguments"]}))
    with pytest.raises(UserError, match=r"1 of 4 stages failed: fails; .*make demo"):
        run_stages([first, second, fails, third], output, "demo")
    assert [mark.exists() for mark in marks] == [False, True, True]
    finished = json.loads((output / study.FINISHED).read_text())
    assert finished == {stage.name: stage.arguments for stage in (first, second, third)}
    assert "[ 3/4]" in capsys.readouterr().out
    assert (output / "report" / "index.html").exists()


def test_missing_data_is_named_before_anything_starts(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "VOC2007").mkdir()
    with pytest.raises(SystemExit) as stopped:
        study.main(["--data", str(tmp_path), "--output", str(output / "study")])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: no CUB_200_2011, no VOC2012 in it; ")
    assert not (output / "study").exists()


def test_the_plan_says_what_is_finished_and_what_has_begun_and_runs_nothing(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in study.NEEDED:
        (tmp_path / name).mkdir()
    sweep, *_ = study.plan(output, tmp_path, "study", ["study"])
    (output / study.FINISHED).write_text(json.dumps({sweep.name: sweep.arguments}))
    (output / "faster_rcnn_R_50_FPN_study").mkdir()
    before = sorted(output.rglob("*"))
    study.main(["--data", str(tmp_path), "--output", str(output), "--plan"])
    lines = capsys.readouterr().out.splitlines()
    states = {line.partition("] ")[2].rpartition(": ")[0]: line.rpartition(": ")[2] for line in lines if "] " in line}
    assert states.pop(sweep.name) == "finished"
    assert states.pop("training Faster R-CNN") == "to go on"
    assert len(states) == 8
    assert set(states.values()) == {"to do"}
    assert sorted(output.rglob("*")) == before


@pytest.mark.parametrize("recipe", ["study", "best"])
def test_stages_look_for_runs_where_training_puts_them(tmp_path: Path, recipe: str) -> None:
    stages = {stage.name: stage for stage in study.plan(tmp_path, tmp_path, recipe, [recipe])}
    path = Path("classification/recipes") / f"{recipe}.yaml"
    pair = f"{run_name(load_recipe(path), path, is_sample=False)}-pretraining"
    assert str(tmp_path / pair / "pretrained" / "model_best.pth") in stages["evaluating the classifier"].arguments
    assert (
        stages["training YOLOv3"].run == tmp_path / run_names(parse_args(["--model", "yolov3", "--recipe", recipe]))[0]
    )


def test_the_demo_is_the_same_list_on_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "sample_seed", lambda root: 0 if root == SAMPLE else sample_seed(root))
    stages = {stage.name: stage for stage in demo.plan(tmp_path)}
    names = [stage.name for stage in study.plan(tmp_path, tmp_path, "study", ["study"])]
    assert [name for name in stages if name in names] == names
    path = Path("classification/recipes/sample.yaml")
    pair = f"{run_name(load_recipe(path), path, is_sample=True)}-pretraining"
    assert str(tmp_path / pair / "pretrained" / "model_best.pth") in stages["evaluating the classifier"].arguments
    assert stages["training Faster R-CNN"].run == tmp_path / run_names(parse_args(["--model", "faster_rcnn"]))[1]
