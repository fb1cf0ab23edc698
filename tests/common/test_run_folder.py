"""The run folder: nobody's files are touched, and what is there is whole."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from common.errors import UserError
from common.files import write_atomically
from common.run_folder import (
    _plot,
    append_metrics,
    create_run_folder,
    find_run_folders,
    newest_weights,
    read_metrics,
    read_sessions,
    record_session,
    refuse_taken_name,
    run_to_resume,
    truncate_metrics,
    write_results,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("run", ["run", "own[1]"])
def test_runs_never_share_a_folder(tmp_path: Path, run: str) -> None:
    root = tmp_path / "new" / "output"
    assert find_run_folders(root, run) == []
    names = [create_run_folder(root, run).name for _ in range(11)]
    assert names == [run, *(f"{run}-{number}" for number in range(2, 12))]
    assert create_run_folder(root, f"{run}-2").name == f"{run}-2-2"
    for suffix in ("-x", "ning", "_study", "-1.5"):
        (root / f"{run}{suffix}").mkdir()
    assert [path.name for path in find_run_folders(root, run)] == names  # by number, not by letter


def test_the_run_trained_in_last_is_resumed(tmp_path: Path) -> None:
    """Whichever of its names it has: a run on the drawn sample has another one."""
    for second, name in enumerate(["run", "run-2", "run-sample", "run-10", "other"]):
        (tmp_path / name).mkdir()
        append_metrics(tmp_path / name, {"iteration": 0})
        os.utime(tmp_path / name / "metrics.json", (second, second))
    (tmp_path / "run" / "evaluation").mkdir()
    assert run_to_resume(tmp_path, ["run", "run-sample"]).name == "run-10"
    os.utime(tmp_path / "run-sample" / "metrics.json", (60, 60))
    assert run_to_resume(tmp_path, ["run", "run-sample"]).name == "run-sample"
    assert run_to_resume(tmp_path, ["run"]).name == "run-10"
    create_run_folder(tmp_path, "run")  # killed before its first row
    assert run_to_resume(tmp_path, ["run"]).name == "run-3"
    assert run_to_resume(tmp_path, [], "run").name == "run"


def test_a_run_has_a_name_of_its_own(tmp_path: Path) -> None:
    refuse_taken_name(tmp_path / "nowhere", "night")
    with pytest.raises(UserError, match="RUN=birds/night: expected the name of a folder in"):
        refuse_taken_name(tmp_path, "birds/night")
    create_run_folder(tmp_path, "night")
    refuse_taken_name(tmp_path, "night-2")
    with pytest.raises(UserError, match=f"{tmp_path / 'night'}: is there already; RESUME=1 goes on"):
        refuse_taken_name(tmp_path, "night")


def test_nothing_to_resume(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{root / 'run'}: no run to resume"):
            run_to_resume(root, ["run", "run-sample"])


def test_going_on_clears_what_a_kill_left_half_written(tmp_path: Path) -> None:
    """A process that is killed in the middle of a checkpoint."""
    write_atomically(tmp_path / "model.pth", lambda file: file.write(b"whole"))
    append_metrics(tmp_path, {"iteration": 0})
    program = (
        "import sys, time; from pathlib import Path; from common.files import write_atomically\n"
        "write = lambda file: (file.write(b'half'), file.flush(), print('writing', flush=True), time.sleep(60))\n"
        "write_atomically(Path(sys.argv[1]) / 'model.pth', write)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"writing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert len(list(tmp_path.iterdir())) == 3
    truncate_metrics(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == b"whole"
    assert read_metrics(tmp_path) == [{"iteration": 0}]


def test_the_newest_weights_of_several_runs(tmp_path: Path) -> None:
    runs = [create_run_folder(tmp_path, "run") for _ in range(4)]
    assert newest_weights(runs) is None
    for second, run in enumerate((runs[2], runs[0])):  # the last has none yet
        (run / "model_best.pth").touch()
        os.utime(run / "model_best.pth", (second, second))
    assert newest_weights(runs) == runs[0] / "model_best.pth"


def test_metrics_there_and_back(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    rows = [{"iteration": 0, "loss": 1.5}, {"iteration": 4, "loss": 1.25, "AP": 0.1}, {"iteration": 9, "AP": 0.2}]
    for row in rows:
        append_metrics(tmp_path, row)
    assert read_metrics(tmp_path) == rows
    truncate_metrics(tmp_path, 9)
    assert read_metrics(tmp_path) == rows[:2]
    truncate_metrics(tmp_path, 0)
    assert (tmp_path / "metrics.json").read_text() == ""


@pytest.mark.parametrize("cut", range(1, 28))
def test_a_row_cut_short_is_left_out(tmp_path: Path, cut: int) -> None:
    for iteration in range(3):
        append_metrics(tmp_path, {"iteration": iteration, "loss": 0.5})
    path = tmp_path / "metrics.json"
    path.write_bytes(path.read_bytes()[:-cut])
    rows = read_metrics(tmp_path)
    assert [row["iteration"] for row in rows] == ([0, 1, 2] if cut == 1 else [0, 1])
    truncate_metrics(tmp_path, len(rows))
    append_metrics(tmp_path, {"iteration": len(rows)})
    assert [row["iteration"] for row in read_metrics(tmp_path)] == list(range(len(rows) + 1))


def test_a_broken_line_in_the_middle_is_no_kill(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 0}\nbroken\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.json: line 2 is 'broken'"):
        read_metrics(tmp_path)


def test_results_hold_the_metrics(tmp_path: Path) -> None:
    write_results(tmp_path)
    assert not list(tmp_path.iterdir())
    append_metrics(tmp_path, {"iteration": 1, "total_loss": 2.5, "lr": 0.1})
    append_metrics(tmp_path, {"iteration": 1, "AP50": 0.25})  # of the same iteration
    append_metrics(tmp_path, {"iteration": 3, "total_loss": 2.0, "lr": 0.01})
    write_results(tmp_path)
    table = pd.read_csv(tmp_path / "results.csv")
    assert table["iteration"].tolist() == [1, 3]
    assert table["total_loss"].tolist() == [2.5, 2.0]
    assert table["AP50"].tolist()[0] == 0.25
    with Image.open(tmp_path / "results.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > picture.size[1] > 100


def test_a_class_with_loss_in_its_name_is_no_loss() -> None:
    columns = {"iteration": [0, 1], "total_loss": [2.0, 1.0], "per_class_AP50_11point/glossy": [0.5, 0.6]}
    figure = _plot(pd.DataFrame(columns), "run")
    assert [line.get_label() for axes in figure.axes for line in axes.get_lines()] == ["total_loss"]


def test_readers_see_whole_rows_while_another_process_writes(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from common.run_folder import append_metrics, truncate_metrics\n"
        "for i in range(300):\n"
        "    append_metrics(Path(sys.argv[1]), {'iteration': i})\n"
        "    truncate_metrics(Path(sys.argv[1]), i + 1)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    while writer.poll() is None:
        iterations = [row["iteration"] for row in read_metrics(tmp_path)]
        assert iterations == list(range(len(iterations)))
        time.sleep(0.001)
    assert writer.returncode == 0
    assert len(read_metrics(tmp_path)) == 300
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1]) == {"iteration": 299}


def test_every_session_is_kept_and_a_killed_one_has_no_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with record_session(tmp_path, data="birds"):
        (during,) = read_sessions(tmp_path)  # what a kill would leave
        assert during["seconds"] is None
    with pytest.raises(RuntimeError), record_session(tmp_path):
        raise RuntimeError
    first, second = read_sessions(tmp_path)
    assert first == {**during, "seconds": first["seconds"], "finished": True}
    assert 0 <= first["seconds"] < 60
    assert second["seconds"] is not None and not second["finished"]
    assert first["data"] == "birds"
    assert "data" not in second
    assert first["processes"] == 3
    assert first["versions"]["python"] == platform.python_version()
    assert re.search(r"\d+ cores, \d+ GB", first["machine"])


def test_broken_sessions_are_named(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"environment\.json: not a JSON list of sessions"):
        read_sessions(tmp_path)
