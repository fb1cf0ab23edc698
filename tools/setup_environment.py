"""Sets up the Python environment: a virtual environment where asked for, the pinned packages, and Detectron2.

    python3 -m tools.setup_environment --venv .venv     # make setup
    python -m tools.setup_environment                   # make PYTHON=python setup: into the environment that is active
    python -m tools.setup_environment --extra requirements-export.txt      # make PYTHON=python setup-export

Runs before anything is installed, so it needs the standard library alone. It does nothing when nothing has changed:
a stamp in the environment, written last, names what was installed. An interrupted set-up leaves no such stamp and is
finished by the next call. The virtual environment is made with the Python that runs this, which may be its own; one
made with another Python is recreated.

Detectron2 publishes no wheels, so it comes from the package registry as `sal-detectron2`, a wheel of its sources. Its
tag says Python 3.10, which holds for a compiled extension that neither model needs; so only its folder `detectron2/` is
unpacked, once the checksum was right. The variable DETECTRON2 names any other pip requirement instead, built with the
installed torch; that choice holds in the environment until the variable names another one.
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):  # the one module that such a Python may meet
    found = f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, expected 3.11 to 3.13"
    hint = "name one, as in BASE_PYTHON=python3.13 make setup, or use conda and environment.yml"
    print(f"error: {found}: {hint}", file=sys.stderr)
    sys.exit(2)

import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.errors import ArgumentParser, UserError, exits_on_user_error

DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
OTHER_WAY = (
    'build it from its repository: make setup DETECTRON2="git+https://github.com/facebookresearch/detectron2.git"'
)
REMEDY = "mend that and run the same command"
LOCK, STAMP = ".setup.lock", ".setup.json"  # in the environment's folder


class Environment(NamedTuple):
    """The environment that packages go into."""

    folder: Path
    python: str
    version: str  # `sys.version`: another build of Python is another environment
    site_packages: Path


@exits_on_user_error
def main() -> None:
    """Command line: sets up the environment named, or the active one."""
    parser = ArgumentParser(description="Installs the pinned packages and Detectron2.")
    parser.add_argument(
        "--venv", type=Path, help="virtual environment to create or use; default: the active environment"
    )
    parser.add_argument(
        "--requirements",
        type=Path,
        default=Path("requirements.txt"),
        help="constraints.txt lies beside it; default: %(default)s",
    )
    parser.add_argument("--extra", type=Path, help="further requirements, which are installed once the others are")
    arguments = parser.parse_args()
    try:
        set_up(arguments.venv, arguments.requirements, os.environ.get("DETECTRON2", ""))
        if arguments.extra:
            add_extra(arguments.venv, arguments.requirements, arguments.extra)
    except KeyboardInterrupt:
        raise UserError("set-up was interrupted; the same command goes on with it") from None
    except OSError as error:
        raise UserError(f"{error.filename or 'set-up'}: {error.strerror}; {REMEDY}") from error


def set_up(venv: Path | None, requirements: Path, detectron2: str) -> None:
    """Brings an environment up to date; does nothing, in a few hundredths of a second, when it is.

    Args:
        venv: folder of the virtual environment, created where needed; None for the running interpreter's environment.
        requirements: file of pip requirements; `constraints.txt`, the versions of what they pull in, lies beside it.
        detectron2: pip requirement of Detectron2; empty for the last one chosen, at first `DETECTRON2`.

    Raises:
        UserError: the folder is something else, a package cannot be had, a checksum is wrong, or packages conflict.
    """
    folder = venv or Path(sys.prefix)
    environment = _find_environment(venv)
    if environment and _is_up_to_date(environment, requirements, detectron2):
        return
    _refuse_foreign(venv)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / LOCK):
        environment = _find_environment(venv)
        if environment and _is_up_to_date(environment, requirements, detectron2):  # by the call that held the lock
            return
        if venv:
            environment = _create_venv(venv, environment)
        assert environment, "the Python that runs this"
        _install(environment, requirements, detectron2)


def add_extra(venv: Path | None, requirements: Path, extra: Path) -> None:
    """Installs further packages into an environment that is set up; does nothing when they are there.

    Args:
        venv: its folder; None for the running interpreter's environment.
        requirements: what it was set up with; `constraints.txt` lies beside it.
        extra: file of pip requirements.

    Raises:
        UserError: a package cannot be had, or packages conflict.
    """
    environment = _find_environment(venv)
    assert environment, "it was set up before"
    with _lock(environment.folder / LOCK):
        stamp = _read_stamp(environment)
        digest = hashlib.sha256(f"{stamp['digest']}\0{extra.read_text()}".encode()).hexdigest()
        if stamp.get("extra") == digest:
            return
        with _step(f"packages of {extra} (the first time about 200 MB)"):
            pins = ["-r", str(extra), "-c", str(_constraints(requirements))]
            _pip(environment, ["install", *pins], f"{extra}: could not be installed")
        _check(environment)
        _write_stamp(environment, stamp["detectron2"], stamp["digest"], digest)


def _find_environment(venv: Path | None) -> Environment | None:
    """Asks the environment's own Python; None where that does not run or is another than the one that runs this."""
    python = str(venv.absolute() / "bin" / "python") if venv else sys.executable
    question = "import json, sys, sysconfig; print(json.dumps([sys.version, sysconfig.get_path('purelib')]))"
    try:
        answer = subprocess.run([python, "-I", "-c", question], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version, site_packages = json.loads(answer)
    if version != sys.version:
        return None
    return Environment(venv or Path(sys.prefix), python, version, Path(site_packages))


def _refuse_foreign(venv: Path | None) -> None:
    """Refuses a folder that is no virtual environment, and the Python of the operating system."""
    if venv and venv.is_dir():
        names = {path.name for path in venv.iterdir()}
        if names and not names & {LOCK, "pyvenv.cfg"}:
            raise UserError(f"{venv}: exists and is no virtual environment; move it away and run the same command")
    if not venv and sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():
        python = Path(sys.executable)
        raise UserError(f"{python}: belongs to the operating system; run without PYTHON, or activate an environment")


def _read_stamp(environment: Environment) -> dict[str, str]:
    try:
        return json.loads((environment.folder / STAMP).read_text())
    except (OSError, ValueError):
        return {"detectron2": DETECTRON2, "digest": ""}


def _write_stamp(environment: Environment, detectron2: str, digest: str, extra: str = "") -> None:
    aside = environment.folder / f"{STAMP}.part"
    aside.write_text(json.dumps({"detectron2": detectron2, "digest": digest, "extra": extra}))
    aside.replace(environment.folder / STAMP)


def _digest(environment: Environment, requirements: Path, detectron2: str) -> str:
    """Hash of everything that decides what is installed."""
    try:
        pins = [path.read_text() for path in (requirements, _constraints(requirements))]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; run from the root of the checkout") from None
    parts = [*pins, detectron2, DETECTRON2_SHA256, environment.version]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _constraints(requirements: Path) -> Path:
    return requirements.with_name("constraints.txt")


def _is_up_to_date(environment: Environment, requirements: Path, detectron2: str) -> bool:
    stamp = _read_stamp(environment)
    return stamp["digest"] == _digest(environment, requirements, detectron2 or stamp["detectron2"])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has none: two set-ups at once would not wait for each other there
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up is at work in this environment; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create_venv(venv: Path, environment: Environment | None) -> Environment:
    """Creates the virtual environment, or finishes one that was interrupted."""
    if environment and any(environment.site_packages.glob("pip-*.dist-info/INSTALLER")):  # the last file of pip's
        return environment
    with _step(f"virtual environment {venv} with Python {sys.version.split()[0]}"):
        if not environment:
            for path in venv.iterdir():  # of a broken environment; the lock stays, as others may wait for it
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            _run([sys.executable, "-m", "venv", "--without-pip", str(venv)], f"{venv}: could not be created")
            environment = _find_environment(venv)
            if not environment:
                raise UserError(f"{venv}: its new Python does not run; name another: BASE_PYTHON=python3.13 make setup")
        _run(
            [environment.python, "-m", "ensurepip", "--upgrade", "--default-pip"],
            "pip could not be installed (on Debian: apt install python3-venv)",
        )
    return environment


def _install(environment: Environment, requirements: Path, detectron2: str) -> None:
    before = _read_stamp(environment)["detectron2"]
    detectron2 = detectron2 or before
    digest = _digest(environment, requirements, detectron2)
    _write_stamp(environment, before, digest="")  # from here until the end the environment is in no known state

    with _step(f"packages of {requirements} (the first time about 3 GB)"):
        pins = ["-r", str(requirements), "-c", str(_constraints(requirements))]
        _pip(environment, ["install", *pins], f"{requirements}: could not be installed")
    if detectron2 == DETECTRON2:
        with _step(f"Detectron2: the sources in {detectron2}"):
            _unpack_detectron2(environment)
    else:
        with _step(f"Detectron2: {detectron2} (compiling takes minutes)"):
            _remove_detectron2(environment)
            # Without the constraints, as its own requirements may be older than ours: up to now iopath's are.
            _pip(environment, ["install", "--no-build-isolation", detectron2], f"{detectron2}: could not be installed")
    _check(environment)
    _write_stamp(environment, detectron2, digest)


def _check(environment: Environment) -> None:
    with _step("pip check"):
        _run([environment.python, "-m", "pip", "check"], f"{environment.folder}: packages in conflict")


def _unpack_detectron2(environment: Environment) -> None:
    """Puts the folder `detectron2/` of the wheel into site-packages, without the extension compiled for Python 3.10."""
    with tempfile.TemporaryDirectory() as download:
        # The tag is the wheel's, not that of the Python at hand: pip would refuse to install it, and downloads it.
        tag = ["--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp"]
        _pip(
            environment,
            ["download", "--no-deps", *tag, "--dest", download, DETECTRON2],
            f"{DETECTRON2}: could not be fetched",
            f"{REMEDY}, or {OTHER_WAY}",
        )
        (wheel,) = Path(download).iterdir()
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != DETECTRON2_SHA256:
            raise UserError(
                f"{wheel.name}: its sha256 is {found}, expected {DETECTRON2_SHA256}; it was not unpacked: "
                f"look into the package source that pip uses here, then run the same command, or {OTHER_WAY}"
            )
        aside = environment.site_packages / "detectron2.part"
        shutil.rmtree(aside, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("detectron2/") and not name.endswith(".so")]
            archive.extractall(aside, names)
    _remove_detectron2(environment)
    (aside / "detectron2").rename(environment.site_packages / "detectron2")
    aside.rmdir()


def _remove_detectron2(environment: Environment) -> None:
    """Removes Detectron2, whether pip installed it (then pip knows its files) or this module did."""
    command = [environment.python, "-m", "pip", "uninstall", "--yes", "--quiet", "detectron2"]
    _run(command, "detectron2: could not be removed")
    shutil.rmtree(environment.site_packages / "detectron2", ignore_errors=True)


def _pip(environment: Environment, arguments: list[str], failure: str, remedy: str = REMEDY) -> None:
    # In a terminal pip shows its progress; in a log only the lines of `_step` are worth keeping.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [environment.python, "-m", "pip", *arguments, *quiet]
    _run(command, f"{failure} (is the package registry reachable?)", remedy)


def _run(command: list[str], failure: str, remedy: str = REMEDY) -> None:
    """Runs a command and turns its failure into one line, with the first error that it named."""
    process = subprocess.run(command, stderr=subprocess.PIPE, stdout=None if sys.stdout.isatty() else subprocess.PIPE)
    if process.returncode == 0:
        return
    lines = (process.stderr + (process.stdout or b"")).decode(errors="replace").strip().splitlines()
    if os.environ.get("DEBUG") == "1":
        print(*lines, sep="\n", file=sys.stderr)
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    reason = textwrap.shorten(errors[0], 160) if errors else f"exit code {process.returncode}"
    raise UserError(f"{failure}: {reason}; {remedy} (DEBUG=1 tells more)")


@contextmanager
def _step(text: str) -> Iterator[None]:
    print(f"setup: {text} ...", end="\n" if sys.stdout.isatty() else " ", flush=True)
    start, outcome = time.monotonic(), "failed"
    try:
        yield
        outcome = "done"
    finally:
        print(f"{outcome} after {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
