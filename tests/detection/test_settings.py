"""Settings keep their word: lengths of schedules, averaging, configurations of one's own, options of evaluation."""

import copy
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Instances

from common.errors import UserError
from common.run_folder import append_metrics, create_run_folder, read_metrics
from detection import config, experiment
from detection.config import CONFIGS, get_cfg, merge_file, merge_options, read_run_cfg
from detection.experiment import new_experiment, newest_detector, newest_run
from detection.modeling import build_model
from detection.schedule import describe_schedule, resolve_schedule, scale_to_processes
from detection.train_net import parse_args
from detection.trainer import Evaluator
from tests.detection.runs import NAME, assert_one_line

VOC0712 = 16551  # images of VOC07+12


def scheduled(leaf: str, *options: str, processes: int = 4, path: Path | None = None) -> tuple[CfgNode, CfgNode]:
    """The resolved schedules of a recipe and of what the user makes of it, on VOC07+12."""
    resolved = []
    for given_path, given_options in ((None, ()), (path, options)):
        cfg = get_cfg()
        bases, of_leaf = merge_file(cfg, given_path or CONFIGS / f"{leaf}.yaml")
        recipe = scale_to_processes(bases if given_path else cfg.clone(), processes)
        cfg = scale_to_processes(cfg, processes)
        own = (cfg.clone(), of_leaf) if given_path else None
        resolve_schedule(cfg, recipe, merge_options(cfg, given_options), VOC0712, own)
        resolved.append(cfg)
    return resolved[0], resolved[1]


def shares(cfg: CfgNode) -> list[float]:
    lengths = (*cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.INPUT.CLOSE_ITERS)
    return [length / cfg.SOLVER.MAX_ITER for length in lengths]


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("options", ["SOLVER.MAX_EPOCHS 5", "SOLVER.MAX_EPOCHS 29", "SOLVER.MAX_ITER 1000"])
def test_shorter_run_keeps_the_shares_of_its_recipe(options: str, processes: int) -> None:
    recipe, cfg = scheduled("faster_rcnn_R_50_FPN", *options.split(), processes=processes)
    assert len(cfg.SOLVER.STEPS) == 2
    expected = [9.67 / 14.5, 12.08 / 14.5, 500 * 4 / processes / (14.5 * VOC0712 / (4 * processes)), 0]
    assert shares(recipe) == pytest.approx(expected, abs=1e-3)
    assert shares(cfg) == pytest.approx(expected, abs=2e-3)
    said = describe_schedule(cfg)
    for part in (f"{cfg.SOLVER.MAX_ITER} iterations", f"at {cfg.SOLVER.STEPS[0]}, {cfg.SOLVER.STEPS[1]}"):
        assert part in said


def test_shorter_yolov3_keeps_the_share_of_its_closing_phase() -> None:
    _, cfg = scheduled("yolov3_darknet53", "SOLVER.MAX_EPOCHS", "20")
    assert math.ceil(20 * VOC0712 / 64) == cfg.SOLVER.MAX_ITER
    assert pytest.approx(20 / 270, abs=1e-3) == cfg.INPUT.CLOSE_ITERS / cfg.SOLVER.MAX_ITER
    assert f"closing phase {cfg.INPUT.CLOSE_ITERS}" in describe_schedule(cfg)


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("leaf", [path.stem for path in CONFIGS.glob("[fy]*.yaml") if path.stem != "yolov3_tiny"])
def test_every_recipe_reaches_its_rate_on_little_data_too(leaf: str, processes: int) -> None:
    """A warm-up is neither the whole of a short run, nor does it end where the rate has fallen already."""
    for num_images in (100, 389):
        cfg = get_cfg()
        merge_file(cfg, CONFIGS / f"{leaf}.yaml")
        cfg = scale_to_processes(cfg, processes)
        resolve_schedule(cfg, cfg.clone(), [], num_images)
        optimizer = torch.optim.SGD([torch.zeros(1)], cfg.SOLVER.BASE_LR)
        scheduler = build_lr_scheduler(cfg, optimizer)
        rates = []
        for _ in range(cfg.SOLVER.MAX_ITER):
            rates.append(optimizer.param_groups[0]["lr"] / cfg.SOLVER.BASE_LR)
            optimizer.step()
            scheduler.step()
        high = sum(rate > 0.5 for rate in rates) / len(rates)
        assert high > 0.35, f"{high:.0%} of {len(rates)} iterations, {describe_schedule(cfg)}"


def test_given_lengths_are_taken_as_given() -> None:
    options = "SOLVER.MAX_ITER 1000 SOLVER.STEPS (100,900) SOLVER.WARMUP_ITERS 7"
    _, cfg = scheduled("faster_rcnn_R_50_FPN", *options.split())
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == ((100, 900), 7)
    _, cfg = scheduled("faster_rcnn_R_50_FPN", "SOLVER.MAX_EPOCHS", "5", "SOLVER.STEPS_EPOCHS", "[1.0]")
    assert (math.ceil(VOC0712 / 16),) == cfg.SOLVER.STEPS
    _, cfg = scheduled("yolov3_darknet53", "SOLVER.MAX_EPOCHS", "20", "INPUT.CLOSE_ITERS", "11")
    assert cfg.INPUT.CLOSE_ITERS == 11
    _, cfg = scheduled("faster_rcnn_R_50_FPN", "SOLVER.WARMUP_EPOCHS", "2.5")
    assert math.ceil(2.5 * VOC0712 / 16) == cfg.SOLVER.WARMUP_ITERS
    _, cfg = scheduled("faster_rcnn_R_50_FPN", "SOLVER.WARMUP_ITERS", "0")
    assert cfg.SOLVER.WARMUP_ITERS == 0
    recipe, cfg = scheduled("faster_rcnn_R_50_FPN", "SOLVER.BASE_LR", "0.01")
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (recipe.SOLVER.STEPS, recipe.SOLVER.WARMUP_ITERS)


@pytest.mark.parametrize("length", ["MAX_EPOCHS: 5", "MAX_EPOCHS: 5.0", "MAX_ITER: 5173"])
def test_leaf_of_ones_own_is_as_short_as_options(tmp_path: Path, length: str) -> None:
    path = tmp_path / "short.yaml"
    path.write_text(f"_BASE_: faster_rcnn_R_50_FPN.yaml\nSOLVER:\n  {length}\n")
    _, expected = scheduled("faster_rcnn_R_50_FPN", "SOLVER.MAX_EPOCHS", "5")
    _, cfg = scheduled("faster_rcnn_R_50_FPN", path=path)
    assert cfg.SOLVER.MAX_ITER == expected.SOLVER.MAX_ITER == math.ceil(5 * VOC0712 / 16)
    assert shares(cfg) == pytest.approx(shares(expected), abs=1e-3)


@pytest.mark.parametrize("options", ["", "SOLVER.MAX_EPOCHS 20", "SOLVER.MAX_ITER 3000", "SOLVER.IMS_PER_BATCH 32"])
@pytest.mark.parametrize("leaf", ["faster_rcnn_R_50_FPN_study", "yolov3_darknet53", "yolov3_tiny_coco"])
def test_a_copy_of_a_recipe_is_that_recipe(leaf: str, options: str) -> None:
    """Its lengths are written for its own, and not given once and for all."""
    _, expected = scheduled(leaf, *options.split())
    _, cfg = scheduled(leaf, *options.split(), path=CONFIGS / f"{leaf}.yaml")
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupCosineLR":
        cfg.SOLVER.STEPS = expected.SOLVER.STEPS  # which a cosine has none of
    assert cfg == expected


def test_options_win_over_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("_BASE_: faster_rcnn_R_50_FPN.yaml\nSOLVER: {WARMUP_ITERS: 7, STEPS: [100]}\n")
    epoch = math.ceil(VOC0712 / 16)
    _, cfg = scheduled("faster_rcnn_R_50_FPN", path=path)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS) == (7, (100,))
    _, cfg = scheduled("faster_rcnn_R_50_FPN", "SOLVER.WARMUP_EPOCHS", "1.0", "SOLVER.STEPS", "(50,)", path=path)
    assert (epoch, (50,)) == (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS)
    _, cfg = scheduled("faster_rcnn_R_50_FPN", "SOLVER.MAX_EPOCHS", "29", path=path)  # twice as long
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS) == (14, (200,))


def horizon(cfg: CfgNode) -> float:
    """Images after which the average has forgotten all but 1 / e."""
    return -cfg.SOLVER.IMS_PER_BATCH / math.log(cfg.SOLVER.EMA_DECAY)


@pytest.mark.parametrize("leaf", ["faster_rcnn_R_50_FPN", "yolov3_darknet53"])
@pytest.mark.parametrize("processes", [1, 4, 8])
def test_average_forgets_as_fast_in_images(leaf: str, processes: int) -> None:
    recipe = get_cfg()
    merge_file(recipe, CONFIGS / f"{leaf}.yaml")
    for options in ((), ("SOLVER.IMS_PER_BATCH", "8"), ("SOLVER.IMS_PER_BATCH", "128")):
        _, cfg = scheduled(leaf, *options, processes=processes)
        assert horizon(cfg) == pytest.approx(horizon(recipe))
    _, cfg = scheduled(leaf, "SOLVER.IMS_PER_BATCH", "8", "SOLVER.EMA_DECAY", "0.5", processes=processes)
    assert cfg.SOLVER.EMA_DECAY == 0.5


def prepared(monkeypatch: pytest.MonkeyPatch, data: Path, *words: str, processes: int = 1) -> CfgNode:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    found = new_experiment(parse_args(["--data", str(data), "--pretrained", "0", *words]))
    found.resolve()
    return found.cfg


@pytest.mark.parametrize("processes", [1, 4, 8])
def test_command_line_keeps_the_horizon(voc_folder: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    cfg = prepared(monkeypatch, voc_folder, "SOLVER.IMS_PER_BATCH", "32", processes=processes)
    assert horizon(cfg) == pytest.approx(-16 / math.log(0.999))
    cfg = prepared(monkeypatch, voc_folder, processes=processes)
    assert 4 * processes == cfg.SOLVER.IMS_PER_BATCH
    assert horizon(cfg) == pytest.approx(-16 / math.log(0.999))


def test_device_is_the_one_that_is_given(
    voc_folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU as well."""
    monkeypatch.setattr(experiment, "default_device", lambda: "cuda")
    monkeypatch.setattr(config, "default_device", lambda: "cuda")
    assert prepared(monkeypatch, voc_folder).MODEL.DEVICE == "cuda"
    assert prepared(monkeypatch, voc_folder, "MODEL.DEVICE", "cpu").MODEL.DEVICE == "cpu"
    path = tmp_path / "own.yaml"
    path.write_text("_BASE_: faster_rcnn_R_50_FPN.yaml\nMODEL:\n  DEVICE: cpu\n")
    assert prepared(monkeypatch, voc_folder, "--config", str(path)).MODEL.DEVICE == "cpu"
    assert read_run_cfg(trained).MODEL.DEVICE == "cuda"
    assert read_run_cfg(trained, ["MODEL.DEVICE", "cpu"]).MODEL.DEVICE == "cpu"


@pytest.mark.parametrize("backbone", [(), ("--backbone", "test_efficientnet")])
def test_what_is_random_is_trained(voc_folder: Path, monkeypatch: pytest.MonkeyPatch, backbone: tuple) -> None:
    """Detectron2's defaults, a frozen stem and frozen BatchNorm, are for a backbone that has learned something."""
    model = build_model(prepared(monkeypatch, voc_folder, *backbone, "MODEL.DEVICE", "meta"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("model", ["faster_rcnn", "yolov3"])
def test_pixels_are_normalised_as_the_backbone_learned(voc_folder: Path, monkeypatch, model: str) -> None:
    cfg = prepared(monkeypatch, voc_folder, "--model", model, "--backbone", "tf_efficientnet_lite0")
    assert cfg.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_STD == [127.5] * 3  # -1 to 1, other than any recipe


def test_splits_that_are_given_need_no_default(voc_folder: Path, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder with lists of trainval and val alone, which are no pair by default."""
    data = shutil.copytree(voc_folder, tmp_path / "data")
    lists = data / "ImageSets" / "Main"
    (lists / "test.txt").rename(lists / "val.txt")
    options = ["DATASETS.TRAIN", "('voc_trainval',)", "DATASETS.TEST", "('voc_val',)"]
    cfg = prepared(monkeypatch, data, *options)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("voc_trainval",), ("voc_val",))
    with pytest.raises(UserError, match="lists of val, trainval found"):
        prepared(monkeypatch, data, *options[2:])


@pytest.mark.parametrize(
    ("emptied", "options", "said"),
    [
        ("trainval", [], "voc_trainval has no object to learn from"),
        ("test", ["DATASETS.TEST", "('voc_trainval','voc_test')"], "voc_test has no object to be found"),
    ],
)
def test_sets_without_an_object(
    voc_folder: Path, tmp_path, monkeypatch: pytest.MonkeyPatch, emptied: str, options: list[str], said: str
) -> None:
    """One test set without an object would make every mean no number."""
    data = shutil.copytree(voc_folder, tmp_path / "data")
    for path in (data / "Annotations").glob(f"{emptied}_*.xml"):
        path.write_text(re.sub("<object>.*</object>", "", path.read_text(), flags=re.DOTALL))
    with pytest.raises(UserError, match=f"^{data}: {said}"):
        prepared(monkeypatch, data, *options)


@pytest.mark.parametrize("way", ["options", "file"])
def test_what_is_given_stays_as_it_is(voc_folder: Path, tmp_path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    given = ["MODEL.BACKBONE.FREEZE_AT", "1", "MODEL.RESNETS.NORM", "FrozenBN"]
    words = given if way == "options" else ["--config", str(own_leaf(tmp_path / "own.yaml", given))]
    cfg = prepared(monkeypatch, voc_folder, *words)
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (1, "FrozenBN")
    cfg = prepared(monkeypatch, voc_folder, "--pretrained", "1")  # its weights are not read yet
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (2, "FrozenBN")


def test_a_batch_is_divided_among_processes_and_their_parts(voc_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["SOLVER.IMS_PER_BATCH", "12", "SOLVER.ACCUMULATE"]
    assert prepared(monkeypatch, voc_folder, *words, "3", processes=2).SOLVER.IMS_PER_BATCH == 12
    with pytest.raises(UserError, match=r"IMS_PER_BATCH 12: expected a multiple of the 2 .*\.ACCUMULATE 4; give"):
        prepared(monkeypatch, voc_folder, *words, "4", processes=2)


def test_images_of_the_validation_loss_come_from_the_whole_test_set(
    voc_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = prepared(monkeypatch, voc_folder, "TEST.VALIDATION_LOSS_IMAGES", "2")
    loader = Evaluator(cfg).labelled_loader
    assert sorted(sample["image_id"] for batch in loader for sample in batch) == ["test_0", "test_2"]


def test_a_resumed_run_is_of_the_data_that_is_named(voc_folder: Path, tmp_path: Path) -> None:
    for second, name in enumerate((NAME, f"{NAME}-sample")):
        append_metrics(create_run_folder(tmp_path, name), {"iteration": 0})
        os.utime(tmp_path / name / "metrics.json", (second, second))
    words = ["--resume", "--output", str(tmp_path)]
    for data, expected in (([], f"{NAME}-sample"), (["--data", str(voc_folder)], NAME)):
        assert newest_run(parse_args([*words, *data])).name == expected
    os.utime(tmp_path / NAME / "metrics.json", (9, 9))
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn/sample.json").write_text('{"seed": 0}')
    assert newest_run(parse_args([*words, "--data", str(tmp_path / "drawn")])).name == f"{NAME}-sample"


def test_the_newest_detector_is_of_the_configuration_or_backbone_that_is_named(tmp_path: Path) -> None:
    """A configuration of one's own has no other name on the sample."""
    for second, name in enumerate(("own", f"{NAME}_resnet18-sample", NAME, "own-sample")):
        weights = create_run_folder(tmp_path, name) / "model_best.pth"
        weights.touch()
        os.utime(weights, (second, second))
    for words, expected in (
        ({"config": Path("my/own.yaml")}, "own"),
        ({"backbone": "resnet18"}, f"{NAME}_resnet18-sample"),
        ({"recipe": "best"}, NAME),
    ):
        found = newest_detector(tmp_path, "faster_rcnn", **words)
        assert found == tmp_path / expected / "model_best.pth"
    assert newest_detector(tmp_path, "faster_rcnn", config=Path("other.yaml")) is None


def test_mixup_is_refused_where_it_would_teach_wrong(voc_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^INPUT\.MIXUP_PROB 0\.5: Faster R-CNN .*leave it out$"):
        prepared(monkeypatch, voc_folder, "INPUT.MIXUP_PROB", "0.5")


@pytest.mark.parametrize("norm", ["MODEL.TIMM.NORM", "MODEL.YOLOV3.NORM"])
def test_norms_that_are_none_are_refused(norm: str) -> None:
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / "yolov3_tiny.yaml")
    merge_options(cfg, [norm, "GN", "MODEL.DEVICE", "cpu"])
    with pytest.raises(UserError, match=f"^{norm} GN: expected BN or SyncBN$"):
        build_model(cfg)


def detections(run: Path) -> list[dict]:
    return json.loads((run / "evaluation" / "detections.json").read_text())


def test_options_of_an_evaluation_take_effect(detector, trained: Path) -> None:
    run = detector.output / "evaluated" / trained.name
    shutil.copytree(trained, run)
    assert detector.later("evaluated", "--eval-only")[0] == 0
    before = detections(run)
    most = max(sum(box["image_id"] == one["image_id"] for box in before) for one in before)
    assert most > 3

    code, printed = detector.later("evaluated", "--eval-only", opts=("TEST.DETECTIONS_PER_IMAGE", "3"))
    assert code == 0, printed
    limited = detections(run)
    for image in {box["image_id"] for box in before}:
        scores = sorted((box["score"] for box in before if box["image_id"] == image), reverse=True)
        kept = [box["score"] for box in limited if box["image_id"] == image]
        assert sorted(kept, reverse=True) == pytest.approx(scores[:3])

    code, printed = detector.later("evaluated", "--eval-only", opts=("MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.01"))
    assert code == 0, printed
    assert len(detections(run)) < len(before)

    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for options, expected in (
        (("SOLVER.BASE_LR", "0.5"), "SOLVER.BASE_LR 0.5: nothing would come of it"),
        (("TEST.PATIENCE", "3"), "TEST.PATIENCE 3: nothing would come of it"),
        (("INPUT.FORMAT", "BGR"), "INPUT.FORMAT BGR: nothing would come of it"),
        (("MODEL.FPN.OUT_CHANNELS", "32"), "does not fit the model"),
        (("MODEL.PRECISION", "fp16"), "MODEL.PRECISION fp16: expected one of auto, bfloat16, float16, float32"),
        (("TEST.IMS_PER_BATCH", "-1"), "TEST.IMS_PER_BATCH -1: expected 1 or more"),
        (("INPUT.MIN_SIZE_TEST", "0"), "INPUT.MIN_SIZE_TEST 0: expected 1 or more"),
    ):
        assert_one_line(detector.later("evaluated", "--eval-only", opts=options), expected)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def own_leaf(path: Path, opts: list[str], base: str = "faster_rcnn_R_50_FPN") -> Path:
    """A YAML file over a base of the repository, with the options as its own."""
    leaf: dict = {"_BASE_": f"{base}.yaml"}
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        *sections, name = key.split(".")
        node = leaf
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = yaml.safe_load(value.replace("(", "[").replace(",)", "]").replace(")", "]"))
    path.write_text(yaml.safe_dump(leaf))
    return path


def test_leaf_of_ones_own_trains_evaluates_and_resumes(detector, fork_server, tiny_opts, tmp_path: Path) -> None:
    # A leaf is a recipe; with 0 it is written for no number of processes, and is taken as it is by any.
    short = ["SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "[]", "SOLVER.REFERENCE_WORLD_SIZE", "0"]
    path = own_leaf(tmp_path / "my narrow net.yaml", [*tiny_opts, *short])
    common = ("detection.train_net", "--config", str(path), "--output", str(tmp_path / "runs"))
    code, printed = fork_server(*common, "--data", str(detector.data), "--pretrained", "0")
    assert code == 0, printed
    run = tmp_path / "runs" / path.stem
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [path.stem]
    assert read_metrics(run)[-1]["iteration"] == 3
    assert read_run_cfg(run).MODEL.FPN.OUT_CHANNELS == 16

    code, printed = fork_server(*common, "--eval-only")
    assert code == 0, printed
    assert (run / "evaluation" / "evaluation.json").exists()
    code, printed = fork_server(*common, "--resume", "SOLVER.MAX_ITER", "6")
    assert code == 0, printed
    assert read_metrics(run)[-1]["iteration"] == 5


def test_leaf_that_sets_what_nothing_reads_is_refused(detector, fork_server, tmp_path: Path) -> None:
    path = own_leaf(tmp_path / "own.yaml", ["INPUT.FORMAT", "BGR", "SOLVER.MAX_ITER", "1"])
    words = ("--config", str(path), "--output", str(tmp_path / "runs"), "--data", str(detector.data))
    outcome = fork_server("detection.train_net", *words, "--pretrained", "0", *detector.opts)
    assert_one_line(outcome, "INPUT.FORMAT BGR: nothing would come of it")
    assert not (tmp_path / "runs").exists()


def test_leaf_of_the_other_detector_is_refused(detector, fork_server, tmp_path: Path) -> None:
    path = own_leaf(tmp_path / "own.yaml", ["SOLVER.MAX_ITER", "1"], base="yolov3_darknet53")
    words = ("--model", "faster_rcnn", "--config", str(path), "--output", str(tmp_path / "runs"))
    outcome = fork_server("detection.train_net", *words, "--data", str(detector.data))
    assert_one_line(outcome, f"{path}: MODEL.META_ARCHITECTURE is YOLOv3, expected FasterRCNN")
    assert not (tmp_path / "runs").exists()


def test_yolov3_tiny_trains(detector, fork_server, tmp_path: Path) -> None:
    words = ("--model", "yolov3", "--config", str(CONFIGS / "yolov3_tiny.yaml"), "--output", str(tmp_path))
    options = "SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 1 INPUT.SQUARE_SIZES_TRAIN [64] INPUT.MIN_SIZE_TEST 64"
    more = "INPUT.MAX_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0 TEST.VALIDATION_LOSS_IMAGES 0"
    words = (*words, "--data", str(detector.data), *options.split(), *more.split())
    code, printed = fork_server("detection.train_net", *words)
    assert code == 0, printed
    assert [row["iteration"] for row in read_metrics(tmp_path / "yolov3_tiny")] == [0]
    assert "validation_loss" not in read_metrics(tmp_path / "yolov3_tiny")[0]


@pytest.mark.parametrize("flag", ["train", "--eval-only"])
def test_split_without_objects_is_refused_first(detector, trained: Path, voc_folder: Path, tmp_path, flag: str) -> None:
    """Objects that are all difficult count for nothing either."""
    data = tmp_path / "data"
    shutil.copytree(voc_folder, data)
    for path in (data / "Annotations").glob("test_*.xml"):
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    if flag == "train":
        outcome = detector("without objects", "--data", str(data))
        assert not (detector.output / "without objects").exists()
    else:
        weights = str(trained / "model_best.pth")
        outcome = detector.later("undisturbed", "--eval-only", "--weights", weights, "--data", str(data))
        assert not (trained / "evaluation").exists()
    assert_one_line(outcome, f"{data}: voc_test has no object to be found")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["faster_rcnn", "yolov3"])
def test_copied_model_is_a_copy(model: str, precision: str, tiny_opts: list[str]) -> None:
    cfg = get_cfg()
    if model == "yolov3":
        merge_file(cfg, CONFIGS / "yolov3_tiny.yaml")
        merge_options(cfg, ["MODEL.YOLOV3.SCORE_THRESH_TEST", "0.000001"])
    else:
        merge_file(cfg, CONFIGS / "faster_rcnn_R_50_FPN.yaml")
        merge_options(cfg, [*tiny_opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0001"])
    merge_options(cfg, ["MODEL.DEVICE", "cpu", "MODEL.PRECISION", precision])
    torch.manual_seed(0)
    original = build_model(cfg).eval()
    images = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]

    def found(network: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            instances: Instances = network(images)[0]["instances"]
        return [instances.pred_boxes.tensor, instances.scores, instances.pred_classes]

    before = found(original)
    assert len(before[1])
    twin = copy.deepcopy(original)
    assert all(torch.equal(one, two) for one, two in zip(before, found(twin), strict=True))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(one, two) for one, two in zip(before, found(original), strict=True))
    after = found(twin)
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in zip(before, after, strict=True))
