"""What trainings are said to take: numbers of steps from their schedules, bytes as they are then written."""

import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from classification.cub import read_cub
from classification.model import build_model
from classification.recipe import Recipe
from classification.run import Run
from common.errors import UserError
from common.log import RunLog
from detection.train_net import parse_args, train
from tests.birds import draw_birds
from tests.tools.scenes import TINY, TINY_FRCNN, draw_voc
from tools import estimate
from tools.plan import estimate_key

TRAINED, TESTED = 0.5, 0.25  # seconds an image


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are taken, and said to take so long."""
    seconds = iter((TRAINED, TESTED))

    def of(step) -> float:
        assert step() > 0
        return next(seconds)

    monkeypatch.setattr(estimate, "_seconds_per_image", of)
    monkeypatch.delenv("NGPU", raising=False)


BIRD = ["study", "model=test_resnet", "image_size=32", "batch_size=8", "pretrained=false"]


@pytest.mark.parametrize(
    ("module", "options", "flags", "lengths"),
    [
        ("tools.launch classification.train", ["epochs=3"], [], [3]),
        ("classification.sweep grid", [], ["--lrs", "0.1 0.2 0.3", "--epochs", "1 2"], [1, 2] * 3),
        ("classification.sweep pretraining", ["epochs=4"], [], [4, 4]),
    ],
)
def test_birds_are_counted(
    tmp_path: Path, clock, module: str, options: list[str], flags: list[str], lengths: list[int]
) -> None:
    """30 training and 10 test pictures in batches of 8: 24 and 10 an epoch, and the test once more at the end."""
    root = draw_birds(tmp_path)
    words = [*module.split(), *BIRD, f"data={root}", *options, *flags, "seed=1", "--name", "x", "--output", "o"]
    found = estimate.estimate(words)
    assert found.seconds == pytest.approx(sum(n * (24 * TRAINED + 10 * TESTED) + 10 * TESTED for n in lengths))
    assert (found.test_images, found.test_seconds) == (10, TESTED)


def test_parts_of_a_batch_with_an_odd_number_of_images_are_timed_too(tmp_path: Path, clock) -> None:
    """Mixup takes pairs: the 20 images of a batch in four parts of five train, since the pairs are of the batch."""
    settings = [*BIRD, f"data={draw_birds(tmp_path)}", "batch_size=20", "accumulate=4", "cutmix=1", "epochs=1"]
    found = estimate.estimate(["classification.train", *settings, "--name", "x", "--output", "o"])
    assert found.seconds == pytest.approx(20 * TRAINED + 20 * TESTED)


def test_an_image_takes_what_it_takes_in_the_fastest_step_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 images each: 9 s to warm up; 0.8, 0.4 and 0.8 s, which are together more than the 1.5 s that are timed."""
    seconds, now = [9.0, 0.8, 0.4, 0.8, 0.04], 0.0

    def step() -> int:
        nonlocal now
        now += seconds.pop(0)
        return 4

    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now)
    assert estimate._seconds_per_image(step) == pytest.approx(0.1)
    assert seconds == [0.04]


def test_an_estimate_counts_for_its_number_of_processes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for number in ("1", "4", None):
        monkeypatch.setenv("NGPU", number) if number else monkeypatch.delenv("NGPU")
        keys.add(estimate_key(["classification.train", *BIRD]))
    assert len(keys) == 3


@pytest.mark.parametrize("number", ["two", "0", "-1", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    monkeypatch.setenv("NGPU", number)
    with pytest.raises(UserError, match=f"^NGPU={number}: expected a whole number, 1 or more$"):
        estimate._processes()


def test_several_processes_share_the_images_and_held_out_ones_are_no_training(
    tmp_path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPU", "4")
    words = [*BIRD, f"data={draw_birds(tmp_path)}", "epochs=2", "holdout=0.5"]
    found = estimate.estimate(["tools.launch", "classification.train", *words, "--name", "x", "--output", "o"])
    assert found.seconds == pytest.approx((2 * (8 * TRAINED + 15 * TESTED) + 10 * TESTED) / 4)


def test_bytes_of_a_classifier_are_those_that_it_writes(tmp_path: Path) -> None:
    root, run = draw_birds(tmp_path / "data"), tmp_path / "run"
    run.mkdir()
    recipe = Recipe(model="test_resnet", image_size=32, batch_size=8, epochs=1, pretrained=False, ema_decay=0.9)
    model = build_model(recipe.model, 5)
    Run(recipe, read_cub(root), model, torch.device("cpu")).train(run)
    written = sum(path.stat().st_size for path in run.glob("*.pth"))
    words = [*BIRD, f"data={root}", "epochs=1", "ema_decay=0.9"]
    found = estimate.estimate(["classification.train", *words, "--name", "x", "--output", "o"])
    assert found.size == pytest.approx(written, rel=0.1)


def test_a_detector_is_counted_and_its_bytes_are_those_that_it_writes(
    tmp_path: Path, clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 iterations of 2 images, evaluated after 3 and at the end: 4 test images each, and the losses of 2."""
    draw_voc(tmp_path / "data")
    settings = {**TINY, **TINY_FRCNN, "SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 3, "SOLVER.STEPS": (3,)}
    options = [str(word) for pair in settings.items() for word in pair]
    words = ["--model", "faster_rcnn", "--data", str(tmp_path / "data"), "--output", str(tmp_path), "--name", "mine"]
    found = estimate.estimate(["tools.launch", "detection.train_net", *words, *options])
    assert found.seconds == pytest.approx(8 * TRAINED + 2 * (4 + 2) * TESTED)
    # In two parts a batch is one image, of which the step that is timed has one.
    trainer = Mock(side_effect=estimate.Trainer)
    monkeypatch.setattr(estimate, "Trainer", trainer)
    monkeypatch.setattr(estimate, "_few", lambda batch, is_of_all: batch)
    monkeypatch.setattr(estimate, "_seconds_per_image", lambda step: step() and TRAINED)
    estimate.estimate(["detection.train_net", *words, *options, "SOLVER.ACCUMULATE", "2"])
    assert trainer.call_args.args[0].SOLVER.IMS_PER_BATCH == 1
    train(parse_args([*words, *options]), RunLog("detection"))
    written = sum(path.stat().st_size for path in (tmp_path / "mine").glob("*.pth"))
    assert found.size - 4 * 100 * estimate.BYTES_OF_DETECTION == pytest.approx(written, rel=0.2)


def test_what_a_run_will_start_from_need_not_be_there_yet(tmp_path: Path, clock) -> None:
    root = draw_birds(tmp_path)
    words = [*BIRD[:-1], f"data={root}", "epochs=1", "weights=o/other-seed0/model_best.pth"]
    found = estimate.estimate(["classification.train", *words, "--name", "x", "--output", "o"])
    assert math.isfinite(found.seconds)


@pytest.mark.parametrize(("is_of_all", "share"), [(False, 64), (True, 16)])
def test_a_batch_that_the_user_gives_is_shared_out(
    monkeypatch: pytest.MonkeyPatch, is_of_all: bool, share: int
) -> None:
    monkeypatch.setattr(estimate, "default_device", lambda: "cuda")
    monkeypatch.setenv("NGPU", "4")
    assert estimate._few(64, is_of_all) == share
