"""What the tests of whole runs look at in the folders of runs and in what was printed."""

import time
from pathlib import Path

import torch

from common.run_folder import read_metrics

NAME = "faster_rcnn_R_50_FPN"


def rows(run: Path) -> list[dict]:
    """Rows of metrics.json without the times."""
    return [{key: value for key, value in row.items() if "time" not in key} for row in read_metrics(run)]


def assert_same(run: Path, expected: Path) -> None:
    """The rows, and the weights of both checkpoints, are those of the other run, bit by bit."""
    assert rows(run) == rows(expected)
    for name in ("model_last.pth", "model_best.pth"):
        one, two = (torch.load(folder / name, weights_only=True)["model"] for folder in (run, expected))
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())


def wait_for_rows(run: Path, count: int = 1) -> None:
    """Waits until a run in another process has written so many rows."""
    deadline = time.monotonic() + 200
    metrics = run / "metrics.json"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_one_line(outcome: tuple[int, str], *expected: str) -> None:
    """A command line ended with exit code 2, its last line an error that says all of `expected`, no other before it."""
    code, printed = outcome
    assert code == 2, printed
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if "error: " in line]
    assert errors == printed.splitlines()[-1:]
    assert errors[0].startswith("error: ")
    for text in expected:
        assert text in errors[0]
