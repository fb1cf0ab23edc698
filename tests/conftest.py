"""Fixtures shared by all tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pretended_gpu.waits import PretendedGpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real photographs and weights beside the checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"real photographs and weights are missing: no folder {folder.name}/ beside the checkout")
    return folder


@pytest.fixture
def gpu() -> "Iterator[PretendedGpu]":
    """A GPU with real values on a machine that has none, which writes down what it is waited for."""
    from tests.pretended_gpu import pretended_gpu  # registers a device with torch: only for those who use it

    with pretended_gpu() as gpu:
        yield gpu
