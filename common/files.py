"""Files written whole or not at all, and files of others read within limits."""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_PIXELS = 178_956_970  # of a picture, three bytes each; of an animation the first frame alone is decoded
MAX_JSON_BYTES = 2**30  # becomes some ten times as much in memory


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], outlasts_power_cut: bool = True) -> None:
    """Calls `write` with a file beside `path` and renames it to `path` once it is whole.

    Args:
        path: the file.
        write: writes its contents.
        outlasts_power_cut: waits until it is on disk, which takes milliseconds.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.unfinished")  # however long the name of the file is
    try:
        with _named(path), temporary.open("xb") as file:
            write(file)
            if outlasts_power_cut:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: object) -> None:
    """Writes JSON, as `write_atomically` does."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_table(path: Path, table: "pd.DataFrame", **options: Any) -> None:
    """Writes a table as CSV, as `write_atomically` does; `options` are those of `DataFrame.to_csv`."""
    write_atomically(path, lambda file: table.to_csv(file, **options))


def write_figure(path: Path, figure: "Figure", dpi: int = 110) -> None:
    """Writes a figure of matplotlib as PNG, as `write_atomically` does."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def append_line(path: Path, line: str) -> None:
    """Appends a line to a text file and waits until it is on disk.

    Raises:
        OSError: it cannot be written.
    """
    with _named(path), path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, expected: str) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        expected: what it should hold, for the message.

    Raises:
        UserError: it is missing, too large, too deep, or no JSON in UTF-8.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path}: has more than {MAX_JSON_BYTES:,} bytes; expected {expected}: part it")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {expected}") from error
    except RecursionError as error:
        raise UserError(f"{path}: lists within lists without end; expected {expected}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file ({error}); expected {expected}") from error


def wrong_download(path: Path) -> str | None:
    """What a file really is if a download has left a web page or a Git LFS pointer in its place; else None."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, expected the file that its link leads to: fetch that"
    return None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Gives the name of the file to an `OSError` of writing, which has none: a full disk, say."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own on top of it.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from error
