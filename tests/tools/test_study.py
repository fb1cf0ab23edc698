"""The stages of study and demo: each is a command line that exists, runs once, and says what failed."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from tqdm import tqdm

from common import runtime
from common.data_root import SAMPLE
from common.errors import Interrupted, UserError
from common.run_folder import append_metrics
from tools import demo, study
from tools.plan import COMMANDS, Entry, Stage, list_stages, read_entries
from tools.study import check_data, devices, latest_loss, left_to_do, run_stages, run_together, start_stage


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output" / "logs").mkdir(parents=True)
    return tmp_path / "output"


def keep(output: Path, finished: dict[str, list[str]]) -> None:
    """Says that stages have come to their end with such arguments."""
    records = {name: {"arguments": arguments, "is_finished": True} for name, arguments in finished.items()}
    (output / study.STAGES).write_text(json.dumps(records))


def test_what_is_deleted_is_done_again_with_all_that_tells_of_it(tmp_path: Path, output: Path) -> None:
    runs = {name: Stage(name, [name], run=tmp_path / name, entry=name) for name in ("kept", "deleted")}
    told = {name: Stage(f"{name}-told", [name], needs=(name,), entry=f"{name}-told") for name in runs}
    stages = [*runs.values(), *told.values()]
    keep(output, {stage.name: stage.arguments for stage in stages})
    (tmp_path / "kept").mkdir()
    assert left_to_do(stages, output) == [runs["deleted"], told["deleted"]]


def test_what_began_from_a_run_that_is_trained_again_begins_anew(tmp_path: Path, output: Path) -> None:
    first = Stage("first", ["first"], run=tmp_path / "first")
    second = Stage("second", ["second"], run=tmp_path / "second", needs=("first",))
    keep(output, {stage.name: stage.arguments for stage in (first, second)})
    (tmp_path / "second").mkdir()
    with pytest.raises(UserError, match=f"{second.run}: began from first, which .*: delete this folder too"):
        left_to_do([first, second], output)
    (tmp_path / "second").rmdir()
    assert left_to_do([first, second], output) == [first, second]


def test_no_run_goes_on_as_another_one(tmp_path: Path, output: Path) -> None:
    """Resumed, a run keeps its recipe, so that another recipe would be told of and never trained."""
    before = Stage("run", ["train", "--recipe", "study"], run=tmp_path / "run")
    asked = Stage("run", ["train", "--recipe", "best"], run=tmp_path / "run")
    keep(output, {"run": before.arguments})
    assert left_to_do([asked], output) == [asked]  # its folder is gone
    (tmp_path / "run").mkdir()
    assert left_to_do([before], output) == []
    with pytest.raises(UserError, match=r"run: was begun as train --recipe study; asked for is train --recipe best"):
        left_to_do([asked], output)


def test_begun_run_is_resumed_but_for_a_sweep_which_goes_on_by_itself(tmp_path: Path, output: Path) -> None:
    """What is run tells its arguments: Python's own `compileall` refuses an option that it does not know."""
    (tmp_path / "run").mkdir()
    for name, resumes, run in (("begun", True, "run"), ("sweep", False, "run"), ("new", True, "nothing")):
        stage = Stage(name, ["compileall", "-q", str(output)], run=tmp_path / run, resumes=resumes)
        code = start_stage(stage, output).process.wait()
        printed = (output / "logs" / f"{name}.txt").read_text()
        assert (code, "unrecognized arguments: --resume" in printed) == ((2, True) if name == "begun" else (0, False))


def test_the_loss_shown_is_the_newest_of_the_running_stage(tmp_path: Path) -> None:
    for name, rows in {
        "first": [{"train_loss": 4.0}],
        "second/trial": [{"total_loss": 3.0}, {"total_loss": 2.0}, {"AP50": 0.5}],
    }.items():
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
    told = Stage("told", ["venv", "--without-pip", str(tmp_path / "told")], 1, needs=("first", "fails"))
    keep(output, {"first": first.arguments, "second": ["other arguments"]})
    with pytest.raises(UserError, match=r"2 of 5 stages are missing: fails, told; .*the same command again"):
        run_stages([first, second, fails, told, third], output)
    assert [mark.exists() for mark in marks] == [False, True, True]
    records = json.loads((output / study.STAGES).read_text())
    assert records == {
        stage.name: {"arguments": stage.arguments, "is_finished": stage is not fails}
        for stage in (first, second, fails, third)
    }
    log = output / "logs" / "fails.txt"
    reason = log.read_text().strip().splitlines()[-1].removeprefix("error: ")
    printed = capsys.readouterr().out
    assert f"[ 3/5] {log}: fails failed: {reason}" in printed
    assert "[ 4/5] told is left out, since it needs fails\n" in printed
    assert not (tmp_path / "told").exists()
    assert "no-such-option" in reason
    assert (output / "report" / "index.html").exists()


def test_as_many_at_once_as_there_are_gpus_and_one_on_each(tmp_path: Path, output: Path) -> None:
    """Each waits until two have begun, and says which GPU it saw, when it began and when it ended."""
    lines = [
        "import os, time, pathlib",
        f"pathlib.Path({str(tmp_path / 'begun')!r}, str(os.getpid())).touch()",
        "start = time.time()",
        f"while len(os.listdir({str(tmp_path / 'begun')!r})) < 2 and time.time() < start + 60: time.sleep(0.02)",
        "print(os.environ['CUDA_VISIBLE_DEVICES'], start, time.time())",
    ]
    (tmp_path / "begun").mkdir()
    stages = [Stage(str(number), ["timeit", "-n1", "-r1", *lines]) for number in range(5)]
    ended = list(run_together(stages, output, ["3", "5"], tqdm(disable=True)))
    assert sorted(work.stage.name for work in ended) == ["0", "1", "2", "3", "4"]
    times: dict[str, list[tuple[float, float]]] = {"3": [], "5": []}
    for work in ended:
        gpu, begun, end = work.log.read_text().split()[:3]
        times[gpu].append((float(begun), float(end)))
    for of_gpu in times.values():
        of_gpu.sort()
        assert all(end <= begun for (_, end), (begun, _) in pairwise(of_gpu))
    (first, first_end), (second, second_end) = times["3"][0], times["5"][0]
    assert first < second_end
    assert second < first_end


def test_an_interrupt_ends_the_study_and_the_stage_is_not_finished(output: Path) -> None:
    """The exit code that every command line of the project has after Ctrl-C."""
    stages = [Stage("first", ["timeit", "import os; os._exit(130)"], 1), Stage("second", ["timeit", "-n1"], 1)]
    with pytest.raises(Interrupted, match=str(output)):
        run_stages(stages, output)
    assert not json.loads((output / study.STAGES).read_text())["first"]["is_finished"]
    assert not (output / "logs" / "second.txt").exists()


def test_gpus_are_shared_out_only_where_a_run_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "gpu_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NGPU", raising=False)
    assert devices() == [""]  # each takes all three
    monkeypatch.setenv("NGPU", "1")
    assert devices() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert devices() == ["4", "6", "7"]
    monkeypatch.setenv("NGPU", "3")
    assert devices() == [""]


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


def test_only_what_the_list_needs_is_missed_and_folders_of_ones_own_are_data(tmp_path: Path) -> None:
    birds, boxes = Entry("birds", "finetune"), Entry("boxes", "train-frcnn")
    elsewhere = Entry("elsewhere", "train-yolov3", data="elsewhere")
    for entries, missing in (([birds, elsewhere], "no CUB_200_2011"), ([boxes], "no VOC2007, no VOC2012")):
        with pytest.raises(UserError, match=f": {missing} in it; "):
            check_data(entries, tmp_path)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    check_data([boxes, elsewhere], tmp_path)
    with pytest.raises(UserError, match=": no CUB_200_2011 in it; "):
        check_data([birds, boxes], tmp_path)
    (tmp_path / "CUB_200_2011").mkdir()
    check_data([birds, boxes], tmp_path)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("finetune", "{}/1.jpg"),
        ("finetune", "train/{}/1.jpg"),
        ("sweep", "{}/1.jpg"),
        ("train-frcnn", "{}.xml"),
        ("train-frcnn", "train/{}.xml"),
        ("train-yolov3", "Annotations/{}.xml"),
    ],
)
def test_whatever_folder_of_ones_own_a_training_takes_a_study_takes(tmp_path: Path, command: str, file: str) -> None:
    """One tree of birds, or train/; annotations beside the pictures, in the folders of splits, or without any list."""
    for name in ("auk", "wren"):
        (tmp_path / file.format(name)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.format(name)).touch()
    check_data([Entry("name", command)], tmp_path)
    other = "train-frcnn" if COMMANDS[command].is_of_birds else "finetune"
    if not file.startswith("train/"):  # which both halves may hold
        with pytest.raises(UserError, match=r" in it; expected (CUB_200_2011|VOC2007, VOC2012): "):
            check_data([Entry("name", command), Entry("other", other)], tmp_path)


def test_the_plan_says_what_is_finished_and_what_has_begun_how_long_the_rest_takes_and_runs_nothing(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps of the trainings have been timed before: an hour each and 2 GB; 500 test images, 0.1 s each."""
    for name in ("CUB_200_2011", "VOC2007", "VOC2012"):
        (tmp_path / name).mkdir()
    stages = list_stages(read_entries(study.STUDIES / "study.yaml"), output, tmp_path, fallback="study")
    timed = {"seconds": 3600, "size": 2e9, "test_images": 500, "test_seconds": 0.1}
    estimates = {" ".join(stage.arguments): timed for stage in stages if stage.run}
    (output / study.ESTIMATES).write_text(json.dumps(estimates))
    keep(output, {stages[0].name: stages[0].arguments})
    for name in ("sweep-seed0", "faster_rcnn-seed0"):
        (output / name).mkdir()
    before = {path: path.stat().st_mtime for path in output.rglob("*")}
    study.main(["--data", str(tmp_path), "--output", str(output), "--plan"])
    printed = capsys.readouterr().out
    lines = [line.partition("] ")[2].partition(": ") for line in printed.splitlines() if line.startswith("[")]
    states = {name: rest for name, _, rest in lines}
    hour = "1 h 0 min"
    assert states.pop("sweep-seed0") == f"finished, {hour}"
    assert states.pop("faster_rcnn-seed0") == f"to go on, {hour}"
    assert states.pop("yolov3-evaluated-seed0") == f"to do, 1 min {study.STARTING - 10} s"  # 500 images
    assert states.pop("errors") == f"to do, {study.STARTING + 20} s"  # 100 images, two detectors
    assert len(states) == 6
    # Four trainings that are not finished, three evaluations of 500 images, 100 images once and twice.
    left = 4 * 3600 + 3 * 50 + 10 + 20 + 9 * study.STARTING
    assert f"About {left // 3600} h {left % 3600 // 60} min to go, and 10.0 GB of disk" in printed
    assert "Left out for want of photographs from outside: comparison" in printed
    assert {path: path.stat().st_mtime for path in output.rglob("*")} == before


def test_the_demo_is_the_same_list_on_the_sample() -> None:
    names = {name: [entry.name for entry in read_entries(study.STUDIES / f"{name}.yaml")] for name in ("study", "demo")}
    assert [name for name in names["study"] if name != "alexnet"] == names["demo"][1:]


def test_the_demo_ends_with_the_figures_of_its_own_runs(tmp_path: Path) -> None:
    for stage in list_stages(read_entries(study.STUDIES / "demo.yaml"), tmp_path, SAMPLE):
        if "detection.train_net" in stage.arguments and stage.run:
            (stage.run / "evaluation").mkdir(parents=True)
            (stage.run / "evaluation" / "evaluation.json").write_text(json.dumps({"AP50_11point": 0.125}))
        elif "pretraining" in stage.arguments:
            assert f"weights={tmp_path}/other-birds-seed0/model_best.pth" in stage.arguments
            for start, top1 in (("pretrained", 70.25), ("random", 30.5)):
                (stage.run / start).mkdir(parents=True)
                (stage.run / start / "result.json").write_text(json.dumps({"top1": top1}))
    text = demo.summary(tmp_path)
    assert text.count("0.125 mAP") == 2
    assert "pretrained: 70.2 % top-1" in text
    assert "random: 30.5 % top-1" in text
