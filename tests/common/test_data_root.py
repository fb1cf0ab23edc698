"""Which folder stands in when the user names none."""

from pathlib import Path

import pytest

from common.data_root import resolve_data_root
from common.errors import UserError

YEARS = ["VOC2007", "VOC2012"]


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout as the current folder, its sample drawn by hand."""
    monkeypatch.chdir(tmp_path)
    for name in YEARS:
        (tmp_path / "datasets" / "sample" / name).mkdir(parents=True)
    return tmp_path


def test_the_folder_named_is_taken_as_it_is(checkout: Path):
    (checkout / "mine").mkdir()
    assert resolve_data_root("mine", YEARS) == (Path("mine"), False)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        resolve_data_root("nowhere", YEARS)


def test_a_tilde_is_the_home_folder(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    (checkout / "photos").mkdir()
    monkeypatch.setenv("HOME", str(checkout))
    assert resolve_data_root("~/photos", YEARS) == (checkout / "photos", False)


def test_official_data_wins_over_the_sample(checkout: Path):
    for name in YEARS:
        (checkout / "datasets" / name).mkdir()
    assert resolve_data_root(None, YEARS) == (Path("datasets"), False)
    assert resolve_data_root(None, YEARS[:1]) == (Path("datasets"), False)


def test_the_sample_stands_in_where_nothing_is_there(checkout: Path):
    (checkout / "datasets" / "CUB_200_2011").mkdir()
    before = sorted(checkout.rglob("*"))
    assert resolve_data_root(None, YEARS) == (Path("datasets/sample"), True)
    assert sorted(checkout.rglob("*")) == before, "a sample that is there is left alone"


def test_half_of_the_official_data_is_an_error(checkout: Path):
    (checkout / "datasets" / "VOC2007").mkdir()
    with pytest.raises(UserError, match=r"VOC2012 is missing.*make check-datasets.*make datasets") as error:
        resolve_data_root(None, YEARS)
    assert "\n" not in str(error.value)
    # But where the other half is not needed; and the sample never stands in for one that is.
    assert resolve_data_root(None, YEARS, ["VOC2007"]) == (Path("datasets"), False)
    with pytest.raises(UserError, match="VOC2012 is missing, expected VOC2012: see"):
        resolve_data_root(None, YEARS, ["VOC2012"])
