"""Which classifier is taken when none is named, and checkpoints in the middle of a run as weights of others."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from classification import evaluate, train
from classification.cub import read_cub
from classification.model import build_model, describe
from classification.predict import BirdClassifier, data_of_run, newest_classifier
from classification.recipe import Recipe, save_recipe
from common.run_folder import append_metrics
from tests.classification.runs import TINY, goes_on, train_in, words


@pytest.fixture
def add_run(tmp_path):
    """Makes the folder of a run that ended at some second with some validation figure; returns its best weights."""

    def add(name: str, second: int, top1: float = 50.0, **settings) -> Path:
        run = tmp_path / "output" / name
        run.mkdir(parents=True)
        save_recipe(Recipe(**settings), run / "config.yaml")
        append_metrics(run, {"iteration": 1, "validation_top1": top1})
        append_metrics(run, {"iteration": 2, "validation_top1": top1 - 10})
        for file in ("model_best.pth", "model_last.pth"):
            (run / file).touch()
            os.utime(run / file, (second, second))
        return run / "model_best.pth"

    return add


def test_the_newest_run_counts(add_run, tmp_path):
    assert newest_classifier(tmp_path / "output") is None
    add_run("resnet18-best", 2, top1=90)
    newest = add_run("resnet18-study-random", 3, pretrained=False)
    add_run("alexnet-study", 1)
    assert newest_classifier(tmp_path / "output") == newest


def test_a_detector_is_none(add_run, tmp_path):
    bird = add_run("resnet18-best", 1)
    detector = add_run("yolov3_darknet53", 2)
    (detector.parent / "config.yaml").write_text("MODEL:\n  META_ARCHITECTURE: YOLOv3\n")
    add_run("bare", 3).with_name("config.yaml").unlink()
    assert newest_classifier(tmp_path / "output") == bird


@pytest.mark.parametrize("file", ["model_best.pth", "model_last.pth"])
@pytest.mark.parametrize("place", ["resnet18-best-2", "resnet18-sample-grid/lr0.1-epochs2"])
def test_what_another_run_began_with_does_not_count(add_run, tmp_path, file, place):
    newest = add_run(place, 2, weights=str(tmp_path / "output" / "other-birds" / file))
    add_run("other-birds", 3)  # extended later, say
    add_run("first", 1)
    assert newest_classifier(tmp_path / "output") == newest


def test_a_trial_of_a_sweep_that_another_run_began_with_does_not_count(add_run, tmp_path):
    best = add_run("sweep/lr0.1", 1, top1=80)
    second = add_run("sweep/lr0.2", 4, top1=70)
    add_run("resnet18-best", 2, weights=str(best))
    assert newest_classifier(tmp_path / "output") == second


def test_of_recipes_that_keep_the_last_epoch_that_one_counts(add_run, tmp_path):
    """It is ten points below the best epoch of each."""
    best = add_run("grid/lr0.1", 1, top1=60, choose="best")
    add_run("grid/lr0.2", 2, top1=65, choose="last")
    assert newest_classifier(tmp_path / "output") == best


def test_of_a_whole_study_the_best_counts_and_not_its_beginnings(add_run, tmp_path):
    beginning = add_run("demo/other-birds-seed0", 1, top1=90)
    add_run("demo/pretraining-seed0/random", 2, top1=20)
    best = add_run("demo/pretraining-seed0/pretrained", 2, top1=60, weights=str(beginning))
    assert newest_classifier(tmp_path / "output") == best


def test_of_a_sweep_the_best_trial_counts(add_run, tmp_path):
    add_run("resnet18-best", 4, top1=99)
    best = add_run("resnet18-best-grid/lr0.02-epochs5", 3, top1=80)
    add_run("resnet18-best-grid/lr0.01-epochs5", 5, top1=70)
    assert newest_classifier(tmp_path / "output") == best
    add_run("resnet18-best-2", 6, top1=1)
    assert newest_classifier(tmp_path / "output").parent.name == "resnet18-best-2"


@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["weights", "averaged weights"])
def last(request, tmp_path_factory, kept_root) -> tuple[Path, dict[str, torch.Tensor]]:
    """`model_last.pth` of a run, and what is to be used of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_in(folder, kept_root, ema_decay=request.param, precision="float32", epochs=1)
    state = torch.load(folder / "model_last.pth", weights_only=True)
    used = state["average" if request.param else "model"]
    assert not request.param or not torch.equal(used["fc.weight"], state["model"]["fc.weight"])
    return folder / "model_last.pth", used


def test_a_run_begins_with_the_last_checkpoint_of_another(last, kept_root, tmp_path, run_main):
    path, used = last
    settings = {"weights": path, "pretrained": True, "epochs": 1, "lr": 1e-30, "weight_decay": 0}
    code, _, complaint = run_main(train.main, *words(kept_root, tmp_path, "run", **settings))
    assert code == 0, complaint
    trained = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)["model"]
    parameters = [name for name, _ in build_model("test_resnet", 5).named_parameters()]
    assert all(torch.equal(trained[name], used[name]) for name in parameters)  # the rate moves nothing


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_with_its_weights(last, kept_root, tmp_path, run_main):
    path, used = last
    settings = {"weights": str(path), "pretrained": True, "epochs": 1, "lr": 1e-30, "weight_decay": 0}
    run = tmp_path / "run"
    run.mkdir()
    save_recipe(Recipe(**{**TINY, "data": str(kept_root), **settings}), run / "config.yaml")
    code, _, complaint = run_main(train.main, *goes_on(tmp_path, "run"))
    assert code == 0, complaint
    trained = torch.load(run / "model_best.pth", weights_only=True)["model"]
    parameters = [name for name, _ in build_model("test_resnet", 5).named_parameters()]
    assert all(torch.equal(trained[name], used[name]) for name in parameters)  # the rate moves nothing


def test_the_data_of_a_run_is_what_it_is_evaluated_on(last, kept_root, tmp_path, run_main, monkeypatch):
    path, _ = last
    save_recipe(Recipe(**{**TINY, "data": str(kept_root)}), path.parent / "config.yaml")
    monkeypatch.setattr("common.data_root.SAMPLE", tmp_path / "sample")  # where else it would look
    code, said, complaint = run_main(evaluate.main, str(path), "--out", str(tmp_path / "report"))
    assert code == 0, complaint
    assert f"on the test split of {kept_root}" in said
    exported = path.parent / "openvino-float32" / "model.xml"
    assert data_of_run(exported) == data_of_run(path) == str(kept_root)


def test_the_last_checkpoint_is_evaluated_and_predicts(last, tiny_root, tmp_path, run_main):
    path, used = last
    birds = read_cub(tiny_root).test
    for bird in birds:
        pixels = np.array(Image.open(bird.path))
        pixels[:8] = 255  # a white edge, of which the crop leaves a part
        Image.fromarray(pixels).save(bird.path)
    card = describe("test_resnet", build_model("test_resnet", 5), BirdClassifier(path).class_names, 32, 0.875)
    torch.save({**card, "model": used}, tmp_path / "alone.pth")
    for weights, name in ((path, "last"), (tmp_path / "alone.pth", "alone")):
        words = [str(weights), "--data", str(tiny_root), "--out", str(tmp_path / name)]
        code, _, complaint = run_main(evaluate.main, *words)
        assert code == 0, complaint
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("last", "alone")]
    assert reports[0] == reports[1]
    # Each photograph by itself is prepared as those of the evaluation are.
    predictions = pd.read_csv(tmp_path / "last" / "predictions.csv")
    for file in (path, tmp_path / "alone.pth"):
        classifier = BirdClassifier(file)
        for bird, row in zip(birds, predictions.itertuples(), strict=True):
            prediction = classifier.predict(bird.path)
            assert prediction.names[0] == row.predicted
            assert prediction.scores[0] == pytest.approx(row.probability, abs=1e-4)
