"""The pictures of a folder in VOC's layout: their headers, cached, held against their annotations."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.images import Header, read_headers
from detection.voc_cache import Arrays, file_states, load_cache, save_cache

HEADER = np.dtype([("file_size", "i8"), ("mtime_ns", "i8"), ("height", "i8"), ("width", "i8"), ("orientation", "i8")])


def cached_headers(dirname: Path, split: str, files: Sequence[str]) -> list[Header | str]:
    """The header of each picture of a split, or why it cannot be read; unchanged files come from the cache.

    Args:
        dirname: the folder in VOC's layout.
        split: that the pictures belong to.
        files: the pictures, below `dirname`.
    """
    names = [file.removeprefix(f"{dirname}{os.sep}") for file in files]
    keys = list(zip(names, file_states(list(files)), strict=True))
    arrays = load_cache(dirname, f"{split}-headers", _is_valid)
    known: dict[tuple, Header | str] = dict(_rows(arrays) if arrays else ())
    new = [(file, key) for file, key in zip(files, keys, strict=True) if key not in known]
    found = read_headers([file for file, _ in new])
    known.update((key, header) for (_, key), header in zip(new, found, strict=True))
    headers = [known[key] for key in keys]
    if any(isinstance(header, Header) for header in found):
        kept = [
            (name, state, header)
            for (name, state), header in zip(keys, headers, strict=True)
            if isinstance(header, Header) and isinstance(state, tuple)
        ]
        rows = np.array([(*state, *header) for _, state, header in kept], dtype=HEADER)
        save_cache(dirname, f"{split}-headers", {"names": np.array([name for name, *_ in kept]), "headers": rows})
    return headers


def _is_valid(arrays: Arrays) -> bool:
    return arrays["headers"].dtype == HEADER and len(arrays["headers"]) == len(arrays["names"])


def _rows(arrays: Arrays) -> Iterator[tuple[tuple, Header]]:
    for name, (size, time, *header) in zip(arrays["names"].tolist(), arrays["headers"].tolist(), strict=True):
        yield (name, (size, time)), Header(*header)


def find_odd(
    files: Sequence[str], sizes: Sequence[tuple[int, int]], headers: Sequence[Header | str]
) -> tuple[dict[str, str], list[str]]:
    """Pictures that training cannot use, and those whose orientation is ambiguous.

    Args:
        files: the pictures.
        sizes: height and width of each, as its annotation says.
        headers: of each, see `cached_headers`.

    Returns:
        Picture -> what is wrong, for those that cannot be read or have another size; and those that EXIF turns or
        mirrors without changing their size, which may have been annotated as shown or as stored.
    """
    odd, undecided = {}, []
    for file, size, header in zip(files, sizes, headers, strict=True):
        if isinstance(header, str):
            odd[file] = header
        elif size not in (header.size, header.stored):
            odd[file] = wrong_size(header.size, size)
        elif header.orientation > 1 and header.size == header.stored:
            undecided.append(file)
    return odd, undecided


def wrong_size(found: tuple[int, int], expected: tuple[int, int]) -> str:
    """What is wrong with a picture of another height and width than its annotation says."""
    return (
        f"image is {found[1]}x{found[0]}, its annotation says {expected[1]}x{expected[0]}; mend <size> in the "
        "annotation or replace the image"
    )
