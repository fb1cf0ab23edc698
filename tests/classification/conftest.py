"""A tiny data set in CUB's layout, and command lines called in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.birds import draw_birds


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    """Data root with 5 classes x (6 training + 2 test) pictures, for a test to spoil."""
    return draw_birds(tmp_path / "data")


@pytest.fixture(scope="session")
def kept_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for tests that leave it as it is."""
    return draw_birds(tmp_path_factory.mktemp("birds"))


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Calls a command line's main and returns its exit code, output and errors."""

    def run(main: Callable, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run
