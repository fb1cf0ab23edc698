"""The first 20 losses of each recipe on the drawn sample, in float32, beside those that were kept.

A change that moves them changes what is trained: `python -m tests.test_golden_losses` then writes them anew, and the
commit says why they moved.
"""

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from classification.cub import read_cub
from classification.run import Run
from classification.train import build_model_for, parse_request, resolve
from common.sample import draw_sample
from detection.experiment import new_experiment
from detection.hooks import BestCheckpoint, Evaluate, LastCheckpoint, MetricsWriter
from detection.trainer import Trainer

STEPS = 20
KEPT = Path(__file__).parent / "golden" / "losses.json"
RECIPES = ["faster_rcnn best", "faster_rcnn study", "yolov3 best", "yolov3 study", "birds sample"]


def detector_losses(model: str, recipe: str, data: Path) -> list[float]:
    options = {"MODEL.PRECISION": "float32", "MODEL.DEVICE": "cpu", "TEST.VALIDATION_LOSS_IMAGES": 0}
    opts = [str(word) for pair in options.items() for word in pair]
    experiment = new_experiment(
        argparse.Namespace(
            model=model, recipe=recipe, config=None, data=str(data), weights=None, pretrained=0, opts=opts
        )
    )
    experiment.resolve()
    trainer = Trainer(experiment.cfg)
    trainer._hooks = [
        hook
        for hook in trainer._hooks
        if not isinstance(hook, Evaluate | BestCheckpoint | MetricsWriter | LastCheckpoint)
    ]
    losses = []
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(STEPS):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            losses.append(trainer.mean_losses(1)["total_loss"])
    return losses


def bird_losses(recipe: str, data: Path) -> list[float]:
    settings = ["pretrained=false", "precision=float32", "workers=0"]
    _, settled, root, is_sample = resolve(parse_request([recipe, f"data={data}", *settings]))
    cub = read_cub(root)
    model, settled = build_model_for(settled, len(cub.class_names), is_sample)
    run = Run(settled, cub, model, torch.device("cpu"))
    sums = [0.0]
    run.trainer.train(iter(run.loader), STEPS, lambda: sums.append(run.trainer.sums[0].item()))
    return [(later - earlier) / settled.batch_size for earlier, later in pairwise(sums)]


def losses_of(recipe: str, data: Path) -> list[float]:
    network, name = recipe.split()
    return bird_losses(name, data) if network == "birds" else detector_losses(network, name, data)


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_losses_are_those_that_were_kept(recipe: str, drawn_sample: Path) -> None:
    # Processors round differently, and twenty steps let that grow.
    assert losses_of(recipe, drawn_sample) == pytest.approx(json.loads(KEPT.read_text())[recipe], rel=2e-2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw_sample(Path(folder) / "sample")
        kept = {recipe: losses_of(recipe, Path(folder) / "sample") for recipe in RECIPES}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
