"""Ctrl-C in one and in two processes, and two machines that share no disk: every run ends as the undisturbed one."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.conftest import end_well
from tests.detection.runs import NAME, assert_same, wait_for_rows
from tests.processes import free_port


def assert_interrupted(run: Path, outcome: tuple[int, str]) -> None:
    """Exit code 130, one line that says how to go on, and a checkpoint of the iteration that it names."""
    code, printed = outcome
    assert code == 130, printed
    assert "Traceback" not in printed
    assert "error" not in printed.lower()
    said = re.findall(r"interrupted: (.*) is saved after iteration (\d+); RESUME=1 goes on from there\n", printed)
    assert [folder for folder, _ in said] == [str(run)]
    assert len([line for line in printed.splitlines() if line.startswith("interrupted")]) == 1
    iteration = torch.load(run / "model_last.pth", weights_only=True)["trainer"]["iteration"]
    assert iteration + 1 == int(said[0][1]) < 12
    assert not list(run.glob(".*"))


def start_nodes(detector, tmp_path: Path, output: str, *words: str) -> list:
    """One process on each of two machines, as the launcher would start it; they share no disk but the data's."""
    port = str(free_port())
    processes = []
    for rank in (0, 1):
        folder = tmp_path / f"machine {rank}"
        folder.mkdir(exist_ok=True)
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        arguments = ("detection.train_net", "--output", f"{output} {rank}", *words)
        processes.append(detector.server.start(*arguments, folder=folder, **variables))
    return processes


def train_words(detector) -> list[str]:
    return ["--data", str(detector.data), "--pretrained", "0", *detector.opts]


@pytest.fixture(scope="module")
def trained_by_two(detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two")
    end_well(start_nodes(detector, folder, "runs", *train_words(detector)))
    assert not list((folder / "machine 1").iterdir())  # the first alone writes
    return folder / "machine 0" / "runs 0" / NAME


def test_ctrl_c_in_one_process(detector, trained: Path) -> None:
    run = detector.output / "interrupted" / NAME
    process = detector.server.start(*detector.arguments("interrupted"))
    wait_for_rows(run)
    os.kill(process.number, signal.SIGINT)
    outcome = process.end()
    assert_interrupted(run, outcome)
    assert "Stopping after this step, with a checkpoint, Ctrl-C again ends at once" in outcome[1]
    code, printed = detector.later("interrupted", "--resume")
    assert code == 0, printed
    assert_same(run, trained)


def test_ctrl_c_with_a_loading_process(detector, trained: Path) -> None:
    run = detector.output / "interrupted loader" / NAME
    process = detector.server.start(*detector.arguments(run.parent.name, opts=("DATALOADER.NUM_WORKERS", "1")))
    wait_for_rows(run)
    os.killpg(process.number, signal.SIGINT)  # as a terminal does: the loading process gets it too
    assert_interrupted(run, process.end())
    code, printed = detector.later(run.parent.name, "--resume", opts=("DATALOADER.NUM_WORKERS", "0"))
    assert code == 0, printed
    assert_same(run, trained)


@pytest.mark.parametrize("receiver", ["group", "launcher"])
def test_ctrl_c_in_two_processes(detector, trained_by_two: Path, receiver: str) -> None:
    run = detector.output / f"interrupted {receiver}" / NAME
    process = detector.server.start(*detector.arguments(run.parent.name), NGPU="2")
    wait_for_rows(run)
    (os.killpg if receiver == "group" else os.kill)(process.number, signal.SIGINT)
    assert_interrupted(run, process.end())
    end_well(start_nodes(detector, run.parent, "runs", "--output", str(run.parent), "--resume"))
    assert_same(run, trained_by_two)


def test_machines_without_a_shared_disk_resume(detector, trained_by_two: Path, tmp_path: Path) -> None:
    """The second has no checkpoint, no configuration and no folder of the run."""
    run = tmp_path / "machine 0" / "runs 0" / NAME
    processes = start_nodes(detector, tmp_path, "runs", *train_words(detector))
    wait_for_rows(run)
    os.kill(processes[0].number, signal.SIGINT)  # Ctrl-C on the first machine
    (code, printed), (other_code, other_printed) = [process.end() for process in processes]
    assert code == 130, printed
    assert "runs 0/faster_rcnn_R_50_FPN is saved after iteration" in printed
    assert other_code == 2
    assert "another process has ended" in other_printed
    assert "Traceback" not in other_printed

    end_well(start_nodes(detector, tmp_path, "runs", "--resume"))
    assert_same(run, trained_by_two)
    assert not list((tmp_path / "machine 1").iterdir())


def test_mistakes_of_two_processes_are_one_line(detector, tmp_path: Path) -> None:
    words = [*train_words(detector), "SOLVER.IMS_PER_BATCH", "3"]
    outcomes = [process.end() for process in start_nodes(detector, tmp_path, "runs", *words)]
    assert [code for code, _ in outcomes] == [2, 2]
    assert "SOLVER.IMS_PER_BATCH 3: expected a multiple of the 2 processes" in outcomes[0][1].splitlines()[-1]
    assert all("Traceback" not in printed for _, printed in outcomes)
    assert not (tmp_path / "machine 0" / "runs 0").exists()
