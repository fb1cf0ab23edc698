"""The demo's stages: each is a command line that exists, runs once, and says what failed."""

import json
import os
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from common.errors import UserError
from common.run_folder import append_metrics
from tools import demo
from tools.demo import Stage, run_stage


@pytest.fixture
def bar() -> tqdm:
    return tqdm(total=100, disable=True)


def test_failing_stage_names_its_log_and_the_last_line(tmp_path: Path, bar: tqdm) -> None:
    log = tmp_path / "log.txt"
    weights = tmp_path / "nothing.pth"
    stage = Stage("evaluating", ["classification.evaluate", str(weights)], 5)
    with pytest.raises(
        UserError, match=r"log\.txt: evaluating failed: .*nothing\.pth: no such weights file.*make demo"
    ):
        run_stage(stage, log, bar)
    assert "error: " in log.read_text()


def test_begun_run_is_resumed(tmp_path: Path, bar: tqdm) -> None:
    """What is run tells its arguments: Python's own `compileall` refuses an option that it does not know."""
    stage = Stage("training", ["compileall", "-q"], 5, run=tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="unrecognized arguments: --resume"):
        run_stage(stage, tmp_path / "log.txt", bar)


def test_the_loss_shown_is_the_newest_of_the_running_stage(tmp_path: Path) -> None:
    for name, rows in {"first": [{"train_loss": 4.0}], "second/trial": [{"total_loss": 2.0}, {"AP50": 0.5}]}.items():
        (tmp_path / name).mkdir(parents=True)
        for row in rows:
            append_metrics(tmp_path / name, {"iteration": 0, **row})
        os.utime(tmp_path / name / "metrics.json", (1000 + len(rows), 1000 + len(rows)))
    assert demo.latest_loss(tmp_path, since=1000) == "total_loss 2.000"
    assert demo.latest_loss(tmp_path, since=2000) == ""  # all were written before it began


def test_finished_stages_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "demo"
    marks = [tmp_path / "first", tmp_path / "second"]
    stages = [Stage(mark.name, ["venv", "--without-pip", str(mark)], 1) for mark in marks]
    stages.append(Stage("fails", ["tools.sample_data", "--no-such-option"], 1))
    output.mkdir()
    (output / demo.FINISHED).write_text(json.dumps({"first": stages[0].arguments, "second": ["other arguments"]}))
    monkeypatch.setattr(demo, "plan", lambda _: stages)
    monkeypatch.setattr(demo, "draw_sample", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(output)])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2
    assert [mark.exists() for mark in marks] == [False, True]
    assert json.loads((output / demo.FINISHED).read_text()) == {stage.name: stage.arguments for stage in stages[:2]}
