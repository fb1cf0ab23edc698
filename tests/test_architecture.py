"""Who may import whom: tools -> detection and classification, which never see each other -> common -> libraries."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What each package may import of the project, and whether Detectron2, which classification does without.
MAY_IMPORT = {
    "common": {"common"},
    "detection": {"common", "detection", "detectron2"},
    "classification": {"common", "classification"},
    "tools": {"common", "detection", "classification", "tools", "detectron2"},
}
OURS = {*MAY_IMPORT, "tests", "detectron2"}


def imports(path: Path) -> set[str]:
    """Top-level names of all that a file imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_downwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): imports(path) & OURS - MAY_IMPORT[package] for path in files}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_errors_need_the_standard_library_alone() -> None:
    """Set-up imports them on a bare machine, here a Python without site-packages."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common.errors; print(common.errors.UserError('x'))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("x\n", 0), done.stderr


def test_no_drawer_for_everything() -> None:
    names = {path.stem for package in MAY_IMPORT for path in (ROOT / package).rglob("*")}
    assert not names & {"utils", "util", "helpers", "misc"}


def test_files_stay_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for package in MAY_IMPORT
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > 400} == {}
