"""Resumed runs: what may change takes effect, what may not is refused, and whatever fails leaves the run as it was."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer

from common.run_folder import read_metrics
from detection.config import read_run_cfg
from detection.modeling import build_model
from tests.detection.runs import NAME, assert_one_line


def resume(detector, run: Path, *opts: str) -> tuple[int, str]:
    return detector.later(run.parent.name, "--resume", opts=opts)


def last(run: Path) -> dict:
    return torch.load(run / "model_last.pth", weights_only=True)


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def rates(run: Path) -> dict[int, float]:
    return {row["iteration"]: row["lr"] for row in read_metrics(run)}


def solver(run: Path) -> CfgNode:
    return read_run_cfg(run).SOLVER


def weights_with_momentum(run: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
    """The weights of the last checkpoint with their momentum and the group of the optimizer that they belong to."""
    checkpoint = last(run)
    model = build_model(read_run_cfg(run, ["MODEL.DEVICE", "cpu"]))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(read_run_cfg(run), model).param_groups
    state = checkpoint["trainer"]["optimizer"]
    for group, saved in zip(groups, state["param_groups"], strict=True):
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            yield checkpoint["model"][names[parameter]], state["state"][index]["momentum_buffer"], saved


def test_settings_of_the_optimizer_take_effect(detector, copied: Path) -> None:
    """One iteration on from the same checkpoint, twice: what differs is what the settings make of SGD."""
    before = [(weight, momentum) for weight, momentum, _ in weights_with_momentum(copied)]
    common = ("SOLVER.MAX_ITER", "13", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0")
    other = copied.parent.with_name("other settings") / NAME
    shutil.copytree(copied, other)
    assert resume(detector, copied, *common)[0] == 0
    changed = ("SOLVER.BASE_LR", "0.003", "SOLVER.WEIGHT_DECAY", "0.1", "SOLVER.MOMENTUM", "0.5", "TEST.PATIENCE", "7")
    code, printed = resume(detector, other, *common, *changed)
    assert code == 0, printed
    assert "rate 0.003" in printed

    assert rates(copied)[12] == pytest.approx(0.002)
    assert rates(other)[12] == pytest.approx(0.003)
    assert read_run_cfg(other).TEST.PATIENCE == 7
    decayed = 0
    for (weight, momentum), one, two in zip(
        before, weights_with_momentum(copied), weights_with_momentum(other), strict=True
    ):
        decay = one[2]["weight_decay"], two[2]["weight_decay"]
        # BatchNorm has a decay of its own, 0, and another weight is decayed as the configuration says.
        assert decay in ((1e-4, 0.1), (0.0, 0.0))
        decayed += decay[0] > 0
        assert (one[2]["momentum"], two[2]["momentum"]) == (0.9, 0.5)
        # momentum' = m momentum + gradient + decay weight, by the same gradient.
        expected = (0.9 - 0.5) * momentum + (decay[0] - decay[1]) * weight
        torch.testing.assert_close(one[1] - two[1], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one[0], weight - 0.002 * one[1])
        torch.testing.assert_close(two[0], weight - 0.003 * two[1])
    assert decayed > 50


def test_finished_run_is_extended_with_the_shares_of_its_schedule(detector, copied: Path) -> None:
    # 12 iterations with a step at 9 and a warm-up of 3 become 24 with 18 and 6.
    code, printed = resume(detector, copied, "SOLVER.MAX_ITER", "24", "TEST.EVAL_PERIOD", "0")
    assert code == 0, printed
    assert "iteration 13 of 24 iterations of 4 images, rate 0.002, times 0.1 at 18, warm-up 6" in printed
    assert (solver(copied).STEPS, solver(copied).WARMUP_ITERS) == ((18,), 6)
    assert {iteration: rate for iteration, rate in rates(copied).items() if iteration > 11} == pytest.approx(
        {14: 0.002, 17: 0.002, 20: 0.0002, 23: 0.0002}
    )
    assert list(rates(copied)) == sorted(rates(copied))

    code, printed = resume(detector, copied)
    assert code == 0
    assert "is complete" in printed


def test_a_run_goes_on_in_another_precision_and_in_more_parts(detector, copied: Path) -> None:
    """As on a smaller GPU; float16 alone scales its losses, and the checkpoint of another says nothing of a scale."""
    options = ("SOLVER.MAX_ITER", "14", "TEST.EVAL_PERIOD", "0", "MODEL.PRECISION", "float16", "SOLVER.ACCUMULATE", "2")
    code, printed = resume(detector, copied, *options)
    assert code == 0, printed
    assert read_metrics(copied)[-1]["iteration"] == 13


def test_run_is_extended_in_epochs(detector, copied: Path) -> None:
    # 10 images in batches of 4: 6 epochs are 15 iterations.
    code, printed = resume(detector, copied, "SOLVER.MAX_EPOCHS", "6", "TEST.EVAL_PERIOD", "0")
    assert code == 0, printed
    assert "of 15 iterations" in printed
    assert read_metrics(copied)[-1]["iteration"] == 14


def test_run_that_stopped_early_goes_on_to_a_shorter_end(detector) -> None:
    code, printed = detector("early", opts=("TEST.EVAL_PERIOD", "1", "TEST.PATIENCE", "1", "TEST.MIN_RISE", "2"))
    assert code == 0, printed
    run = detector.output / "early" / NAME
    assert read_metrics(run)[-1]["iteration"] == 1
    code, printed = resume(detector, run, "SOLVER.MAX_ITER", "8", "TEST.PATIENCE", "0", "TEST.EVAL_PERIOD", "0")
    assert code == 0, printed
    assert (solver(run).STEPS, solver(run).WARMUP_ITERS) == ((6,), 2)
    assert rates(run)[7] == pytest.approx(0.0002)


def test_given_steps_are_taken_as_given(detector, copied: Path) -> None:
    code, printed = resume(detector, copied, "SOLVER.MAX_ITER", "16", "SOLVER.STEPS", "(14,)", "TEST.EVAL_PERIOD", "0")
    assert code == 0, printed
    assert solver(copied).STEPS == (14,)
    assert solver(copied).WARMUP_ITERS == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("SOLVER.IMS_PER_BATCH 2", "SOLVER.IMS_PER_BATCH was 4, asked for is 2"),
        ("MODEL.FPN.OUT_CHANNELS 32", "MODEL.FPN.OUT_CHANNELS was 16, asked for is 32"),
        ("MODEL.ROI_HEADS.NUM_CLASSES 3", "comes from the data"),
        ("MODEL.CLASSES ['one']", "comes from the data"),
        ("INPUT.AUGMENTATIONS []", "INPUT.AUGMENTATIONS was ['RandomHorizontalFlip']"),
        ("INPUT.MIN_SIZE_TRAIN (40,)", "INPUT.MIN_SIZE_TRAIN was (48, 64)"),
        ("INPUT.MOSAIC_PROB 0.5", "INPUT.MOSAIC_PROB was 0.0"),
        ("SEED 1", "SEED was 0"),
        ("SOLVER.MAX_ITER 20 SOLVER.WEIGHT_DECAY_BIAS 0.0", "SOLVER.WEIGHT_DECAY_BIAS was None, asked for is 0.0"),
        ("SOLVER.MAX_ITER 20 SOLVER.BIAS_LR_FACTOR 2.0", "SOLVER.BIAS_LR_FACTOR was 1.0"),
        ("DATASETS.TRAIN ('voc_test',)", "DATASETS.TRAIN was ('voc_trainval',)"),
        ("MODEL.META_ARCHITECTURE YOLOv3", "MODEL.META_ARCHITECTURE was FasterRCNN"),
        ("SOLVER.MAX_ITER 2", "iterations are done, asked for are 2"),
        ("SOLVER.STEPS_EPOCHS [0.5] SOLVER.MAX_ITER 2", "iterations are done, asked for are 2"),
        ("SOLVER.BASE_LRR 1", "Non-existent"),
        ("SOLVER.MAX_ITER 20 SOLVER.LR_SCHEDULER_NAME Nonsense", "Unknown LR scheduler"),
        ("SOLVER.MAX_ITER 20 DATASETS.TEST ('voc_val',)", "no such file"),
        ("SOLVER.MAX_ITER 20 TEST.EXPECTED_RESULTS [1]", "nothing would come of it"),
        ("--data nowhere", "nowhere"),
        ("--weights nowhere.pth", "nowhere.pth"),
    ],
)
def test_what_cannot_be_resumed_leaves_the_run_as_it_was(detector, trained: Path, words: str, expected: str) -> None:
    before = contents(trained)
    assert_one_line(detector.later("undisturbed", "--resume", *words.split(" ")), expected)
    assert contents(trained) == before


def test_another_test_set_has_a_best_of_its_own(detector, copied: Path) -> None:
    """No AP of it would be as high as that of the former one."""
    checkpoint = last(copied)
    checkpoint["trainer"]["best"] |= {"value": 2.0, "reference": 2.0}
    torch.save(checkpoint, copied / "model_last.pth")
    words = ("SOLVER.MAX_ITER", "16", "DATASETS.TEST", "('voc_trainval',)", "TEST.EVAL_PERIOD", "2")
    code, printed = resume(detector, copied, *words)
    assert code == 0, printed
    assert "its best evaluation counts no more" in printed
    best = torch.load(copied / "model_best.pth", weights_only=True)
    assert best["iteration"] >= 12 and best["AP50_11point"] <= 1


def test_other_photographs_are_another_training(detector, copied: Path, voc_folder: Path, tmp_path: Path) -> None:
    """One photograph fewer, of equal classes."""
    before = contents(copied)
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    path = data / "ImageSets" / "Main" / "trainval.txt"
    ids = path.read_text().split()
    path.write_text("\n".join(ids[:-1]) + "\n")
    outcome = detector.later(copied.parent.name, "--resume", "--data", str(data), opts=("SOLVER.MAX_ITER", "13"))
    assert_one_line(outcome, f"{copied}: was trained on other images than those of voc_trainval in {data}")
    assert contents(copied) == before

    # Moved they are the same; a checkpoint of old does not tell which they were.
    path.write_text("\n".join(ids) + "\n")
    assert detector.later(copied.parent.name, "--resume", "--data", str(data))[0] == 0
    checkpoint = last(copied)
    del checkpoint["trainer"]["data"]
    torch.save(checkpoint, copied / "model_last.pth")
    path.write_text("\n".join(ids[:-1]) + "\n")
    code, printed = detector.later(copied.parent.name, "--resume", "--data", str(data))
    assert code == 0, printed


def test_gone_data_leaves_the_run_as_it_was(detector, copied: Path, voc_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    (data / "JPEGImages" / "trainval_0.jpg").unlink()
    before = contents(copied)
    assert_one_line(resume(detector, copied, "SOLVER.MAX_ITER", "20", "DATASETS.ROOT", str(data)))
    for arguments in (("--data", str(data)), ("--data", str(tmp_path / "moved"))):
        outcome = detector.later(copied.parent.name, "--resume", *arguments, opts=("SOLVER.MAX_ITER", "20"))
        assert_one_line(outcome, str(data.parent))
    assert contents(copied) == before


@pytest.mark.parametrize(
    "words",
    [
        "SOLVER.BASE_LRR 1",
        "MODEL.FPN.IN_FEATURES ['res2']",
        "MODEL.RPN.HEAD_NAME Nonsense",
        "MODEL.DEVICE nonsense",
        "MODEL.TIMM.NAME resnet10t",
        "MODEL.PRECISION float8",
        "SOLVER.LR_SCHEDULER_NAME Nonsense",
        "SOLVER.IMS_PER_BATCH 0",
        "SOLVER.MAX_ITER 0",
        "SEED -1",
        "INPUT.MIXUP_PROB 0.5",
        "MODEL.META_ARCHITECTURE YOLOv3",
        "VIS_PERIOD 5",
        "--data nowhere",
        "--weights nowhere.pth",
    ],
)
def test_new_run_that_fails_leaves_no_folder(detector, words: str) -> None:
    flags, opts = (words.split(" "), ()) if words.startswith("--") else ((), words.split(" "))
    assert_one_line(detector("failed", *flags, opts=tuple(opts)))
    assert not (detector.output / "failed").exists()


def test_files_are_of_the_best_evaluation_and_rows_of_each(detector) -> None:
    """A run whose later evaluations find nothing keeps tables, curves and detections of the best one."""
    learns = {
        "SOLVER.MAX_ITER": 40,
        "SOLVER.BASE_LR": 0.03,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 10,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
        "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.5],
        "DATASETS.TEST": ("voc_trainval",),
        "TEST.EVAL_PERIOD": 20,
    }
    code, printed = detector("best", opts=tuple(str(word) for pair in learns.items() for word in pair))
    assert code == 0, printed
    run = detector.output / "best" / NAME
    names = ("evaluation.json", "evaluation.csv", "pr_curves.png", "detections.json", "model_best.pth")
    before = {name: (run / name).read_bytes() for name in names}
    code, printed = resume(detector, run, "SOLVER.MAX_ITER", "44", "TEST.EVAL_PERIOD", "2", "SOLVER.BASE_LR", "1")
    assert code == 0, printed

    figures = {row["iteration"]: row["AP50_11point"] for row in read_metrics(run) if "AP50_11point" in row}
    assert list(figures) == [19, 39, 41, 43]
    best = max(figures, key=lambda iteration: figures[iteration])
    assert best < 40
    assert figures[43] < figures[best]
    assert json.loads((run / "evaluation.json").read_text())["AP50_11point"] == pytest.approx(figures[best])
    assert torch.load(run / "model_best.pth", weights_only=True)["iteration"] == best
    assert {name: (run / name).read_bytes() for name in names} == before

    # What the best weights find is what the folder says was found.
    code, printed = detector.later("best", "--eval-only")
    assert code == 0, printed
    found = [json.loads((folder / "detections.json").read_text()) for folder in (run, run / "evaluation")]
    assert [box["score"] for box in found[0]] == pytest.approx([box["score"] for box in found[1]])


def test_options_of_a_resume_are_kept(detector, copied: Path) -> None:
    code, printed = resume(detector, copied, "SOLVER.MAX_ITER", "14", "SOLVER.LOG_PERIOD", "1", "TEST.EVAL_PERIOD", "0")
    assert code == 0, printed
    config = yaml.safe_load((copied / "config.yaml").read_text())
    assert (config["SOLVER"]["MAX_ITER"], config["SOLVER"]["LOG_PERIOD"]) == (14, 1)
    assert [row["iteration"] for row in read_metrics(copied)][-2:] == [12, 13]
