"""One batch, trained on as a whole, part by part, and shared among processes: the same training, to float rounding.

That holds where nothing is normalised over what a process sees at once and nothing is drawn by it. Elsewhere it cannot:

- BatchNorm normalises by the images of its part (here the norms are frozen, or in evaluation).
- RPN and ROI heads draw the anchors and proposals that they learn from, each process for itself and each part anew; and
  the losses of the ROI heads are means over the proposals of a part, of which images may have unequally many (here all
  are taken, and none is suppressed or added).
- Images are padded to the largest of their part, and see their padding (here all have one size).
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.nn.modules.batchnorm import _BatchNorm

from common.errors import UserError
from common.run_folder import read_metrics
from detection.experiment import Experiment, new_experiment
from detection.train_net import parse_args
from detection.trainer import Trainer
from tests.conftest import ForkServer, end_well
from tests.processes import together

STEPS = 3
PLAIN = {
    "MODEL.PRECISION": "float32",
    "MODEL.DEVICE": "cpu",
    "INPUT.SQUARE_SIZES_TRAIN": [64],
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.MAX_ITER": 12,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.EMA_DECAY": 0.5,
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.VALIDATION_LOSS_IMAGES": 0,
}
NETWORKS = {
    "faster_rcnn": {
        "MODEL.RESNETS.NORM": "FrozenBN",
        # Proposals stay close to their anchors, so that none leaves the image, where it would be empty.
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
        "MODEL.RPN.BBOX_REG_WEIGHTS": (100.0, 100.0, 100.0, 100.0),
        "MODEL.RPN.NMS_THRESH": 1.1,
        **{f"MODEL.RPN.{when}_NMS_TOPK_TRAIN": 2000 for when in ("PRE", "POST")},  # an image has 1023 anchors
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 4096,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4096,
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    },
    "yolov3": {
        "MODEL.TIMM.NAME": "resnet10t",
        "MODEL.YOLOV3.CONV_DIMS": [8, 16, 32],
        "MODEL.YOLOV3.NUM_CONVS": [1, 1, 1],
        "INPUT.AUGMENTATIONS": ["RandomHorizontalFlip"],
        "INPUT.MIXUP_PROB": 0.0,
        "INPUT.CLOSE_ITERS": 0,
    },
}


def words_of(options: dict) -> list[str]:
    return [str(word) for pair in options.items() for word in pair]


def experiment(model: str, data: Path, opts: list[str], recipe: str = "best") -> Experiment:
    asked = new_experiment(
        parse_args(["--model", model, "--recipe", recipe, "--data", str(data), "--pretrained", "0", *opts])
    )
    asked.resolve()
    return asked


def train(model: str, data: Path, opts: list[str]) -> tuple[list[dict], dict, dict, dict]:
    """The losses of each step, and the last gradients, the weights and their average after them."""
    trainer = Trainer(experiment(model, data, opts).cfg)
    for module in trainer.bare_model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    trainer._hooks = trainer._hooks[:4]  # seeds, times, rate and average
    losses = []
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(STEPS):
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            losses.append(trainer.mean_losses(1))
    parameters = dict(trainer.bare_model.named_parameters())
    gradients = {name: value.grad.numpy() for name, value in parameters.items() if value.grad is not None}
    average = {name: value.numpy() for name, value in trainer.averaging.average.module.state_dict().items()}
    return losses, gradients, {name: value.detach().numpy() for name, value in parameters.items()}, average


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, voc_folder: Path, tiny_opts: list[str]) -> tuple[str, Path, list[str]]:
    tiny = tiny_opts if request.param == "faster_rcnn" else []
    return request.param, voc_folder, [*tiny, *words_of({**PLAIN, **NETWORKS[request.param]})]


@pytest.fixture(scope="module")
def whole(network: tuple[str, Path, list[str]]) -> tuple[list[dict], dict, dict, dict]:
    return together(1, train, *network)[0]


@pytest.mark.parametrize(("processes", "parts"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_parts_train_as_the_whole_does(network: tuple, whole: tuple, processes: int, parts: int) -> None:
    model, data, opts = network
    for losses, *states in together(processes, train, model, data, [*opts, "SOLVER.ACCUMULATE", str(parts)]):
        assert len(losses) == STEPS
        for ours, theirs in zip(losses, whole[0], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        for ours, theirs in zip(states, whole[1:], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                scale = max(np.abs(value).max(), 1e-3)
                np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-3 * scale, err_msg=name)


@pytest.mark.parametrize("network", ["faster_rcnn"], indirect=True)
def test_two_machines_of_slurm_train_as_the_whole_does(
    network: tuple, whole: tuple, fork_server: ForkServer, tmp_path: Path
) -> None:
    """On loopback, and with no variable but SLURM's own."""
    model, data, opts = network
    given = dict(zip(opts[::2], opts[1::2], strict=True))
    del given["INPUT.MIN_SIZE_TRAIN"]  # which a command line would refuse beside SQUARE_SIZES_TRAIN
    given |= {"SOLVER.MAX_ITER": str(STEPS), "SOLVER.LOG_PERIOD": "1", "TEST.EVAL_PERIOD": "0"}
    words = ["detection.train_net", "--model", model, "--data", str(data)]
    words += ["--pretrained", "0", "--output", str(tmp_path), *words_of(given)]
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    end_well([fork_server.start(*words, **slurm, SLURM_NODEID=str(node)) for node in range(2)])
    (run,) = tmp_path.iterdir()
    for row, losses in zip(read_metrics(run), whole[0], strict=True):
        assert {name: row[name] for name in losses} == pytest.approx(losses, rel=1e-4)


def test_losses_would_show_a_part_that_is_left_out(network: tuple, whole: tuple) -> None:
    """The tolerance above is far below what the images of a batch differ by."""
    model, data, opts = network
    halved = together(1, train, model, data, [*opts, "SOLVER.IMS_PER_BATCH", "2"])[0]
    assert abs(halved[0][0]["total_loss"] / whole[0][0]["total_loss"] - 1) > 1e-3


def test_interrupted_run_that_accumulates_ends_as_the_undisturbed_one(detector) -> None:
    opts = ("SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "4", "TEST.EVAL_PERIOD", "0", "SOLVER.LOG_PERIOD", "1")
    runs = {name: detector.output / name / "faster_rcnn_R_50_FPN" for name in ("accumulates", "accumulates on")}
    whole, stopped = runs.values()
    code, printed = detector("accumulates", opts=opts)
    assert code == 0, printed
    process = detector.server.start(*detector.arguments("accumulates on", opts=opts))
    while not (stopped / "model_last.pth").exists():
        time.sleep(0.01)
    os.kill(process.number, signal.SIGINT)
    code, printed = process.end()
    assert code == 130, printed
    code, printed = detector.later("accumulates on", "--resume")
    assert code == 0, printed
    rows = [
        [{key: value for key, value in row.items() if "time" not in key} for row in read_metrics(run)]
        for run in (whole, stopped)
    ]
    assert rows[0] == rows[1]
    ours, theirs = (torch.load(run / "model_last.pth", weights_only=True)["model"] for run in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("recipe", ["best", "study"])
@pytest.mark.parametrize("model", NETWORKS)
def test_one_process_that_accumulates_keeps_the_recipe_of_four(
    model: str, recipe: str, voc_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = experiment(model, voc_folder, [], recipe).cfg.SOLVER
    in_parts = experiment(model, voc_folder, ["SOLVER.ACCUMULATE", "4"], recipe).cfg.SOLVER
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = experiment(model, voc_folder, [], recipe).cfg.SOLVER
    assert {key: in_parts[key] for key in four} == {**four, "ACCUMULATE": 4}
    for key in ("IMS_PER_BATCH", "BASE_LR"):
        assert four[key] == pytest.approx(4 * one[key])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("SOLVER.ACCUMULATE 0", "SOLVER.ACCUMULATE 0: expected 1 or more"),
        ("SOLVER.ACCUMULATE -2", "SOLVER.ACCUMULATE -2: expected 1 or more"),
        ("SOLVER.ACCUMULATE 1.5", "SOLVER.ACCUMULATE 1.5: Type mismatch"),
        ("SOLVER.ACCUMULATE two", "SOLVER.ACCUMULATE two: Type mismatch"),
        (
            "SOLVER.IMS_PER_BATCH 4 SOLVER.ACCUMULATE 3",
            "SOLVER.IMS_PER_BATCH 4: expected a multiple of the 1 processes",
        ),
    ],
)
def test_wrong_parts_are_one_line(voc_folder: Path, options: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        experiment("faster_rcnn", voc_folder, options.split())
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_is_shared_among_processes_times_parts(voc_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"multiple of the 2 processes times SOLVER\.ACCUMULATE 4"):
        experiment("faster_rcnn", voc_folder, ["SOLVER.ACCUMULATE", "4", "SOLVER.IMS_PER_BATCH", "4"])
