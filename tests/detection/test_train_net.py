"""Whole runs of `python -m tools.launch detection.train_net`, on the tiny folder and network of conftest.py."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
NAME = "faster_rcnn_R_50_FPN"

# Imports once what takes seconds, then forks for every command line it reads: a real process, started at once.
# Answers with the process id and, when that has ended, with its exit code (-9 is SIGKILL).
FORK_SERVER = """
import json, os, resource, runpy, sys
import torch
import detection.evaluation, detection.hooks, detection.modeling, detection.voc
import matplotlib.figure, pandas, tqdm.contrib.logging
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        torch.seed()  # as another process would have it
        sys.argv = ["launch", "detection.train_net", *job["arguments"]]
        os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        code = 1
        try:
            runpy.run_module("tools.launch", run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NGPU", "NNODES", "DEBUG")}
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


class Trainings:
    """Runs the trainer's command line, each time in a process of its own."""

    def __init__(self, folder: Path, data: Path, opts: list[str]) -> None:
        self.folder = folder
        self.data = data
        self.opts = opts
        self.server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def arguments(self, output: str, *flags: str, opts: tuple[str, ...] = ()) -> list[str]:
        """The command line of a run into the folder `output`; flags and options given later count."""
        words = ["--data", str(self.data), "--pretrained", "0", "--output", str(self.folder / output)]
        return [*words, *flags, *self.opts, *opts]

    def start(self, arguments: list[str], largest_file: int = 0) -> int:
        """Starts one and returns its process id; `end` must follow."""
        self.log = self.folder / "printed.txt"
        self.log.write_text("")
        job = {"arguments": arguments, "log": str(self.log), "largest_file": largest_file}
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def end(self) -> tuple[int, str]:
        """Waits for it; returns its exit code and what it printed."""
        return int(self.server.stdout.readline()), self.log.read_text()

    def __call__(self, output: str, *flags: str, opts: tuple[str, ...] = (), largest_file: int = 0) -> tuple[int, str]:
        """Runs one from start to end."""
        self.start(self.arguments(output, *flags, opts=opts), largest_file)
        return self.end()


@pytest.fixture(scope="module")
def trainings(voc_folder: Path, tiny_opts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    trainings = Trainings(tmp_path_factory.mktemp("trainings"), voc_folder, tiny_opts)
    yield trainings
    trainings.server.stdin.close()
    trainings.server.wait()


@pytest.fixture(scope="module")
def finished(trainings: Trainings) -> Path:
    """The run folder of a training that nothing disturbed."""
    code, printed = trainings("undisturbed")
    assert code == 0, printed
    return trainings.folder / "undisturbed" / NAME


def rows(run: Path) -> list[dict]:
    """Rows of metrics.json without the times."""
    lines = (run / "metrics.json").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "time" not in key} for line in lines]


def assert_one_line(outcome: tuple[int, str], *expected: str) -> None:
    code, printed = outcome
    assert code == 2, printed
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert printed.endswith(f"{errors[0]}\n")
    for text in expected:
        assert text in errors[0]


def test_run_folder_is_complete(finished: Path) -> None:
    # 12 iterations: a row every 3, at each evaluation (every 5) and at the end.
    assert [row["iteration"] for row in rows(finished)] == [2, 4, 5, 8, 9, 11]
    evaluated = [row["iteration"] for row in rows(finished) if "AP50_11point" in row]
    assert evaluated == [4, 9, 11]
    assert all("validation_loss" in row for row in rows(finished) if row["iteration"] in evaluated)
    # 10 images, 4 an iteration.
    assert [row["epoch"] for row in rows(finished)] == pytest.approx([1.2, 2.0, 2.4, 3.6, 4.0, 4.8])

    files = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "log.txt",
        "metrics.json",
        "results.csv",
        "results.png",
        "model_best.pth",
        "model_last.pth",
    } <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.startswith(".") for name in files)
    table = pd.read_csv(finished / "results.csv")
    assert table["total_loss"].tolist() == pytest.approx([row["total_loss"] for row in rows(finished)], rel=1e-5)
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["SOLVER"]["MAX_ITER"] == 12
    assert config["MODEL"]["CLASSES"] == ["red", "blue"]
    assert "iter 12/12" in (finished / "log.txt").read_text()


def test_losses_fall(finished: Path) -> None:
    losses = [row["total_loss"] for row in rows(finished)]
    assert losses[-1] < losses[0]


def test_killed_and_resumed_run_is_the_same_run(trainings: Trainings, finished: Path) -> None:
    """SIGKILL anywhere: rows, losses and weights are those of the run never killed, bit by bit."""
    rng = random.Random(0)
    run = trainings.folder / "killed" / NAME
    flags: tuple[str, ...] = ()
    for number_of_rows in (1, 3, 5):
        process = trainings.start(trainings.arguments("killed", *flags))
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            metrics = run / "metrics.json"
            if metrics.exists() and len(metrics.read_text().splitlines()) >= number_of_rows:
                break
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        os.kill(process, signal.SIGKILL)
        assert trainings.end()[0] in (-signal.SIGKILL, 0)
        flags = ("--resume",)
    (run / ".model_last.pth.abc.unfinished").write_text("what a kill leaves")
    code, printed = trainings("killed", "--resume")
    assert code == 0, printed

    assert rows(run) == rows(finished)
    for name in ("model_last.pth", "model_best.pth"):
        expected = torch.load(finished / name, weights_only=True)
        resumed = torch.load(run / name, weights_only=True)
        assert expected["model"].keys() == resumed["model"].keys()
        assert all(torch.equal(value, resumed["model"][key]) for key, value in expected["model"].items())
    assert not list(run.glob(".*"))


def test_second_run_has_its_own_folder_and_a_complete_one_is_left_alone(trainings: Trainings, finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.suffix in (".json", ".pth")}
    assert trainings("undisturbed", opts=("SOLVER.MAX_ITER", "1", "TEST.VALIDATION_LOSS_IMAGES", "0"))[0] == 0
    second = finished.with_name(f"{NAME}-2")
    assert [row["iteration"] for row in rows(second)] == [0]
    shutil.rmtree(second)
    code, printed = trainings("undisturbed", "--resume")
    assert code == 0
    assert "is complete after iteration 12" in printed
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_study_stops_early(trainings: Trainings) -> None:
    # Patience is 1: the second evaluation that does not rise ends the run.
    opts = ("TEST.EVAL_PERIOD", "2", "TEST.MIN_RISE", "2")
    code, printed = trainings("study", "--recipe", "study", opts=opts)
    assert code == 0, printed
    run = trainings.folder / "study" / f"{NAME}_study"
    assert rows(run)[-1]["iteration"] == 3
    assert "Stopping early" in printed
    # A resume finds the run, and in it the data.
    trainings.start(["--recipe", "study", "--output", str(run.parent), "--resume"])
    code, printed = trainings.end()
    assert code == 0, printed
    assert "stopped early after iteration 4" in printed


def test_evaluation_alone_gives_the_figures_of_the_training(trainings: Trainings, finished: Path) -> None:
    code, printed = trainings("undisturbed", "--eval-only")
    assert code == 0, printed
    figures = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    best = max((row for row in rows(finished) if "AP" in row), key=lambda row: row["AP50_11point"])
    for key in ("AP50_11point", "AP50", "AP75", "AP"):
        assert figures[key] == pytest.approx(best[key], abs=1e-9)
    assert "| red " in printed


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes(trainings: Trainings, voc_folder: Path, nodes: int) -> None:
    """Two gloo processes, on one machine or as two machines on loopback, train one run."""
    output = f"{nodes}-nodes"
    opts = ("SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "0", "SOLVER.EMA_DECAY", "0.0")
    variables = {"NGPU": str(2 // nodes)}
    if nodes == 2:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        variables |= {"NNODES": "2", "DIST_URL": url}
    command = [sys.executable, "-m", "tools.launch", "detection.train_net", *trainings.arguments(output, opts=opts)]
    launches = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables, NODE_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(nodes)
    ]
    printed = [launch.communicate(timeout=200)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0] * nodes, "\n".join(printed)

    folders = list((trainings.folder / output).iterdir())
    assert [folder.name for folder in folders] == [NAME]
    trained = rows(folders[0])
    assert [row["iteration"] for row in trained] == [2, 3]
    assert yaml.safe_load((folders[0] / "config.yaml").read_text())["SOLVER"]["REFERENCE_WORLD_SIZE"] == 2

    # What the two processes measured together is what one process measures: images, BatchNorm and all.
    code, alone = trainings(output, "--eval-only")
    assert code == 0, alone
    figures = json.loads((folders[0] / "evaluation" / "evaluation.json").read_text())
    assert figures["AP"] == pytest.approx(trained[-1]["AP"], abs=1e-9)
    detections = [
        json.loads((folder / "detections.json").read_text()) for folder in (folders[0], folders[0] / "evaluation")
    ]
    assert sorted(d["score"] for d in detections[0]) == pytest.approx(sorted(d["score"] for d in detections[1]))


@pytest.mark.parametrize(
    ("flags", "opts", "expected"),
    [
        (("--data", "nowhere"), (), ("nowhere: no such folder",)),
        ((), ("SOLVER.BASE_LR",), ("OPTS", "pairs of KEY VALUE")),
        ((), ("SOLVER.BASE_LRR", "1"), ("OPTS: SOLVER.BASE_LRR", "Non-existent")),
        ((), ("SOLVER.MAX_ITER", "many"), ("OPTS: SOLVER.MAX_ITER many", "Type mismatch")),
        ((), ("DATASETS.TRAIN", "('voc07_train',)"), ("DATASETS.TRAIN", "voc07_train", "voc_trainval")),
        ((), ("INPUT.AUGMENTATIONS", "['Mixup']"), ("INPUT.AUGMENTATIONS", "Mixup", "RandomHorizontalFlip")),
        (("--weights", "nowhere.pth"), (), ("nowhere.pth: no such weights file",)),
        (("--output", f"{__file__}/runs"), (), ("test_train_net.py", "Not a directory")),
        (("--output", "nothing trained", "--eval-only"), (), ("nothing trained", "WEIGHTS=path")),
        (("--output", "nothing trained", "--resume"), (), ("nothing trained", "no run to resume")),
        ((), ("SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0"), ("is infinite or no number", "BASE_LR")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_mistakes_end_in_one_line(
    trainings: Trainings, flags: tuple[str, ...], opts: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert_one_line(trainings("mistakes", *flags, opts=opts), *expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_image_ends_in_one_line(trainings: Trainings, voc_folder: Path, tmp_path: Path, workers: int) -> None:
    """In a worker of the data loader as well, where the error crosses a process."""
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    image = data / "JPEGImages" / "trainval_3.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    outcome = trainings("truncated", "--data", str(data), opts=("DATALOADER.NUM_WORKERS", str(workers)))
    assert_one_line(outcome, f"{image}: cannot be read as an image", "truncated")


def test_other_classes_end_in_one_line(trainings: Trainings, finished: Path, voc_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    (data / "labels.txt").write_text("red\ngreen\nblue\n")
    best = str(finished / "model_best.pth")
    outcome = trainings("undisturbed", "--eval-only", "--weights", best, "--data", str(data))
    assert_one_line(outcome, best, "2 classes (red, blue", str(data), "3 (red, green, blue")

    # A trained detector may start the training of another one; only the layers that predict classes start anew.
    opts = ("SOLVER.MAX_ITER", "1", "TEST.VALIDATION_LOSS_IMAGES", "0")
    code, printed = trainings("other", "--weights", best, "--data", str(data), opts=opts)
    assert code == 0, printed
    assert "random, since the classes are others" in printed


def test_full_disk_keeps_the_last_checkpoint(trainings: Trainings, finished: Path) -> None:
    run = trainings.folder / "full disk" / NAME
    shutil.copytree(finished, run)
    before = (run / "model_last.pth").read_bytes()
    opts = ("SOLVER.MAX_ITER", "16")
    outcome = trainings("full disk", "--resume", opts=opts, largest_file=len(before) // 2)
    assert_one_line(outcome, f"{run / 'model_last.pth'}: File too large")
    assert (run / "model_last.pth").read_bytes() == before
    assert not list(run.glob(".*"))

    code, printed = trainings("full disk", "--resume", opts=opts)  # with space again
    assert code == 0, printed
    assert rows(run)[-1]["iteration"] == 15
