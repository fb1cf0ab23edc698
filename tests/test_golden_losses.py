"""The first losses of each recipe on the drawn sample, in float32 on one thread, beside those that were kept.

A change that moves them changes what is trained: `python -m tests.test_golden_losses` then writes them anew, and the
commit says why they moved. Twenty are kept, for an eye to compare, and the first eight are tested: what another
processor or number of threads rounds otherwise grows with every step, and changes the order of the proposals that
Faster R-CNN draws from.
"""

import json
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from classification.cub import read_cub
from classification.run import Run
from classification.train import build_model_for, parse_request, resolve
from common.sample import draw_sample
from detection.experiment import new_experiment
from detection.hooks import BestCheckpoint, Evaluate, LastCheckpoint, MetricsWriter
from detection.train_net import parse_args
from detection.trainer import Trainer

STEPS, TESTED = 20, 8
KEPT = Path(__file__).parent / "golden" / "losses.json"
# How far apart two numbers of threads, or two processors, are after so many steps.
CLOSE = {"faster_rcnn": 5e-2, "yolov3": 5e-3, "birds": 1e-2}
RECIPES = ["faster_rcnn best", "faster_rcnn study", "yolov3 best", "yolov3 study", "birds sample"]
# Settings of a detector's recipe that no loss depends on.
UNSEEN = ("TEST.", "SOLVER.EMA_DECAY", "SOLVER.STEPS_EPOCHS", "MODEL.ROI_HEADS.NMS_THRESH_TEST")


def resolved(model: str, recipe: str, data: Path) -> CfgNode:
    options = {"MODEL.PRECISION": "float32", "MODEL.DEVICE": "cpu", "TEST.VALIDATION_LOSS_IMAGES": 0}
    opts = [str(word) for pair in options.items() for word in pair]
    experiment = new_experiment(
        parse_args(["--model", model, "--recipe", recipe, "--data", str(data), "--pretrained", "0", *opts])
    )
    experiment.resolve()
    return experiment.cfg


def detector_losses(model: str, recipe: str, data: Path, steps: int) -> list[float]:
    trainer = Trainer(resolved(model, recipe, data))
    trainer._hooks = [
        hook
        for hook in trainer._hooks
        if not isinstance(hook, Evaluate | BestCheckpoint | MetricsWriter | LastCheckpoint)
    ]
    losses = []
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(steps):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            losses.append(trainer.mean_losses(1)["total_loss"])
    return losses


def bird_losses(recipe: str, data: Path, steps: int) -> list[float]:
    settings = ["pretrained=false", "precision=float32", "workers=0"]
    _, settled, root, is_sample = resolve(parse_request([recipe, f"data={data}", *settings]))
    cub = read_cub(root)
    model, settled = build_model_for(settled, len(cub.class_names), is_sample)
    run = Run(settled, cub, model, torch.device("cpu"))
    sums = [0.0]
    run.trainer.train(iter(run.loader), steps, lambda: sums.append(run.trainer.sums[0].item()))
    return [(later - earlier) / settled.batch_size for earlier, later in pairwise(sums)]


def losses_of(recipe: str, data: Path, steps: int) -> list[float]:
    network, name = recipe.split()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if network == "birds":
            return bird_losses(name, data, steps)
        return detector_losses(network, name, data, steps)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "faster_rcnn study"])
def test_first_losses_are_those_that_were_kept(recipe: str, drawn_sample: Path) -> None:
    kept = json.loads(KEPT.read_text())[recipe][:TESTED]
    assert losses_of(recipe, drawn_sample, TESTED) == pytest.approx(kept, rel=CLOSE[recipe.split()[0]])


def test_both_recipes_of_faster_rcnn_are_one_on_the_sample(drawn_sample: Path) -> None:
    """So one of them is enough above: the sample's file replaces all that a loss depends on."""
    best, study = (dict(flat(resolved("faster_rcnn", recipe, drawn_sample))) for recipe in ("best", "study"))
    assert {key for key in best if best[key] != study[key] and not key.startswith(UNSEEN)} == set()
    kept = json.loads(KEPT.read_text())
    assert kept["faster_rcnn best"] == kept["faster_rcnn study"]


def flat(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw_sample(Path(folder) / "sample")
        kept = {recipe: losses_of(recipe, Path(folder) / "sample", STEPS) for recipe in RECIPES}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
