"""Every configuration builds and trains; lengths in epochs, scaling and options by hand."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import smooth_l1_loss
from torchvision.transforms import v2

from common.errors import UserError
from detection.augmentation import build_augmentations
from detection.config import CONFIGS, LEAF, get_cfg, leaf_name, merge_file, merge_options, read_run_cfg
from detection.modeling import build_model
from detection.schedule import resolve_schedule, scale_to_processes

LEAVES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(("Base-", "Sample-")))
RECIPES = ("best", "study")


def read(*names: str) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    for name in names:
        merge_file(cfg, CONFIGS / f"{name}.yaml")
    return cfg


def cases() -> list[tuple[str, ...]]:
    """Each leaf by itself, and each recipe with the sample's configuration of its model laid over it."""
    samples = [(leaf_name(model, recipe), f"Sample-{model}") for model in LEAF for recipe in RECIPES]
    return [(leaf,) for leaf in LEAVES] + samples


def images(size: int, num_classes: int) -> list[dict]:
    """Two random images: one with two objects, one with none."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for boxes in ([[8.0, 8, 40, 44], [20, 4, 60, 60]], []):
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(boxes)) % num_classes
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


@pytest.mark.parametrize("names", cases(), ids="+".join)
def test_builds_and_takes_a_step(names: tuple[str, ...]) -> None:
    """With the network of the configuration, on images of 64 pixels."""
    torch.manual_seed(0)
    cfg = read(*names)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    num_classes = cfg.MODEL.YOLOV3.NUM_CLASSES if "yolo" in names[0] else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    with EventStorage():
        losses = model(images(64, num_classes))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    # Not all move in the first step: a residual block may start as the identity.
    moved = [not torch.equal(value, before[name]) for name, value in model.named_parameters() if value.requires_grad]
    assert sum(moved) > 0.5 * len(moved)
    with torch.no_grad():
        outputs = model.eval()(images(64, num_classes))
    assert [output["instances"].image_size for output in outputs] == [(64, 64)] * 2


@pytest.mark.parametrize("names", [names for names in cases() if names != ("yolov3_tiny",)], ids="+".join)
def test_rate_starts_low_and_ends_lower(names: tuple[str, ...]) -> None:
    """The schedule of every recipe, for the 16,551 images of VOC07+12, warms up to its rate and decays."""
    cfg = read(*names)
    resolve_schedule(cfg, cfg.clone(), [], 16551)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] < 0.1 * cfg.SOLVER.BASE_LR
    assert 0.9 * cfg.SOLVER.BASE_LR < max(rates) <= cfg.SOLVER.BASE_LR
    assert rates[-1] < 0.2 * cfg.SOLVER.BASE_LR


def test_recipes_of_one_detector_alone_are_refused_for_the_other() -> None:
    assert leaf_name("faster_rcnn", "sgd") in LEAVES
    with pytest.raises(
        UserError, match=r"^RECIPE=sgd: yolov3 has none of this name; expected one of best, study, small"
    ):
        leaf_name("yolov3", "sgd")
    assert {leaf_name(model, recipe) for model in LEAF for recipe in RECIPES if recipe != "sgd"} <= set(LEAVES)


def test_the_study_is_the_study() -> None:
    """What the study states: L1 and flips only, and it stops when nothing rises; its batch and length are below."""
    cfg = read("faster_rcnn_R_50_FPN_study")
    (flip,) = build_augmentations(cfg.INPUT.AUGMENTATIONS)
    assert isinstance(flip, v2.RandomHorizontalFlip)
    assert cfg.TEST.PATIENCE > 0
    for head in (cfg.MODEL.RPN, cfg.MODEL.ROI_BOX_HEAD):
        assert head.BBOX_REG_LOSS_TYPE == "smooth_l1"
        distances = torch.tensor([0.001, 0.5, 3.0])
        assert torch.equal(smooth_l1_loss(distances, torch.zeros(3), head.SMOOTH_L1_BETA), distances)


def test_epochs_become_iterations() -> None:
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.STEPS_EPOCHS, cfg.SOLVER.WARMUP_EPOCHS = 10.0, [8.0, 9.5, 11.0], 0.5
    cfg.TEST.EVAL_EPOCHS = 1.0
    resolve_schedule(cfg, cfg.clone(), [], 16551)
    # 16551 / 16 = 1034.4375
    assert cfg.SOLVER.MAX_ITER == 10345
    assert cfg.SOLVER.STEPS == (8276, 9828)  # and none after the end
    assert cfg.SOLVER.WARMUP_ITERS == 518
    assert cfg.TEST.EVAL_PERIOD == 1035
    before = cfg.dump()
    resolve_schedule(cfg, cfg.clone(), [], 16551)  # of a saved configuration, which a resumed run resolves again
    assert cfg.dump() == before


def test_warm_up_is_cut_to_the_length() -> None:
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = 20, 500, (10, 30)
    resolve_schedule(cfg, cfg.clone(), [], 100)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS) == (20, 20, (10,))


@pytest.mark.parametrize(("length", "steps"), [(6, (5,)), (1, ())])
def test_steps_of_a_very_short_run_do_not_fall_together(length: int, steps: tuple[int, ...]) -> None:
    cfg = read("faster_rcnn_R_50_FPN")
    recipe = cfg.clone()
    given = merge_options(cfg, ["SOLVER.MAX_ITER", str(length)])
    resolve_schedule(cfg, recipe, given, 16551)
    assert steps == cfg.SOLVER.STEPS
    build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], 1.0))


@pytest.mark.parametrize(("gpus", "batch", "rate"), [(1, 8, 0.01), (2, 16, 0.02), (4, 32, 0.04), (8, 64, 0.08)])
def test_recipes_scale_with_the_processes(gpus: int, batch: int, rate: float) -> None:
    cfg = scale_to_processes(read("faster_rcnn_R_50_FPN_study"), gpus)
    assert batch == cfg.SOLVER.IMS_PER_BATCH
    assert pytest.approx(rate) == cfg.SOLVER.BASE_LR
    resolve_schedule(cfg, cfg.clone(), [], 16551)
    # Ten epochs stay ten epochs.
    assert cfg.SOLVER.MAX_ITER * batch == pytest.approx(30 * 16551, rel=1e-3)
    assert 500 * 32 / batch == cfg.SOLVER.WARMUP_ITERS


def test_a_closing_phase_in_iterations_scales_as_the_other_lengths_do() -> None:
    cfg = read("yolov3_darknet53")
    merge_options(cfg, ["SOLVER.MAX_ITER", "1000", "SOLVER.WARMUP_ITERS", "50", "INPUT.CLOSE_ITERS", "100"])
    scaled = scale_to_processes(cfg, 1)  # of four
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.WARMUP_ITERS, scaled.INPUT.CLOSE_ITERS) == (4000, 200, 400)


@pytest.mark.parametrize(
    "value", ["[RandomHorizontalFlip, RandomIoUCrop]", "['RandomHorizontalFlip', 'RandomIoUCrop']"]
)
def test_lists_take_words_with_and_without_quotes(value: str) -> None:
    cfg = get_cfg()
    merge_options(cfg, ["INPUT.AUGMENTATIONS", value, "SOLVER.STEPS", "(600, 800)", "INPUT.SQUARE_SIZES_TRAIN", "[64]"])
    assert cfg.INPUT.AUGMENTATIONS == ["RandomHorizontalFlip", "RandomIoUCrop"]
    assert (cfg.SOLVER.STEPS, cfg.INPUT.SQUARE_SIZES_TRAIN) == ((600, 800), [64])


def test_options_win_over_epochs() -> None:
    cfg = read("faster_rcnn_R_50_FPN_study")
    recipe = cfg.clone()
    given = merge_options(
        cfg, ["SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(15,)", "TEST.EVAL_PERIOD", "10", "SOLVER.WARMUP_ITERS", "5"]
    )
    resolve_schedule(cfg, recipe, given, 16551)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.WARMUP_ITERS) == (20, (15,), 10, 5)


def test_whole_numbers_serve_as_floats() -> None:
    cfg = get_cfg()
    merge_options(cfg, ["SOLVER.BASE_LR", "1", "SOLVER.MAX_EPOCHS", "12", "MODEL.YOLOV3.FOCAL_LOSS_ALPHA", "-1"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_EPOCHS, cfg.MODEL.YOLOV3.FOCAL_LOSS_ALPHA) == (1.0, 12.0, -1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["SOLVER.MAX_ITER"], "pairs of KEY VALUE"),
        (["SOLVER.MAX_ITER", "20", "TEST"], "3 words"),
        (["SOLVER.MAX_ITERS", "20"], "OPTS: SOLVER.MAX_ITERS 20: Non-existent key"),
        (["SOVLER.MAX_ITER", "20"], "Non-existent key"),
        (["SOLVER.MAX_ITER", "2.5"], "OPTS: SOLVER.MAX_ITER 2.5: Type mismatch"),
        (["SOLVER.STEPS", "7"], "Type mismatch"),
    ],
)
def test_wrong_options(options: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        merge_options(get_cfg(), options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SOLVER:\n  MAX_ITERS: 5\n", "Non-existent config key: SOLVER.MAX_ITERS"),
        ("SOLVER:\n  MAX_ITER: many\n", "Type mismatch"),
        ("SOLVER: [\n", "broken.yaml"),
        ("just text\n", "broken.yaml"),
        ("_BASE_: nowhere.yaml\n", "_BASE_ nowhere.yaml: no such file"),
        ("_BASE_: broken.yaml\n", "_BASE_ broken.yaml: no such file"),  # itself
        ("SOLVER: !!python/object/apply:os.system ['true']\n", "broken.yaml"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        merge_file(get_cfg(), path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_leaf_may_have_the_name_of_the_one_it_builds_on(tmp_path: Path) -> None:
    path = tmp_path / "yolov3_tiny.yaml"
    path.write_text("_BASE_: yolov3_tiny.yaml\nSOLVER:\n  MAX_ITER: 5\n")
    cfg = read()
    from_bases, given = merge_file(cfg, path)
    assert from_bases == read("yolov3_tiny")
    assert (given, cfg.SOLVER.MAX_ITER) == (["SOLVER.MAX_ITER"], 5)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml: no such file"):
        read_run_cfg(tmp_path)


@pytest.mark.parametrize("leaf", LEAVES)
def test_saved_configuration_reads_back_the_same(tmp_path: Path, leaf: str) -> None:
    cfg = read(leaf)
    resolve_schedule(cfg, cfg.clone(), [], 1000)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = read_run_cfg(tmp_path)
    again.MODEL.DEVICE = "cpu"
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize("name", ["2024", "1e5", "None", "True", "my 'quoted' folder", "[1, 2]"])
def test_names_that_read_as_something_else_stay_names(tmp_path: Path, name: str) -> None:
    cfg = get_cfg()
    cfg.DATASETS.ROOT, cfg.MODEL.CLASSES = name, [name]
    (tmp_path / "config.yaml").write_text(cfg.dump())
    read_back = read_run_cfg(tmp_path, ["MODEL.WEIGHTS", name])
    found = read_back.DATASETS.ROOT, read_back.MODEL.WEIGHTS, *read_back.MODEL.CLASSES
    assert set(found) == {name}
