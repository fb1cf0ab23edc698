"""Files are whole or as they were, whatever happens while they are written."""

import errno
import os
from pathlib import Path

import pytest

from common.files import write_atomically
from common.run_folder import append_metrics


def test_write_atomically_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []

    def write(file) -> None:
        file.write(b"ne")
        file.flush()
        seen.append(path.read_bytes())
        file.write(b"w")

    write_atomically(path, write)
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, lambda file: 1 / 0)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_named(tmp_path: Path, wrapped: bool) -> None:
    """An error of writing has no file name, and torch.save puts an error of its own over it."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")

    def write(file) -> None:
        try:
            with full.open("wb", buffering=0) as device:
                device.write(b"x")
        except OSError as error:
            if wrapped:
                raise RuntimeError("unexpected position") from error
            raise

    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(tmp_path / "model.pth", write)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "model.pth"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "metrics.json").symlink_to(full)
    with pytest.raises(OSError, match="No space left") as error:
        append_metrics(tmp_path, {"iteration": 1})
    assert error.value.filename == str(tmp_path / "metrics.json")
