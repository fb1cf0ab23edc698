"""Finding images by name, folder and pattern."""

from pathlib import Path

import pytest

from common.errors import UserError
from tools.images import find_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.JPG", "c.png", "notes.txt", "d e.jpeg", "sub/f.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_names_folders_and_patterns(folder: Path) -> None:
    assert [path.name for path in find_images([str(folder)])] == ["a.JPG", "b.jpg", "c.png", "d e.jpeg"]
    assert find_images([str(folder / "d e.jpeg")]) == [folder / "d e.jpeg"]
    assert [path.name for path in find_images([f"{folder}/*.jpg"])] == ["b.jpg"]
    assert [path.name for path in find_images([f"{folder}/*/f.jpg"])] == ["f.jpg"]
    assert find_images([]) == []


def test_relative_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_images(["*.png", "sub"]) == [Path("c.png"), Path("sub/f.jpg")]


def test_each_image_once_in_the_order_of_the_names(folder: Path) -> None:
    found = find_images([str(folder / "c.png"), str(folder), str(folder / "b.jpg")])
    assert [path.name for path in found] == ["c.png", "a.JPG", "b.jpg", "d e.jpeg"]


def test_what_is_not_there(folder: Path) -> None:
    (folder / "empty").mkdir()
    for name, what in (("x.jpg", "no such file"), ("*.gif", "no such file"), ("empty", "no image in this folder")):
        with pytest.raises(UserError, match=what) as error:
            find_images([str(folder / "b.jpg"), str(folder / name)])
        assert str(folder / name) in str(error.value)
