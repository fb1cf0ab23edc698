"""Results that stay apart, and never take the place of a file of the user."""

import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.results import reserve_results, unique_names


def names_of(*files: str, videos: tuple[str, ...] = ()) -> list[str]:
    return unique_names([Path(file) for file in files], [Path(video) for video in videos])


def test_names_are_stems_and_those_of_equal_files_are_apart() -> None:
    assert names_of("d/a.jpg", "d/b.c.png") == ["a", "b.c"]
    assert names_of("d1/a.jpg", "d2/a.jpg", "d1/a-2.jpg") == ["a", "a-3", "a-2"]
    assert names_of("d1/a-2.jpg", "d1/a.jpg", "d2/a.jpg", "d2/a.png") == ["a-2", "a", "a-3", "a-4"]
    assert len({name.casefold() for name in names_of("a/X.jpg", "b/x.jpg", "c/x-2.jpg")}) == 3


def test_no_photograph_has_the_name_of_a_frame() -> None:
    names = names_of("clip.mp4", "clip_000000.jpg", "clip-2_7.jpg", "clip_x.jpg", videos=("clip.mp4",))
    assert names == ["clip", "clip_000000-2", "clip-2_7-2", "clip_x"]
    assert names_of("clip_000000.jpg") == ["clip_000000"]


def test_a_name_leaves_room_for_suffixes() -> None:
    (name,) = names_of(f"{'é' * 120}.jpg")
    assert len(f"{name}_saliency.png".encode()) < 255
    first, second = names_of(f"{'x' * 240}1.jpg", f"{'x' * 240}2.jpg")
    assert first != second


def test_a_name_that_is_not_utf8_becomes_one_that_is() -> None:
    (name,) = names_of(os.fsdecode(b"caf\xe9.jpg"))
    assert name.encode().startswith(b"caf")


def test_results_overwrite_results_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    photograph = tmp_path / "a.jpg"
    photograph.write_text("mine")
    reserve_results(out, ["a.jpg", "Annotations/a.xml"], [photograph])
    for name in ("a.jpg", "Annotations/a.xml"):
        (out / name).write_text("result")
    reserve_results(out, ["a.jpg", "b.jpg"], [photograph])
    reserve_results(out, ["Annotations/a.xml"], [photograph])

    (out / "c.jpg").write_text("mine")
    with pytest.raises(UserError, match=r"c\.jpg: is there, and is none of our results.*OUT="):
        reserve_results(out, ["a.jpg", "c.jpg"], [photograph])
    with pytest.raises(UserError, match=r"a\.jpg: is one of the files to read"):
        reserve_results(out, ["a.jpg"], [out / "a.jpg"])
    assert set(json.loads((out / ".results.json").read_text())) == {"a.jpg", "Annotations/a.xml", "b.jpg"}


def test_the_folder_of_the_photographs_is_no_place_for_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(UserError, match=r"a\.jpg: is one of the files to read"):
            reserve_results(folder, ["a.jpg"], [tmp_path / "a.jpg"])
    with pytest.raises(UserError, match=r"a\.jpg: is a file, expected a folder"):
        reserve_results(tmp_path / "a.jpg", ["b.jpg"], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "link"]
