"""The interface: what bare `make` lists, what each target would run, and checkouts in folders with spaces."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make(*arguments: str, cwd: Path = ROOT) -> str:
    """Output of make with the interpreter of the tests."""
    words = ["make", f"PYTHON={shlex.quote(sys.executable)}", *arguments]
    return subprocess.run(words, cwd=cwd, env=own_environment(), capture_output=True, text=True, check=True).stdout


def own_environment() -> dict[str, str]:
    """The environment without what a make around these tests, as in `make test`, hands down to makes inside."""
    return {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}


def commands(*arguments: str) -> list[list[str]]:
    """The command lines that make would run, split as the shell would."""
    lines = make("--dry-run", *arguments).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if "tools.setup_environment" not in line]


def test_the_page_is_served_where_the_command_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells export HOST with another meaning, the name of the machine."""
    monkeypatch.setenv("HOST", "machine.example")
    assert not any("--host" in words for words in commands("app"))
    assert any("127.0.0.2" in words for words in commands("app", "HOST=127.0.0.2"))


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text, re.MULTILINE))
    assert targets == phony
    listed = re.sub(r"\x1b\[\d+m", "", make())
    assert make() == make("help")
    for target in targets:
        assert re.search(rf"^  {target} +[A-Z].+$", listed, re.MULTILINE), target
    # Every variable that a target takes is named there.
    used = set(re.findall(r"(?:\$\((?:if \$\()?|\$\(call [a-z]+,(?:[a-z-]+,)?)([A-Z0-9_]+)[,)]", text)) | {
        "NGPU",
        "NNODES",
        "NODE_RANK",
        "DIST_URL",
    }
    for variable in used - {"PY", "SETUP", "MAKECMDGOALS", "HOME"}:
        assert re.search(rf"\b{variable}\b", listed), variable


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("train-frcnn EPOCHS=5", "train-frcnn takes no EPOCHS"),
        ("finetune CONFIG=own.yaml", "finetune takes no CONFIG"),
        ("finetune RECIPIE=study", "finetune takes no RECIPIE"),
        ("app VOC_XML=1", "app takes no VOC_XML"),
        ("finetune BATCH_SIZE=8", "finetune takes no BATCH_SIZE"),
        ("train-yolov3 IMS_PER_BATCH=8", "train-yolov3 takes no IMS_PER_BATCH"),
        ("lint test DATA=a", "lint test takes no DATA"),
        ("train-frcnn RESUME=yes", "RESUME=yes: expected 1 or 0"),
        ("predict IMAGES=a.jpg DRAW=no", "DRAW=no: expected 1 or 0"),
    ],
)
def test_what_nothing_would_come_of_is_refused(words: str, complaint: str) -> None:
    done = subprocess.run(
        ["make", "-n", *words.split()], cwd=ROOT, env=own_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_variables_of_the_environment_and_of_one_of_several_targets_pass() -> None:
    assert commands("train-frcnn", "CUDA_VISIBLE_DEVICES=0", "DEBUG=1", "RESUME=0") == commands("train-frcnn")
    assert commands("lint", "test", "TESTS=tests/birds.py")[-1][-1] == "tests/birds.py"


def test_every_target_that_runs_python_sets_up_first() -> None:
    for line in (ROOT / "Makefile").read_text().splitlines():
        if match := re.match(r"^([a-z0-9-]+):(.*?)##", line):
            name, needs = match.groups()
            # `lock` sets up too, but without the lock that is there.
            assert ("setup" in needs) == (name not in ("help", "setup", "lock", "clean")), name


@pytest.mark.parametrize(
    ("arguments", "expected", "absent"),
    [
        (
            ["train-frcnn"],
            ["tools.launch", "detection.train_net", "--model faster_rcnn"],
            ["--recipe", "--data", "--resume", "--weights"],
        ),
        (
            ["train-frcnn", "RECIPE=study", "DATA=a b", "RESUME=1", "PRETRAINED=0"],
            ["--recipe study", "--data a b", "--resume", "--pretrained 0"],
            [],
        ),
        (["train-frcnn", "RESUME=0"], [], ["--resume"]),
        (["train-yolov3", "RUN=my run", "RESUME=1"], ["--name my run --resume"], []),
        (["finetune", "RUN=my run"], ["--name my run"], ["--resume"]),
        (["train-yolov3", "EXIF=stored", "OPTS=SEED 1"], ["INPUT.EXIF stored SEED 1"], []),
        (["eval-frcnn", "EXIF=stored"], ["--eval-only INPUT.EXIF stored"], []),
        (
            ["train-frcnn", "OPTS=SOLVER.MAX_ITER 20 SOLVER.STEPS '(5, 9)'"],
            ["SOLVER.MAX_ITER 20 SOLVER.STEPS (5, 9)"],
            [],
        ),
        (
            ["eval-frcnn", "WEIGHTS=my run/model_best.pth"],
            ["--eval-only", "--start my run/model_best.pth"],
            ["--resume"],
        ),
        (
            ["eval-detections", "DETECTIONS=my boxes.json", "SPLIT=voc07_test"],
            ["tools.eval_detections", "my boxes.json", "--split voc07_test"],
            ["--out", "--interval"],
        ),
        (["eval-detections", "DETECTIONS=boxes.json", "INTERVAL=1"], ["boxes.json", "--interval"], ["--split"]),
        (
            ["eval-detections", "DETECTIONS=my folder/", "ANNOTATIONS=my coco.json", "SUBMISSION=1"],
            ["my folder/", "--annotations my coco.json", "--submission"],
            ["--interval"],
        ),
        (
            ["predict", "WEIGHTS=run", "SCORE=best", "IMAGES=a.jpg"],
            ["--start run", "--score best", "a.jpg"],
            ["--voc-xml"],
        ),
        (
            ["visualize-proposals", "IMAGES='a b.jpg' c/", "TOPK=10"],
            ["tools.visualize_proposals", "'a b.jpg' c/", "--topk 10"],
            ["--weights"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_variables_reach_the_command_line(arguments: list[str], expected: list[str], absent: list[str]) -> None:
    (words,) = commands(*arguments)
    line = " ".join(words)
    for text in expected:
        assert text in line
    for text in absent:
        assert text not in line


def test_the_home_folder_is_known_in_every_shell() -> None:
    (words,) = commands("train-frcnn", "DATA=~/my data", "WEIGHTS=~/run", "CONFIG=a~/b", "RUN=~")
    home = str(Path.home())
    assert {f"{home}/my data", f"{home}/run", "a~/b", "~"} <= set(words)


def test_paths_with_spaces_are_one_word() -> None:
    (words,) = commands("train-frcnn", "DATA=my data", "WEIGHTS=my weights.pth")
    assert {"my data", "my weights.pth"} <= set(words)


@pytest.mark.parametrize(
    ("target", "variables"),
    [
        ("predict", ("IMAGES", "OUT", "WEIGHTS", "MODEL")),
        ("predict-bird", ("IMAGES", "OUT", "WEIGHTS")),
        ("compare-detectors", ("IMAGES", "FRCNN", "YOLOV3", "OUT")),
        ("check-datasets", ("DATA",)),
        ("import-dataset", ("FROM", "IMAGES", "OUT")),
        ("finetune", ("DATA", "WEIGHTS")),
        ("eval-classifier", ("WEIGHTS", "DATA", "OUT")),
        ("eval-detections", ("DETECTIONS", "DATA")),
        ("report", ("RUNS",)),
    ],
)
def test_names_reach_python_as_they_are(target: str, variables: tuple[str, ...]) -> None:
    names = [f'{variable} (1) & $1 $$ $(x) it\'s "100 %" `#;<>.jpg' for variable in variables]
    (words,) = commands(target, *(f"{variable}={name}" for variable, name in zip(variables, names, strict=True)))
    assert set(names) <= set(words) | {word.partition("=")[2] for word in words}


def test_processes_are_counted_in_the_environment() -> None:
    """The variables of the launcher reach it, given on make's command line or in make's own environment."""
    probe = "include Makefile\nprobe: ; @echo $$NGPU $$NNODES $$NODE_RANK $$DIST_URL\n"
    words = ["make", "-s", "-f", "-", "probe", "NGPU=2", "NNODES=3", "NODE_RANK=1", "DIST_URL=tcp://a:1"]
    done = subprocess.run(
        words, cwd=ROOT, env=own_environment(), input=probe, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "3", "1", "tcp://a:1"]


def test_without_python_the_project_has_an_environment_of_its_own() -> None:
    done = subprocess.run(
        ["make", "-n", "train-frcnn"], cwd=ROOT, env=own_environment(), capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert "tools.setup_environment --venv .venv" in first
    assert second.startswith(".venv/bin/python ")
    assert ".venv" not in make("-n", "train-frcnn").replace(sys.executable, "")


def test_checkout_in_a_folder_with_spaces(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    shutil.copy(ROOT / "Makefile", checkout)
    for package in ("tools", "classification", "detection", "common"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    # A target that reads the data root and writes nothing; the environment itself is set up by another test.
    output = subprocess.run(
        ["make", "-o", "setup", f"PYTHON={shlex.quote(sys.executable)}", "check-datasets"],
        cwd=checkout,
        env=own_environment(),
        capture_output=True,
        text=True,
    )
    assert "VOC2007" in output.stdout + output.stderr
    assert "Traceback" not in output.stderr
