"""The set-up, with hand-made wheels in a folder as its package registry and in virtual environments of its own."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from tools import setup_environment

ROOT = Path(__file__).resolve().parents[2]


def write_wheel(folder: Path, name: str, version: str, tag: str, files: dict[str, str]) -> Path:
    info = f"{name}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
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


def write_pins(folder: Path, text: str) -> Path:
    path = folder / "requirements.txt"
    path.write_text(text + "\n")
    return path


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
    with pytest.raises(UserError, match="sha256") as refusal:
        setup_environment.set_up(venv, pins, "")
    assert "\n" not in str(refusal.value)
    assert not list(site_packages.glob("detectron2*"))

    # The call that failed had installed leaf 2.0: taking the change back must not look like nothing changed.
    write_detectron2(registry)
    write_pins(venv.parent, "leaf==1.0")
    setup_environment.set_up(venv, pins, "")
    assert ask(venv, "leaf.version, detectron2.origin") == "1.0 registry"


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
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "requirements.txt"}


def test_without_a_source_of_packages_one_line_says_what_is_missing(venv):
    write_pins(venv.parent, "leaf==3.0")
    command = [sys.executable, "-m", "tools.setup_environment", "--venv", str(venv)]
    process = subprocess.run(
        [*command, "--requirements", str(venv.parent / "requirements.txt")], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1
    assert "leaf==3.0" in process.stderr and "same command" in process.stderr


def test_conda_gets_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins and all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", pin) for pin in pins)
    assert not any("detectron2" in pin for pin in pins)
