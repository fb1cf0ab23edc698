"""YOLOv3 through the trainer: every recipe takes a step, a resume is exact, and weights come from every source."""

import logging
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from safetensors.torch import save_file

from common.errors import UserError
from common.run_folder import create_run_folder, read_metrics
from detection.checkpoint import load_initial_weights
from detection.config import CONFIGS, get_cfg, merge_file, merge_options
from detection.experiment import Experiment
from detection.modeling import build_model
from detection.trainer import Trainer
from detection.voc import default_test, default_train, register_voc
from detection.yolov3.anchors import YOLOAnchorGenerator, YOLOBox2BoxTransform
from detection.yolov3.darknet_weights import write_darknet_weights
from detection.yolov3.losses import YOLOv3Loss
from detection.yolov3.targets import Grid, assign_targets
from tests.detection.runs import assert_same

BACKBONE = "test_resnet"  # a very small one of timm's with all strides
TINY = {
    "MODEL.WEIGHTS": "",
    "MODEL.TIMM.NAME": BACKBONE,
    "INPUT.SQUARE_SIZES_TRAIN": [32, 64],
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.LOG_PERIOD": 1,
    "TEST.EVAL_PERIOD": 0,
    "TEST.VALIDATION_LOSS_IMAGES": 2,
    "MODEL.DEVICE": "cpu",
}
NARROW = {"MODEL.YOLOV3.CONV_DIMS": [8, 16, 16], "MODEL.YOLOV3.NUM_CONVS": [1, 1, 1]}


def make_cfg(*names: str, **options: object) -> CfgNode:
    """Configurations laid over each other, then options with `__` for dots."""
    cfg = get_cfg()
    for name in names:
        merge_file(cfg, CONFIGS / f"{name}.yaml")
    merged = {**TINY, **{key.replace("__", "."): value for key, value in options.items()}}
    merge_options(cfg, [str(word) for pair in merged.items() for word in pair])
    return cfg


@pytest.fixture(scope="module")
def trained_on(voc_folder: Path) -> Path:
    register_voc(voc_folder)
    return voc_folder


def make_trainer(cfg: CfgNode, data: Path, resumed: Path | None = None) -> Trainer:
    cfg.DATASETS.ROOT = str(data)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = default_train(data), default_test(data)
    Experiment(cfg, "run", cfg.clone()).resolve()
    return Trainer(cfg, resumed)


@pytest.mark.parametrize(
    "names",
    [
        ("yolov3_darknet53",),
        ("yolov3_darknet53_study",),
        ("yolov3_tiny",),
        ("yolov3_darknet53", "Sample-yolov3"),
        ("yolov3_darknet53_study", "Sample-yolov3"),
    ],
)
def test_every_recipe_takes_a_step(names: tuple[str, ...], trained_on: Path, tmp_path: Path) -> None:
    """The recipe's own augmentation, losses and schedule on a small network and images; evaluated and saved."""
    narrow = {} if names == ("yolov3_tiny",) else {key.replace(".", "__"): value for key, value in NARROW.items()}
    trainer = make_trainer(make_cfg(*names, **narrow), trained_on)
    before = {name: value.clone() for name, value in trainer.bare_model.named_parameters()}
    trainer.train(tmp_path)
    # From the first layer to the last; a fresh ResNet's blocks pass nothing on but their shortcut.
    first = next(iter(before))
    still = [name for name, value in trainer.bare_model.named_parameters() if torch.equal(value, before[name])]
    assert [name for name in still if name == first or name.startswith("head.")] == []
    (row,) = read_metrics(tmp_path)
    parts = [row[name] for name in ("loss_xy", "loss_wh", "loss_objectness", "loss_cls")]
    assert row["total_loss"] == pytest.approx(sum(parts))
    assert {"loss_xy", "loss_wh", "loss_objectness", "loss_cls", "validation_loss", "AP50_11point"} <= row.keys()
    assert (tmp_path / "model_best.pth").exists()


class StopAfter(HookBase):
    """Ends the training as Ctrl-C would, after an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def test_resume_is_exact_with_everything_on(trained_on: Path, tmp_path: Path) -> None:
    """Mosaic, mixup, several sizes, the last phase, weight averaging and cosine: interrupted or not, bit by bit."""
    options = {
        "INPUT__MIXUP_PROB": 0.7,
        "INPUT__MOSAIC_PROB": 0.5,
        "INPUT__CLOSE_ITERS": 2,
        "SOLVER__MAX_ITER": 8,
        "SOLVER__EMA_DECAY": 0.9,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        **{key.replace(".", "__"): value for key, value in NARROW.items()},
    }
    cfg = make_cfg("yolov3_darknet53", **options)
    whole, parts = (create_run_folder(tmp_path, name) for name in ("whole", "parts"))
    make_trainer(cfg.clone(), trained_on).train(whole)
    interrupted = make_trainer(cfg.clone(), trained_on)
    interrupted.register_hooks([StopAfter(4)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(parts)
    resumed = make_trainer(cfg.clone(), trained_on, parts)
    assert resumed.start_iter == 4
    resumed.train(parts)
    assert_same(parts, whole)


def test_rows_are_means_of_what_the_device_summed_up(trained_on: Path, tmp_path: Path) -> None:
    """Of one training, a row for each of three iterations and one row for all."""
    found = []
    for period in (1, 3):
        run = create_run_folder(tmp_path, "run")
        narrow = {key.replace(".", "__"): value for key, value in NARROW.items()}
        cfg = make_cfg("yolov3_darknet53", SOLVER__MAX_ITER=3, SOLVER__LOG_PERIOD=period, **narrow)
        make_trainer(cfg, trained_on).train(run)
        found.append(read_metrics(run))
    each, (whole,) = found
    assert [row["iteration"] for row in each] == [0, 1, 2]
    names = [name for name in whole if "loss" in name and name != "validation_loss"]
    assert len(names) == 5
    for name in names:
        assert whole[name] == pytest.approx(sum(row[name] for row in each) / 3, rel=1e-9)


def make_detector(**options: object) -> tuple[torch.nn.Module, CfgNode]:
    narrow = {key.replace(".", "__"): value for key, value in NARROW.items()}
    cfg = make_cfg("yolov3_darknet53", MODEL__PRECISION="float32", **{**narrow, **options})
    torch.manual_seed(1)
    return build_model(cfg), cfg


@pytest.mark.parametrize("name", ["darknet17", BACKBONE])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_classifier_as_a_file(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = timm.create_model(name, num_classes=7).eval()
    for module in classifier.modules():
        if hasattr(module, "running_mean"):  # or two fresh networks would have the same statistics
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    path = tmp_path / f"weights{suffix}"
    save_file(classifier.state_dict(), path) if suffix == ".safetensors" else torch.save(classifier.state_dict(), path)
    model, cfg = make_detector(MODEL__TIMM__NAME=name, MODEL__WEIGHTS=str(path))
    load_initial_weights(model, cfg)
    image = torch.rand(1, 3, 64, 64)
    features = model.backbone.eval()(image)["dark5"]
    torch.testing.assert_close(features, classifier.forward_features(image))


def test_other_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet14t").state_dict(), tmp_path / "other.pth")
    model, cfg = make_detector(MODEL__WEIGHTS=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"MODEL\.TIMM\.NAME|does not fit the model"):
        load_initial_weights(model, cfg)


def test_darknet_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A whole detector's file fills the backbone; what belongs to its head is counted."""
    arithmetic = {"MODEL__TIMM__NAME": "darknet17", "MODEL__TIMM__NORM_EPS": 1e-6}
    arithmetic |= {"MODEL__TIMM__NEGATIVE_SLOPE": 0.1, "MODEL__YOLOV3__NORM_EPS": 1e-6}
    path = tmp_path / "darknet.weights"
    source, _ = make_detector(**arithmetic)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    values = write_darknet_weights(path, source)
    backbone_values = write_darknet_weights(tmp_path / "backbone.weights", source.backbone)
    model, cfg = make_detector(**arithmetic, MODEL__WEIGHTS=str(path))
    with caplog.at_level(logging.INFO, "detection"):
        load_initial_weights(model, cfg)
    assert f"{backbone_values} values, {values - backbone_values} left over" in caplog.text
    for name, value in source.backbone.named_parameters():
        assert torch.equal(model.backbone.get_parameter(name), value)
    # Another arithmetic would give other outputs without a word.
    model, cfg = make_detector(**{**arithmetic, "MODEL__TIMM__NORM_EPS": 1e-5}, MODEL__WEIGHTS=str(path))
    with pytest.raises(UserError, match=r"MODEL\.TIMM\.NORM_EPS"):
        load_initial_weights(model, cfg)


def test_detector_of_other_classes_gives_all_but_the_predictions(tmp_path: Path) -> None:
    source, _ = make_detector(MODEL__YOLOV3__NUM_CLASSES=3)
    torch.save({"model": source.state_dict()}, tmp_path / "detector.pth")
    model, cfg = make_detector(MODEL__YOLOV3__NUM_CLASSES=5, MODEL__WEIGHTS=str(tmp_path / "detector.pth"))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    load_initial_weights(model, cfg)
    for name, value in model.named_parameters():
        is_own = torch.equal(value, torch.zeros_like(value))
        assert is_own if ".prediction." in name else torch.equal(value, source.get_parameter(name)), name


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nowhere")
    model, cfg = make_detector(MODEL__WEIGHTS="timm://darknet53.c2ns_in1k")
    with pytest.raises(UserError) as error:
        load_initial_weights(model, cfg)
    assert str(error.value).startswith("timm://darknet53.c2ns_in1k: pretrained weights cannot be fetched (")
    assert str(error.value).endswith("name one (START=path) or train from random weights (START=random)")
    assert "\n" not in str(error.value)


def test_objects_of_a_mixture_count_by_their_share() -> None:
    """Each loss is the background's plus, for each object, its share of what it adds alone."""
    torch.manual_seed(0)
    transform = YOLOBox2BoxTransform()
    generator = YOLOAnchorGenerator(sizes=[[(10, 14)], [(30, 24)]], strides=[8, 16])
    grid = Grid.of(generator, [torch.empty(1, 1, 8, 8), torch.empty(1, 1, 4, 4)])
    predictions = torch.randn(1, 80, 8).double()
    boxes = Boxes(torch.tensor([[4.0, 6, 15, 20], [30, 33, 60, 58]]))

    def losses(weights: list[float] | None) -> torch.Tensor:
        instances = Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([0, 2]))
        if weights is not None:
            instances.gt_weights = torch.tensor(weights)
        targets = assign_targets(predictions[..., :4], grid, transform, [instances], 0.7)
        by_name = YOLOv3Loss(transform=transform)(predictions, grid, targets)
        return torch.stack([by_name[name] for name in sorted(by_name)])

    background = losses([0.0, 0.0])
    first, second = losses([1.0, 0.0]) - background, losses([0.0, 1.0]) - background
    assert (first > 0).all()
    assert (second > 0).all()
    torch.testing.assert_close(losses([0.25, 0.75]), background + 0.25 * first + 0.75 * second)
    torch.testing.assert_close(losses(None), background + first + second)
