"""One batch, trained on as a whole, part by part, and shared among processes: the same training, to float rounding.

That holds for a network without BatchNorm, which normalises by the images of a part, and without what a process draws
for its own images: dropout and drop path, mixup and CutMix. Flips and rotations are drawn for each image by its place
in the stream, and are the same everywhere.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import SyncBatchNormAct
from torch import nn

from classification import train
from classification.cub import read_cub
from classification.model import build_model
from classification.recipe import Recipe, load_recipe, scale_to_processes
from classification.run import Run, with_enough_statistics
from common.errors import UserError
from tests.classification.runs import TINY, assert_same_runs, train_in
from tests.processes import together

PLAIN = {
    "model": "test_vit",
    "image_size": 160,
    "rotation": 20,
    "random_erasing": 0.5,
    "label_smoothing": 0.1,
    "clip_grad": 1.0,
    "ema_decay": 0.5,
}
PLAIN |= {"precision": "float32", "drop_rate": 0.0, "workers": 0}


def three_steps(root: Path, settings: dict) -> tuple[dict, dict, dict, dict]:
    """Figures of the epoch, and the last gradients, the weights and their average after it."""
    recipe = Recipe(**{**TINY, **PLAIN, **settings})
    model, recipe = train.build_model_for(recipe, 5, is_sample=False)
    run = Run(recipe, read_cub(root), model, torch.device("cpu"))
    row = run.trainer.train(iter(run.loader), 3)
    figures = {key: row[key] for key in ("train_loss", "train_top1", "lr")}
    parameters = dict(model.named_parameters())
    return (
        figures,
        {name: value.grad.numpy() for name, value in parameters.items()},
        {name: value.detach().numpy() for name, value in parameters.items()},
        {name: run.trainer.average.module.state_dict()[name].numpy() for name in parameters},
    )


@pytest.fixture(scope="module")
def whole(kept_root: Path) -> tuple[dict, dict, dict, dict]:
    return together(1, three_steps, kept_root, {})[0]


@pytest.mark.parametrize(("processes", "parts"), [(1, 2), (1, 8), (2, 1), (2, 2), (4, 1)])
def test_parts_train_as_the_whole_does(kept_root: Path, whole: tuple, processes: int, parts: int) -> None:
    for figures, *states in together(processes, three_steps, kept_root, {"accumulate": parts}):
        assert figures == pytest.approx(whole[0], rel=1e-4)
        for ours, theirs in zip(states, whole[1:], strict=True):
            for name, value in theirs.items():
                scale = max(np.abs(value).max(), 1e-3)
                np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-3 * scale, err_msg=name)


def test_a_run_that_accumulates_goes_on_as_if_it_had_not_been_stopped(tiny_root: Path, tmp_path: Path) -> None:
    settings = {"rotation": 20, "clip_grad": 1.0, "ema_decay": 0.5, "accumulate": 2, "epochs": 3}
    train_in(tmp_path / "whole", tiny_root, **settings)
    with pytest.MonkeyPatch.context() as patch:

        def fail(*arguments) -> None:
            raise KeyboardInterrupt

        patch.setattr("classification.run._log_epoch", fail)  # after the checkpoint of the first epoch
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path / "run", tiny_root, **settings)
    train_in(tmp_path / "run", tiny_root, **settings)
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epoch"] >= 1


@pytest.mark.parametrize("accumulate", [3, 16])
def test_parts_that_do_not_share_the_batch_are_refused(tiny_root: Path, tmp_path: Path, accumulate: int) -> None:
    with pytest.raises(UserError, match=f"batch_size=8: .*accumulate={accumulate}"):
        train_in(tmp_path / "run", tiny_root, accumulate=accumulate)


@pytest.mark.parametrize(("setting", "complaint"), [("0", "expected 1 or more"), ("-1", "1 or more"), ("two", "two")])
def test_parts_that_are_none_are_refused(setting: str, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"accumulate.*{complaint}"):
        load_recipe(train.RECIPES / "best.yaml", [f"accumulate={setting}"])


def test_batch_rate_and_average_follow_the_processes() -> None:
    """The average forgets the same share of its past with every image."""
    recipe = load_recipe(train.RECIPES / "best.yaml")
    four = scale_to_processes(recipe, [], 4)
    assert (four.batch_size, four.lr) == (4 * recipe.batch_size, pytest.approx(4 * recipe.lr))
    assert four.ema_decay == pytest.approx(recipe.ema_decay**4)
    assert (four.epochs, four.warmup, four.accumulate) == (recipe.epochs, recipe.warmup, recipe.accumulate)
    assert scale_to_processes(recipe, [], 1) == recipe
    assert scale_to_processes(recipe, ["lr=0.5", "ema_decay=0.9"], 4).batch_size == four.batch_size
    given = load_recipe(train.RECIPES / "best.yaml", ["batch_size=64", "lr=0.5"])
    assert scale_to_processes(given, ["batch_size=64", "lr=0.5"], 4) == given
    given = load_recipe(train.RECIPES / "best.yaml", ["lr=0.5"])
    assert scale_to_processes(given, ["lr=0.5"], 4).lr == 0.5


GPU, CPU = torch.device("cuda"), torch.device("cpu")


def batch_norms(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}


@pytest.mark.parametrize("name", ["resnet18", "test_byobnet"])
def test_few_images_a_gpu_share_their_statistics(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    caplog.set_level("INFO", logger="classification")
    model = build_model(name, 5)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    expected = model.eval()(images)
    model = with_enough_statistics(model, 7, GPU)
    assert batch_norms(model) <= {nn.SyncBatchNorm, SyncBatchNormAct}
    assert batch_norms(model)
    assert "7 images a process are too few" in caplog.text
    # The same weights under the same names, so that a checkpoint is one of either network.
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    torch.testing.assert_close(model.eval()(images), expected)


@pytest.mark.parametrize(
    ("name", "images", "device", "processes"),
    [("resnet18", 8, GPU, 2), ("resnet18", 2, CPU, 2), ("resnet18", 2, GPU, 1), ("test_vit", 1, GPU, 2)],
)
def test_otherwise_they_do_not(
    monkeypatch: pytest.MonkeyPatch, name: str, images: int, device: torch.device, processes: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    model = build_model(name, 5)
    before = batch_norms(model)
    assert batch_norms(with_enough_statistics(model, images, device)) == before
    assert nn.SyncBatchNorm not in before


def train_tiny(root: Path, settings: dict) -> str:
    try:
        three_steps(root, settings)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("processes", [1, 2])
def test_one_image_at_a_time_is_refused_where_it_is_normalised(kept_root: Path, processes: int) -> None:
    for complaint in together(processes, train_tiny, kept_root, {"model": "test_resnet", "accumulate": 8 // processes}):
        assert complaint.startswith("batch_size: BatchNorm would see one image at a time, expected 2 or more")
        assert "\n" not in complaint
