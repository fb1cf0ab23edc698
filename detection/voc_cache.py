"""Arrays read from the files of a folder in VOC's layout, kept so that 16,551 files are read once."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from common.files import write_atomically

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def file_states(paths: list[str]) -> list[tuple[int, int] | OSError]:
    """Size and modification time of each file, by which a change is noticed; the error where they cannot be read."""
    states: list[tuple[int, int] | OSError] = []
    for path in paths:
        try:
            stat = os.stat(path)  # noqa: PTH116 - a Path for each of 16,551 files doubles the time
            states.append((stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            states.append(error)
    return states


def load_cache(dirname: Path, name: str, is_valid: Callable[[Arrays], bool]) -> Arrays | None:
    """The arrays that `save_cache` has kept under a name for a folder; None where there are none that are valid."""
    for path in _files(dirname, name):
        try:
            if not path.is_file():
                continue
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            if is_valid(arrays):
                return arrays
            logger.info("%s: a cache of another form, built anew", path)
        except Exception as error:  # whatever is wrong with it, the files themselves are there
            logger.info("%s: not a readable cache (%s), built anew", path, error)
    return None


def save_cache(dirname: Path, name: str, arrays: Arrays) -> None:
    """Keeps arrays in `dirname/.voc_cache/` or, where that cannot be written, in the user's cache folder."""
    for path in _files(dirname, name):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
            return
        except OSError as error:
            logger.info("%s: cannot be written (%s)", path, error.strerror)
    logger.warning("What was read of %s (%s) is not cached, and read again each time", dirname, name)


def _files(dirname: Path, name: str) -> Iterator[Path]:
    yield dirname / ".voc_cache" / f"{name}.npz"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield caches / "voc_annotations" / hashlib.sha256(os.fsencode(dirname.resolve())).hexdigest()[:16] / f"{name}.npz"
