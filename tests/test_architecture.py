"""Who may import whom: two halves that never see each other, and a thin hall of tools in front of them."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"common.errors", "tools.run_folder", "tools.data_root", "tools.hub", "tools.processes"}
SHARED = {*LEAVES, "tools.launch", "tools.images", "common.sample.__init__"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports_of(package: str) -> set[str]:
    return set().union(*(imports(path) for path in (ROOT / package).rglob("*.py")))


def test_halves_never_see_each_other() -> None:
    assert not any(name.split(".")[0] == "classification" for name in imports_of("detection"))
    assert not any(name.split(".")[0] in ("detection", "detectron2") for name in imports_of("classification"))


def test_halves_import_only_the_leaves_of_tools() -> None:
    modules = {f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py")}
    for half in ("detection", "classification"):
        used = imports_of(half) & modules
        assert used <= LEAVES, used


def test_leaves_of_tools_import_no_half() -> None:
    for module in SHARED:
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert not any(name.split(".")[0] in ("detection", "classification") for name in imports(path)), module


def test_no_drawer_for_everything() -> None:
    names = {
        path.stem
        for package in ("detection", "classification", "tools", "common")
        for path in (ROOT / package).rglob("*.py")
    }
    assert not names & {"utils", "util", "helpers", "misc", "common"}
