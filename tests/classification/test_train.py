"""One training: what it learns, chooses, and leaves behind."""

import json
import math

import pytest
import torch

from classification.cub import read_cub
from classification.model import build_model, load_classifier
from classification.recipe import Recipe
from classification.run import Run
from classification.train import main
from common.errors import UserError
from common.run_folder import read_metrics
from tests.classification.runs import EVERYTHING, TINY, assert_same, train_in


def test_it_learns_colours_and_leaves_a_whole_run_folder(tiny_root, tmp_path):
    result = train_in(tmp_path / "run", tiny_root, epochs=8)
    assert result["top1"] >= 80
    assert result["chosen"] == "the best on the test split"
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(2, 24, 3))
    assert result["validation_top1"] == max(row["validation_top1"] for row in rows)
    assert result["top1"] == pytest.approx(result["validation_top1"], abs=10)  # of ten images, bfloat16 may move one
    assert {"results.csv", "results.png", "model_best.pth", "model_last.pth"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    assert list((tmp_path / "run").glob("events.out.*"))
    model, card = load_classifier(tmp_path / "run" / "model_best.pth")
    assert card["class_names"][0] == "Red Bird"
    assert card["validation_top1"] == result["validation_top1"]
    assert not model.training


def test_loading_processes_and_the_cache_change_nothing(tiny_root, tmp_path):
    weights = []
    for name, settings in {
        "cached": {},
        "decoded": {"cache": False, "workers": 0},
        "workers": {"cache": False},
    }.items():
        train_in(tmp_path / name, tiny_root, **{**EVERYTHING, "epochs": 2, **settings})
        weights.append(torch.load(tmp_path / name / "model_last.pth", weights_only=True))
    assert_same(weights[0], weights[1])
    assert_same(weights[0], weights[2])


def test_held_out_images_choose_and_the_test_split_is_used_once(tiny_root, tmp_path):
    result = train_in(tmp_path / "run", tiny_root, holdout=0.34, epochs=2)
    assert result["chosen"] == "the best on 10 images held out of the training split"
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["iteration"] == 2 * (20 // 8) - 1
    assert result["validation_top1"] == max(row["validation_top1"] for row in rows)
    # Spoilt test images go unnoticed until the very end.
    for bird in read_cub(tiny_root).test:
        bird.path.write_bytes(b"spoilt")
    with pytest.raises(UserError, match="cannot be read as an image"):
        train_in(tmp_path / "spoilt", tiny_root, holdout=0.34, epochs=2)
    assert len(read_metrics(tmp_path / "spoilt")) == 2


def test_the_last_epoch_is_kept_whatever_its_validation_says(tiny_root, tmp_path):
    result = train_in(tmp_path / "run", tiny_root, choose="last", epochs=4, lr=1e-12)
    rows = read_metrics(tmp_path / "run")
    assert max(row["validation_top1"] for row in rows[:-1]) >= rows[-1]["validation_top1"]  # no reason to choose it
    assert (result["epoch"], result["chosen"]) == (4, "the last")
    best, last = (
        torch.load(tmp_path / "run" / f"model_{name}.pth", weights_only=True)["model"] for name in ("best", "last")
    )
    assert_same(best, last)


def test_patience_stops_and_a_stopped_run_stays_stopped(tiny_root, tmp_path, caplog):
    caplog.set_level("INFO", logger="classification")
    settings = {"epochs": 30, "patience": 2, "lr": 1e-12, "flip": 0.0}
    first = train_in(tmp_path / "run", tiny_root, **settings)
    assert "Stopped early" in caplog.text
    assert len(read_metrics(tmp_path / "run")) == first["epoch"] + 2
    assert train_in(tmp_path / "run", tiny_root, **settings) == first
    assert len(read_metrics(tmp_path / "run")) == first["epoch"] + 2


def test_a_diverging_run_says_so(tiny_root, tmp_path):
    with pytest.raises(UserError, match="the run diverged; lower the rate"):
        train_in(tmp_path / "run", tiny_root, lr=1e30)


def test_a_last_step_that_diverges_leaves_the_checkpoints_before_it(tiny_root, tmp_path):
    """Its own loss was computed before it, and is finite."""
    train_in(tmp_path / "run", tiny_root, epochs=1)
    files = [tmp_path / "run" / name for name in ("model_best.pth", "model_last.pth")]
    before = [file.read_bytes() for file in files]
    recipe, model = Recipe(**{**TINY, "epochs": 2}), build_model("test_resnet", 5)
    training = Run(recipe, read_cub(tiny_root), model, torch.device("cpu"), tmp_path / "run")
    train = training.trainer.train

    def train_and_explode(*arguments):
        row = train(*arguments)
        with torch.no_grad():
            next(training.model.parameters()).fill_(math.inf)
        return row

    training.trainer.train = train_and_explode
    with pytest.raises(UserError, match="a weight is no number after iteration 6: the run diverged"):
        training.train(tmp_path / "run")
    assert [file.read_bytes() for file in files] == before


def test_a_batch_larger_than_the_data_is_refused(tiny_root, tmp_path):
    with pytest.raises(UserError, match="at most the 30 training images"):
        train_in(tmp_path / "run", tiny_root, batch_size=32)


@pytest.mark.parametrize(
    ("holdout", "processes", "images"), [(0.0, 12, 10), (0.1, 6, 5), (0.5, 12, 10)], ids=["test", "held out", "fewer"]
)
def test_fewer_images_to_measure_on_than_processes_are_refused(
    tiny_root, tmp_path, monkeypatch, holdout, processes, images
):
    """10 pictures to test on; of the 6 training pictures of each of 5 classes 1 or 3 are held out."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=f"^{images} images to .* at least {processes}, one a process: lower NGPU$"):
        train_in(tmp_path / "run", tiny_root, holdout=holdout, batch_size=processes)


def test_alexnet_trains_too(tiny_root):
    recipe = Recipe(**{**TINY, "model": "alexnet", "image_size": 64})
    training = Run(recipe, read_cub(tiny_root), build_model("alexnet", 5), torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    row = training.trainer.train(iter(training.loader), 1)  # and no file of a quarter of a gigabyte
    assert row["train_loss"] > 0
    assert all((new != old).any() for new, old in zip(training.model.parameters(), before, strict=True))


def test_weights_of_the_wrong_model_stop_the_run(tiny_root, tmp_path):
    torch.save(build_model("resnet18", 1000).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth: does not fit the model"):
        train_in(tmp_path / "run", tiny_root, pretrained=True, weights=str(tmp_path / "resnet18.pth"))


@pytest.mark.parametrize("cache", ["true", "false"])
def test_pictures_that_are_none_are_named_before_a_training_begins(tiny_root, tmp_path, run_main, cache):
    """One to train on and one to test on, the last of all."""
    cub = read_cub(tiny_root)
    spoilt = [cub.train[3].path, cub.test[-1].path]
    for path in spoilt:
        path.write_text("none")
    words = ["study", f"data={tiny_root}", "model=test_resnet", "pretrained=0", f"cache={cache}", "workers=0"]
    code, _, said = run_main(main, *words, "--output", str(tmp_path / "output"))
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"error: {spoilt[0]}: cannot be read as an image (")
    assert line.endswith(f"; 1 more cannot be taken: {spoilt[1]}")
    assert not (tmp_path / "output").exists()
