"""The set-up, with hand-made wheels in a folder as its package registry and in virtual environments of its own."""

import ast
import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.errors import UserError
from tools import setup_environment

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [path.parent for path in ROOT.glob("*/__init__.py")]


def write_wheel(
    folder: Path, name: str, version: str, tag: str, files: dict[str, str], requires: tuple[str, ...] = ()
) -> Path:
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {requirement}\n" for requirement in requires),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(zipfile.ZipInfo(path), text)  # with a fixed date: written again, it is the same
    return wheel


def write_detectron2(folder: Path, text: str = "origin = 'registry'\n") -> str:
    """Writes a wheel like the registry's and returns its sha256."""
    files = {
        "detectron2/__init__.py": text,
        "detectron2/layers/__init__.py": "",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "for another Python",
        "tools/__init__.py": "raise ImportError('a package that would shadow ours')\n",
    }
    wheel = write_wheel(folder, "sal_detectron2", "0.7.2", "cp310-none-any", files)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("the registry")
    for version in ("1.0", "2.0"):
        write_wheel(folder, "leaf", version, "py3-none-any", {"leaf.py": f"version = '{version}'\n"})
    write_wheel(folder, "branch", "1.0", "py3-none-any", {"branch.py": ""}, requires=("leaf",))
    write_wheel(folder, "detectron2", "0.6", "py3-none-any", {"detectron2/__init__.py": "origin = 'other'\n"})
    return folder


@pytest.fixture(scope="module")
def built_venv(registry, tmp_path_factory) -> Path:
    """An environment as the set-up leaves it; made once, as pip takes seconds."""
    folder = tmp_path_factory.mktemp("a checkout")
    with pytest.MonkeyPatch.context() as patch:
        use_registry(patch, registry, write_detectron2(registry))
        setup_environment.set_up(folder / ".venv", write_pins(folder, "leaf==1.0"), "")
    return folder / ".venv"


@pytest.fixture
def venv(built_venv, registry, tmp_path, monkeypatch) -> Path:
    """A copy of that environment, in a folder whose name has a space; its Python does not depend on where it lies."""
    use_registry(monkeypatch, registry, write_detectron2(registry))
    copy = tmp_path / "a copy" / ".venv"
    shutil.copytree(built_venv, copy, symlinks=True)
    write_pins(copy.parent, "leaf==1.0")
    return copy


def use_registry(patch: pytest.MonkeyPatch, registry: Path, sha256: str) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        patch.delenv(name)
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", registry.as_uri())
    patch.setattr(setup_environment, "DETECTRON2_SHA256", sha256)


def write_pins(folder: Path, text: str, constraints: str = "") -> Path:
    path = folder / "requirements.txt"
    path.write_text(text + "\n")
    (folder / "constraints.txt").write_text(constraints + "\n")
    return path


def write_sources(folder: Path) -> Path:
    """Sources of Detectron2, built as its own are with what the environment holds: here `leaf`, there torch."""
    folder.mkdir()
    wheel = write_wheel(folder, "detectron2", "0.7", "py3-none-any", {"detectron2/__init__.py": "origin = 'sources'\n"})
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["leaf"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / "backend.py").write_text(
        "import shutil\n"
        "import leaf\n"
        "def build_wheel(directory, settings=None, metadata=None):\n"
        f"    shutil.copy({wheel.name!r}, directory)\n"
        f"    return {wheel.name!r}\n"
    )
    return folder


def write_old_python(path: Path) -> Path:
    """The Python of these tests under another number."""
    path.parent.mkdir(exist_ok=True)
    script = path.with_suffix(".py")
    script.write_text(
        "import os, runpy, sys\n"
        "sys.version_info = (3, 10, 13, 'final', 0)\n"
        "sys.path.insert(0, os.getcwd())\n"
        "if sys.argv[1] == '-m':\n"
        "    sys.argv = sys.argv[2:]\n"
        "    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    path.chmod(0o755)
    return path


def make_setup(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    for path in (ROOT / "Makefile", *PACKAGES):
        if not (checkout / path.name).exists():
            (checkout / path.name).symlink_to(path)
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "BASE_PYTHON", "PYTHON", "DETECTRON2")
    environment = {name: value for name, value in os.environ.items() if name not in outer} | variables
    return subprocess.run(["make", "setup"], cwd=checkout, env=environment, capture_output=True, text=True)


def ask(venv: Path, expression: str) -> str:
    command = [str(venv / "bin" / "python"), "-I", "-c", f"import leaf, detectron2; print({expression})"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_installs_the_pins_and_only_the_sources_of_detectron2(venv):
    assert ask(venv, "leaf.version, detectron2.origin") == "1.0 registry"
    (site_packages,) = venv.glob("lib/*/site-packages")
    names = {path.name for path in site_packages.iterdir()}
    assert "tools" not in names and "detectron2.part" not in names
    assert not list(site_packages.glob("detectron2/*.so")) and (site_packages / "detectron2" / "layers").is_dir()


def test_does_nothing_when_nothing_changed(venv, capsys, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)  # anything but doing nothing fails without a source of packages
    setup_environment.set_up(venv, venv.parent / "requirements.txt", "")
    assert capsys.readouterr().out == ""


def test_refuses_a_wheel_with_another_checksum(venv, registry):
    (site_packages,) = venv.glob("lib/*/site-packages")
    shutil.rmtree(site_packages / "detectron2")
    pins = write_pins(venv.parent, "leaf==2.0")
    write_detectron2(registry, "origin = 'somebody else'\n")
    with pytest.raises(UserError, match=r"sha256.* make setup DETECTRON2=\"git\+https") as refusal:
        setup_environment.set_up(venv, pins, "")
    assert "\n" not in str(refusal.value)
    assert not list(site_packages.glob("detectron2*"))

    # The call that failed had installed leaf 2.0: taking the change back must not look like nothing changed.
    write_detectron2(registry)
    write_pins(venv.parent, "leaf==1.0")
    setup_environment.set_up(venv, pins, "")
    assert ask(venv, "leaf.version, detectron2.origin") == "1.0 registry"


def test_says_the_other_way_when_the_wheel_cannot_be_had(venv, registry):
    pins = write_pins(venv.parent, "leaf==2.0")
    (registry / "sal_detectron2-0.7.2-cp310-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"fetched.* make setup DETECTRON2=\"git\+https") as refusal:
        setup_environment.set_up(venv, pins, "")
    assert "\n" not in str(refusal.value)


def test_the_lock_decides_what_the_pins_pull_in(venv):
    for version in ("1.0", "2.0", "1.0"):  # without a lock it were 2.0, or what is there
        pins = write_pins(venv.parent, "branch==1.0", constraints=f"leaf=={version}")
        setup_environment.set_up(venv, pins, "")
        assert ask(venv, "leaf.version") == version
    (venv.parent / "constraints.txt").unlink()
    with pytest.raises(UserError, match=r"constraints\.txt: no such file"):
        setup_environment.set_up(venv, pins, "")


def test_notices_changed_pins_and_keeps_the_chosen_source_of_detectron2(venv):
    pins = venv.parent / "requirements.txt"
    setup_environment.set_up(venv, pins, "detectron2==0.6")
    assert ask(venv, "leaf.version, detectron2.origin") == "1.0 other"
    write_pins(venv.parent, "leaf==2.0")
    setup_environment.set_up(venv, pins, "")
    assert ask(venv, "leaf.version, detectron2.origin") == "2.0 other"
    setup_environment.set_up(venv, pins, setup_environment.DETECTRON2)
    assert ask(venv, "leaf.version, detectron2.origin") == "2.0 registry"
    assert not list(venv.glob("lib/*/site-packages/detectron2-*"))


def test_rebuilds_an_environment_whose_interpreter_is_gone(venv):
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(venv / "no such" / "python")
    (venv / "left over").mkdir()
    setup_environment.set_up(venv, venv.parent / "requirements.txt", "")
    assert ask(venv, "leaf.version, detectron2.origin") == "1.0 registry"
    assert not (venv / "left over").exists()


def test_rebuilds_an_environment_of_another_python(venv):
    (site_packages,) = venv.glob("lib/*/site-packages")
    (site_packages / "sitecustomize.py").write_text("import sys\nsys.version = '3.12.1 (another build)'\n")
    setup_environment.set_up(venv, venv.parent / "requirements.txt", "")
    assert ask(venv, "leaf.version, detectron2.origin") == "1.0 registry"
    assert not (site_packages / "sitecustomize.py").exists()


def test_make_builds_detectron2_from_sources_and_then_needs_no_python_but_that_of_the_environment(
    venv, tmp_path, monkeypatch
):
    sources = write_sources(tmp_path / "sources of detectron2")
    done = make_setup(venv.parent, BASE_PYTHON=sys.executable, DETECTRON2=str(sources))
    assert done.returncode == 0, done.stderr
    assert ask(venv, "leaf.version, detectron2.origin") == "1.0 sources"

    old = write_old_python(tmp_path / "bin" / "python3")
    monkeypatch.setenv("PATH", f"{old.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    done = make_setup(venv.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("named", ["python3.10", "no such python", None])
def test_an_unsuitable_python_is_one_line(tmp_path, monkeypatch, named):
    old = write_old_python(tmp_path / "bin" / "python3.10")
    shutil.copy(old, old.with_name("python3"))
    monkeypatch.setenv("PATH", f"{old.parent}{os.pathsep}{os.environ['PATH']}")
    done = make_setup(tmp_path, **({"BASE_PYTHON": named} if named else {}))
    assert done.returncode == 2
    error, farewell = done.stderr.splitlines()
    assert error.startswith("error: ") and "BASE_PYTHON=" in error
    assert ("no such python" if named == "no such python" else "Python 3.10, expected 3.11 to 3.13") in error
    assert farewell.startswith("make: ***") and not (tmp_path / ".venv").exists()


def test_an_old_python_can_read_what_tells_it_so():
    for path in (ROOT / "tools" / "__init__.py", Path(setup_environment.__file__)):
        ast.parse(path.read_text(), feature_version=(3, 7))


def test_killed_and_then_called_twice_at_once_it_finishes(venv):
    pins = write_pins(venv.parent, "leaf==2.0")
    code = (
        "import sys; from pathlib import Path; from tools import setup_environment as s;"
        f"s.DETECTRON2_SHA256 = {setup_environment.DETECTRON2_SHA256!r};"
        "s.set_up(Path(sys.argv[1]), Path(sys.argv[2]), '')"
    )
    command = [sys.executable, "-c", code, str(venv), str(pins)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert any("requirements.txt" in line for line in process.stdout)
        os.killpg(process.pid, signal.SIGKILL)
    calls = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [call.communicate(timeout=120)[0] for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert sorted("waiting" in output for output in outputs) == [False, True]
    assert ask(venv, "leaf.version, detectron2.origin") == "2.0 registry"


def test_leaves_a_folder_alone_that_is_no_environment(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no virtual environment"):
        setup_environment.set_up(tmp_path, write_pins(tmp_path, ""), "")
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "requirements.txt", "constraints.txt"}


def test_without_a_source_of_packages_one_line_says_what_is_missing(venv):
    write_pins(venv.parent, "leaf==3.0")
    command = [sys.executable, "-m", "tools.setup_environment", "--venv", str(venv)]
    process = subprocess.run(
        [*command, "--requirements", str(venv.parent / "requirements.txt")], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "leaf==3.0" in process.stderr and "same command" in process.stderr


def read_pins(path: Path) -> dict[str, Requirement]:
    """Requirements by canonical name; every line names one exact version."""
    lines = [line.split(" #")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[0-9][\w.]*", str(requirement.specifier)) for requirement in requirements)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_conda_gets_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt", "-c constraints.txt"]}]


def test_every_import_is_pinned():
    sources = [path for folder in [*PACKAGES, ROOT / "tests"] for path in folder.rglob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {path.name for path in PACKAGES} | {"tests"}
    elsewhere = {"detectron2", "ultralytics"}  # what the set-up unpacks, and what a benchmark fetches for itself
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names - ours - elsewhere
    assert modules >= {"torch", "markupsafe", "huggingface_hub"}

    pins = read_pins(ROOT / "requirements.txt")
    distributions = importlib.metadata.packages_distributions()
    for module in modules:
        assert {canonicalize_name(name) for name in distributions[module]} & pins.keys(), module


def test_everything_that_the_pins_pull_in_is_locked():
    pins, lock = read_pins(ROOT / "requirements.txt"), read_pins(ROOT / "constraints.txt")
    assert not {"detectron2", "sal-detectron2", "pip"} & (pins.keys() | lock.keys())
    for name, pin in pins.items():
        assert name in lock or pin.marker, f"{name}: make lock"
        assert lock.setdefault(name, pin).specifier == pin.specifier, f"{name}: make lock"

    seen, pending = set(), [(name, "") for name in pins if not pins[name].marker or pins[name].marker.evaluate()]
    while pending:
        name, extra = pending.pop()
        if (name, extra) not in seen:
            seen.add((name, extra))
            assert lock[name].specifier.contains(importlib.metadata.version(name)), f"{name}: make lock"
            for requirement in map(Requirement, importlib.metadata.requires(name) or []):
                if not requirement.marker or requirement.marker.evaluate({"extra": extra}):
                    found = canonicalize_name(requirement.name)
                    pending += [(found, extra) for extra in ("", *requirement.extras)]


def test_extra_packages_keep_to_the_lock_and_are_installed_once(venv, monkeypatch, capsys):
    pins = write_pins(venv.parent, "leaf==1.0", constraints="leaf==1.0")
    setup_environment.set_up(venv, pins, "")
    extra = venv.parent / "requirements-export.txt"
    extra.write_text("branch==1.0\n")
    setup_environment.add_extra(venv, pins, extra)
    assert list(venv.glob("lib/*/site-packages/branch.py")) and ask(venv, "leaf.version") == "1.0"
    capsys.readouterr()
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    setup_environment.set_up(venv, pins, "")
    setup_environment.add_extra(venv, pins, extra)
    assert capsys.readouterr().out == ""
    extra.write_text("branch==2.0\n")
    with pytest.raises(UserError, match=r"requirements-export\.txt: could not be installed") as refusal:
        setup_environment.add_extra(venv, pins, extra)
    assert "\n" not in str(refusal.value)
