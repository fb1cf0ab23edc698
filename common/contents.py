"""What a file may hold at most, and what it often holds in place of what was asked for."""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError

MAX_PIXELS = 178_956_970  # of a picture, three bytes each; of an animation the first frame alone is decoded
MAX_UPLOADED_PIXELS = 64_000_000  # a page holds several pictures at a time
MAX_UPLOADED_BYTES = 100_000_000
MAX_QUEUE = 16  # photographs that wait for a page's models
MAX_JSON_BYTES = 2**30  # becomes some ten times as much in memory


def stand_in(path: Path) -> str | None:
    """What a file is that a download has left in place of what was asked for; None where it is none of these."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, expected the file that its link leads to: fetch that"
    return None


def read_json(path: Path, expected: str) -> Any:
    """Reads a JSON file of another program.

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
