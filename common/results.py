"""Files that a command makes from a user's files: named after them, all different, and never overwriting them."""

import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from tqdm import tqdm

from common.errors import UserError
from common.files import read_json, write_json

MANIFEST = ".results.json"
LONGEST_NAME = 200  # bytes; file systems take 255, and suffixes follow


def unique_names(paths: Sequence[Path], videos: Collection[Path] = ()) -> list[str]:
    """A name for each file: its stem, or, where another file has that, the stem with a number that no file has.

    Names differ by more than the case of their letters, since some file systems do not tell cases apart.

    Args:
        paths: the files.
        videos: those of them whose frames are named `NAME_000000`, `NAME_000001`, ...: no other name is such a one.
    """
    readable = [os.fsencode(path.stem).decode(errors="replace") for path in paths]
    stems = [stem.encode()[:LONGEST_NAME].decode(errors="ignore") for stem in readable]
    of_videos = [re.escape(stem) for path, stem in zip(paths, stems, strict=True) if path in videos]
    frame = re.compile(rf"({'|'.join(of_videos)})(-\d+)?_\d+", re.IGNORECASE) if of_videos else None
    stems_of_all, taken = {stem.casefold() for stem in stems}, set[str]()
    names = []
    for stem in stems:
        name, number = stem, 1
        is_free = not (frame and frame.fullmatch(stem))
        while not is_free or name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
            is_free = name.casefold() not in stems_of_all
        taken.add(name.casefold())
        names.append(name)
    return names


def reserve_results(folder: Path, files: Sequence[str], inputs: Sequence[Path]) -> None:
    """Makes the folder of results, and remembers there in `.results.json` which files are results.

    Args:
        folder: of the results; it may hold those of earlier calls, which will be overwritten.
        files: what is going to be written, relative to the folder.
        inputs: what is read.

    Raises:
        UserError: one of the files is an input, or is there and is no result of an earlier call; or the folder cannot
            be one. Nothing has been written then.
    """
    manifest = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder for results: name another one with OUT=")
    results = set(read_json(manifest, "a list of names: delete the file")) if manifest.is_file() else set()
    read = {path.resolve() for path in inputs}
    for name in files:
        path = folder / name
        if path.exists() and (name not in results or path.resolve() in read):
            reason = "is one of the files to read" if path.resolve() in read else "is there, and is none of our results"
            raise UserError(f"{path}: {reason}; it is not overwritten: name another folder for results with OUT=")
    for parent in {folder, *((folder / name).parent for name in files)}:
        parent.mkdir(parents=True, exist_ok=True)
    write_json(manifest, sorted(results.union(files)))


class LeftOut:
    """Files that cannot be read: each is named in a line above the progress bar, and in the end they are an error.

    Args:
        files: how many there are, readable or not.
        progress: the bar.
    """

    def __init__(self, files: int, progress: tqdm) -> None:
        self.files, self.progress, self.count = files, progress, 0

    def __call__(self, error: UserError) -> None:
        """Names one."""
        self.count += 1
        self.warn(f"{error}; left out")

    def warn(self, text: str) -> None:
        """Says something else of a file."""
        self.progress.write(f"warning: {text}", file=sys.stderr)

    def raise_if_all(self) -> None:
        """Call it before anything is written that would look like a result.

        Raises:
            UserError: no file could be read.
        """
        if self.count == self.files:
            raise UserError(f"none of the {self.files} files could be read; expected photographs or videos")

    def raise_if_any(self) -> None:
        """Call it at the very end, so that the exit code tells.

        Raises:
            UserError: a file could not be read.
        """
        if self.count:
            raise UserError(
                f"{self.count} of {self.files} files could not be read, see the warnings; the others are done"
            )
