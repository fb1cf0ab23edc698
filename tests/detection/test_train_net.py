"""Whole runs of `python -m tools.launch detection.train_net`, on the tiny folder and network of conftest.py."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from tests.conftest import end_well
from tests.detection.runs import NAME, assert_one_line, assert_same, rows, wait_for_rows


def test_run_folder_is_complete(trained: Path) -> None:
    # 12 iterations: a row every 3, at each evaluation (every 5) and at the end.
    assert [row["iteration"] for row in rows(trained)] == [2, 4, 5, 8, 9, 11]
    evaluated = [row["iteration"] for row in rows(trained) if "AP50_11point" in row]
    assert evaluated == [4, 9, 11]
    assert all("validation_loss" in row for row in rows(trained) if row["iteration"] in evaluated)
    # 10 images, 4 an iteration.
    assert [row["epoch"] for row in rows(trained)] == pytest.approx([1.2, 2.0, 2.4, 3.6, 4.0, 4.8])

    files = {path.name for path in trained.iterdir()}
    assert {
        "config.yaml",
        "log.txt",
        "metrics.json",
        "results.csv",
        "results.png",
        "model_best.pth",
        "model_last.pth",
    } <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.startswith(".") for name in files)
    table = pd.read_csv(trained / "results.csv")
    assert table["total_loss"].tolist() == pytest.approx([row["total_loss"] for row in rows(trained)], rel=1e-5)
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["SOLVER"]["MAX_ITER"] == 12
    assert config["MODEL"]["CLASSES"] == ["red", "blue"]
    assert "iter 12/12" in (trained / "log.txt").read_text()


def test_losses_fall(trained: Path) -> None:
    losses = [row["total_loss"] for row in rows(trained)]
    assert losses[-1] < losses[0]


def test_killed_and_resumed_run_is_the_same_run(detector, trained: Path) -> None:
    """SIGKILL anywhere: rows, losses and weights are those of the run never killed, bit by bit."""
    rng = random.Random(0)
    run = detector.output / "killed" / NAME
    flags: tuple[str, ...] = ()
    for number_of_rows in (1, 3, 5):
        process = detector.server.start(*detector.arguments("killed", *flags))
        wait_for_rows(run, number_of_rows)
        time.sleep(rng.random() * 0.3)
        os.kill(process.number, signal.SIGKILL)
        assert process.end()[0] in (-signal.SIGKILL, 0)
        flags = ("--resume",)
    (run / ".model_last.pth.abc.unfinished").write_text("what a kill leaves")
    code, printed = detector("killed", "--resume")
    assert code == 0, printed
    if "is complete" in printed:  # the last kill came too late
        (run / ".model_last.pth.abc.unfinished").unlink()

    assert_same(run, trained)
    assert not list(run.glob(".*"))


def test_second_run_has_its_own_folder_and_a_complete_one_is_left_alone(detector, copied: Path) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.suffix in (".json", ".pth")}
    assert detector(copied.parent.name, opts=("SOLVER.MAX_ITER", "1", "TEST.VALIDATION_LOSS_IMAGES", "0"))[0] == 0
    second = copied.with_name(f"{NAME}-2")
    assert [row["iteration"] for row in rows(second)] == [0]
    shutil.rmtree(second)
    code, printed = detector(copied.parent.name, "--resume")
    assert code == 0
    assert f"{copied} is complete" in printed
    assert {name: (copied / name).read_bytes() for name in before} == before


def test_study_stops_early(detector) -> None:
    # Patience is 1: the second evaluation that does not rise ends the run.
    opts = ("TEST.EVAL_PERIOD", "2", "TEST.MIN_RISE", "2")
    code, printed = detector("study", "--recipe", "study", opts=opts)
    assert code == 0, printed
    run = detector.output / "study" / f"{NAME}_study"
    assert rows(run)[-1]["iteration"] == 3
    assert "Stopping early" in printed
    # A resume finds the run, and in it the data.
    code, printed = detector.later("study", "--recipe", "study", "--resume")
    assert code == 0, printed
    assert f"{run} is complete" in printed
    assert rows(run)[-1]["iteration"] == 3


def test_evaluation_alone_gives_the_figures_of_the_training(detector, copied: Path) -> None:
    code, printed = detector.later(copied.parent.name, "--eval-only")
    assert code == 0, printed
    figures = json.loads((copied / "evaluation" / "evaluation.json").read_text())
    best = max((row for row in rows(copied) if "AP" in row), key=lambda row: row["AP50_11point"])
    of_classes = [value for name, value in best.items() if name.startswith("per_class_AP50_11point/")]
    assert len(of_classes) > 1 and np.mean(of_classes) == pytest.approx(best["AP50_11point"])
    for key in ("AP50_11point", "AP50", "AP75", "AP"):
        assert figures[key] == pytest.approx(best[key], abs=1e-9)
    assert "| red " in printed


def test_two_machines(detector) -> None:
    """The launcher on two machines, here on loopback, with a gloo process each: they train one run."""
    opts = ("SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "0", "SOLVER.EMA_DECAY", "0.0")
    # Below those that the kernel gives to whoever connects, which may meet itself while nobody listens yet.
    url = f"tcp://127.0.0.1:{random.SystemRandom().randrange(20_000, 32_000)}"
    arguments = detector.arguments("machines", opts=opts)
    variables = {"NGPU": "1", "NNODES": "2", "DIST_URL": url}
    end_well([detector.server.start(*arguments, NODE_RANK=str(rank), **variables) for rank in range(2)])

    (run,) = (detector.output / "machines").iterdir()
    assert run.name == NAME
    assert [row["iteration"] for row in rows(run)] == [2, 3]
    assert yaml.safe_load((run / "config.yaml").read_text())["SOLVER"]["REFERENCE_WORLD_SIZE"] == 2

    # What the two processes measured together is what one process measures: images, BatchNorm and all.
    code, alone = detector.later("machines", "--eval-only")
    assert code == 0, alone
    figures = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert figures["AP"] == pytest.approx(rows(run)[-1]["AP"], abs=1e-9)
    detections = [json.loads((folder / "detections.json").read_text()) for folder in (run, run / "evaluation")]
    # In batches of other sizes float32 may have other last digits.
    one, other = (sorted(detection["score"] for detection in each) for each in detections)
    assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "opts", "expected"),
    [
        (("--data", "nowhere"), (), ("nowhere: no such folder",)),
        ((), ("SOLVER.BASE_LR",), ("OPTS", "pairs of KEY VALUE")),
        ((), ("SOLVER.BASE_LRR", "1"), ("OPTS: SOLVER.BASE_LRR", "Non-existent")),
        ((), ("SOLVER.MAX_ITER", "many"), ("OPTS: SOLVER.MAX_ITER many", "Type mismatch")),
        ((), ("DATASETS.TRAIN", "('voc07_train',)"), ("DATASETS.TRAIN", "voc07_train", "voc_trainval")),
        ((), ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "huber"), ("box regression loss type 'huber'", "leave some out")),
        ((), ("INPUT.AUGMENTATIONS", "['Mixup']"), ("INPUT.AUGMENTATIONS", "Mixup", "RandomHorizontalFlip")),
        (("--weights", "nowhere.pth"), (), ("nowhere.pth: no such weights file",)),
        (("--output", f"{__file__}/runs"), (), ("test_train_net.py", "Not a directory")),
        (("--output", "nothing trained", "--eval-only"), (), ("nothing trained", "WEIGHTS=path")),
        (("--output", "nothing trained", "--resume"), (), ("nothing trained", "no run to resume")),
        ((), ("SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0"), ("is infinite or no number", "BASE_LR")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_mistakes_end_in_one_line(
    detector, flags: tuple[str, ...], opts: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert_one_line(detector("mistakes", *flags, opts=opts), *expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_image_ends_in_one_line(detector, voc_folder: Path, tmp_path: Path, workers: int) -> None:
    """In a worker of the data loader as well, where the error crosses a process; a BMP file does not look cut off."""
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    jpeg = data / "JPEGImages" / "trainval_3.jpg"
    image = jpeg.with_suffix(".bmp")
    Image.open(jpeg).save(image)
    jpeg.unlink()
    image.write_bytes(image.read_bytes()[:-300])
    outcome = detector("truncated", "--data", str(data), opts=("DATALOADER.NUM_WORKERS", str(workers)))
    assert_one_line(outcome, f"{image}: cannot be read as an image", "truncated")
    assert (detector.output / "truncated").exists()


def test_truncated_jpegs_are_refused_before_anything_is_written(detector, voc_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    image = data / "JPEGImages" / "test_3.jpg"  # which training would read at its first evaluation
    image.write_bytes(image.read_bytes()[:-300])
    assert_one_line(detector("cut off", "--data", str(data)), f"{image}: cannot be read as an image", "truncated")
    assert not (detector.output / "cut off").exists()


def test_other_classes_end_in_one_line(detector, trained: Path, voc_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    (data / "labels.txt").write_text("red\ngreen\nblue\n")
    best = str(trained / "model_best.pth")
    outcome = detector("undisturbed", "--eval-only", "--weights", best, "--data", str(data))
    assert_one_line(outcome, best, "knows 2 classes", str(data), "has 3, but green; give")

    # A trained detector may start the training of another one; the classes that both name carry over.
    opts = ("SOLVER.MAX_ITER", "1", "TEST.VALIDATION_LOSS_IMAGES", "0")
    code, printed = detector("other", "--weights", best, "--data", str(data), opts=opts)
    assert code == 0, printed
    assert "Classes carried over by name: red, blue; random: green" in printed


def test_full_disk_keeps_the_last_checkpoint(detector, copied: Path) -> None:
    before = (copied / "model_last.pth").read_bytes()
    arguments = detector.arguments(copied.parent.name, "--resume", opts=("SOLVER.MAX_ITER", "16"))
    outcome = detector.server(*arguments, largest_file=len(before) // 2)
    assert_one_line(outcome, f"{copied / 'model_last.pth'}: File too large")
    assert (copied / "model_last.pth").read_bytes() == before
    assert not list(copied.glob(".*"))

    code, printed = detector.server(*arguments)  # with space again
    assert code == 0, printed
    assert rows(copied)[-1]["iteration"] == 15
