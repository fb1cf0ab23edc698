"""Ultralytics, which is no requirement of the project: fetched for as long as a benchmark runs, if the user agrees."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "8.4.0"
SHA256 = "aee243594368d1c9e2aac36e53d93a1da520f7b4223a62dfc54832d6d4bf627a"
MISSING = "ultralytics is not there, FETCH=1 fetches it"


def has_ultralytics() -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec("ultralytics") is not None


@contextmanager
def fetched_ultralytics(agreed: bool) -> Iterator[None]:
    """Makes ultralytics importable in the block: what is installed, else the pinned version, checked by its sha256.

    It is installed into a temporary folder, without its dependencies: the project has those that the network needs. On
    a terminal the user is asked; what cannot be fetched is left out, and pip says why.

    Args:
        agreed: the user has agreed already.
    """
    os.environ |= {"YOLO_CONFIG_DIR": tempfile.gettempdir(), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    if has_ultralytics() or not (agreed or _ask()):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"ultralytics=={VERSION} --hash=sha256:{SHA256}\n")
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--retries", "1"]
        pip = [sys.executable, "-m", "pip", "install", *options, "--target", folder, "--requirement", str(requirements)]
        if subprocess.run(pip, check=False).returncode == 0:
            sys.path.append(folder)
        yield


def _ask() -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"Fetch ultralytics {VERSION} (1 MB, AGPL-3.0) for these benchmarks? [y/N] ").strip().lower() == "y"
