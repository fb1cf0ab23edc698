"""Everything that computes, on a GPU: the real one where there is one, and else a pretended one.

Training with all that a recipe can ask for, evaluation, resuming, prediction and the page; what a step waits for.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from classification import engine, run
from classification.cub import read_cub
from classification.recipe import Recipe
from classification.run import Run
from classification.train import build_model_for
from common.errors import UserError
from common.run_folder import read_metrics
from detection import hooks
from detection.comparison import compare, to_objects
from detection.experiment import new_experiment
from detection.proposals import record_proposals
from detection.trainer import Trainer
from detection.yolov3 import targets
from tests.classification.conftest import draw_birds
from tests.classification.runs import EVERYTHING, TINY, assert_same
from tests.detection import conftest as detection
from tests.pretended_gpu import pretended_gpu
from tests.tools import conftest as tools
from tools import app
from tools.predict import load_model

IS_REAL = torch.cuda.is_available()
STEPS = 20 if IS_REAL else 3
voc_folder, tiny_opts = detection.voc_folder, detection.tiny_opts
make_detector, make_classifier = tools.make_detector, tools.make_classifier

EPOCHS = 7 if IS_REAL else 2  # of three steps
BIRDS = {**TINY, **EVERYTHING, "flip": 0.5, "drop_rate": 0.0, "accumulate": 2, "workers": 0, "epochs": EPOCHS}
RECIPES = [(model, recipe) for model in ("faster_rcnn", "yolov3") for recipe in ("best", "study")]
EVERYWHERE = {
    "INPUT.MOSAIC_PROB": 0.5,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.ACCUMULATE": 2,
    "SOLVER.MAX_ITER": STEPS,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WARMUP_ITERS": 1,
    "SOLVER.EMA_DECAY": 0.9,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.LOG_PERIOD": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.EVAL_PERIOD": 0,
    "TEST.VALIDATION_LOSS_IMAGES": 4,
}
SMALL = {
    # All anchors and proposals are sampled, since each device draws its own random numbers.
    "faster_rcnn": {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": 4096, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512},
    "yolov3": {
        "INPUT.MIXUP_PROB": 0.5,
        "MODEL.TIMM.NAME": "resnet10t",
        "MODEL.YOLOV3.CONV_DIMS": [8, 16, 16],
        "MODEL.YOLOV3.NUM_CONVS": [1, 1, 1],
        "INPUT.SQUARE_SIZES_TRAIN": [32, 64],
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 64,
    },
}


@pytest.fixture(params=["real", "pretended"])
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A GPU of this machine; the pretended one stands in where there is no other."""
    if request.param == "real" and not IS_REAL:
        pytest.skip("no NVIDIA GPU here: the same test runs on a pretended one")
    if request.param == "pretended" and IS_REAL:
        pytest.skip("there is a real GPU, which the same test runs on")
    if IS_REAL:
        yield torch.device("cuda", 0)
    else:
        with pretended_gpu():
            yield torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are drawn by the host alone, and take as long as a step."""
    for module in (run, hooks):
        monkeypatch.setattr(module, "write_results", lambda folder: None)


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_birds(tmp_path_factory.mktemp("birds"))


@pytest.fixture
def make_trainer(voc_folder: Path, tiny_opts: list[str]) -> Callable[..., Trainer]:
    """Makes the trainer of a detector and recipe, small, with everything switched on."""

    def make(model: str, recipe: str, resumed: Path | None = None, **options: object) -> Trainer:
        settings = {**EVERYWHERE, **SMALL[model], **{key.replace("__", "."): options[key] for key in options}}
        words = [str(word) for pair in settings.items() for word in pair]
        words = tiny_opts + words if model == "faster_rcnn" else words
        names = argparse.Namespace(model=model, recipe=recipe, config=None, data=str(voc_folder), start=None)
        experiment = new_experiment(argparse.Namespace(**vars(names), backbone=None, pretrained=0, opts=words))
        experiment.resolve()
        return Trainer(experiment.cfg, resumed)

    return make


def bird_run(root: Path, device: torch.device | str, resumed: Path | None = None, **settings: object) -> Run:
    recipe = Recipe(**{**BIRDS, **settings})
    cub = read_cub(root)
    model, recipe = build_model_for(recipe, len(cub.class_names), is_sample=False)
    return Run(recipe, cub, model, torch.device(device), resumed)


def trained(training: Run | Trainer, folder: Path) -> list[dict]:
    """Trains into a folder, to the end; the rows of its metrics."""
    folder.mkdir(exist_ok=True)
    training.train(folder)
    return read_metrics(folder)


def losses(rows: list[dict]) -> list[float]:
    """Those of the first rows: on a real GPU other roundings lead elsewhere in the end."""
    assert all(math.isfinite(value) for row in rows for name, value in row.items() if "loss" in name)
    return [value for row in rows[: 1 if IS_REAL else None] for name, value in sorted(row.items()) if "loss" in name]


def assert_same_ends(ours: Path, theirs: Path) -> None:
    """All that two runs would go on with, bit for bit; a real GPU's sums have no fixed order."""
    if not IS_REAL:
        ends = [
            torch.load(folder / "model_last.pth", map_location="cpu", weights_only=True) for folder in (ours, theirs)
        ]
        for end in ends:
            end["trainer"].pop("rows", None)  # times
        assert_same(*ends)


class At(HookBase):
    """Calls something after an iteration; comes last."""

    def __init__(self, iteration: int, call: Callable[[], None]) -> None:
        self.iteration, self.call = iteration, call

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.call()


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_classifier_trains_as_on_the_cpu(cuda, birds, tmp_path, precision):
    expected = losses(trained(bird_run(birds, "cpu", precision="float32"), tmp_path / "cpu"))
    rows = trained(bird_run(birds, cuda, precision=precision), tmp_path / "gpu")
    tolerance = {"float32": 1e-2 if IS_REAL else 1e-5, "bfloat16": 5e-2, "float16": 0.1}[
        precision
    ]  # its first steps are skipped
    assert losses(rows) == pytest.approx(expected, rel=tolerance)
    assert json.loads((tmp_path / "gpu" / "result.json").read_text())["test_images"] == 10


def test_the_classifier_resumes_with_its_scaler(cuda, birds, tmp_path, monkeypatch):
    trained(bird_run(birds, cuda, precision="float16"), tmp_path / "whole")
    save = Run._save_last

    def save_and_stop(training: Run, folder: Path) -> None:
        save(training, folder)
        if training.trainer.iteration == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_save_last", save_and_stop)
        trained(bird_run(birds, cuda, precision="float16"), tmp_path / "parts")
    resumed = bird_run(birds, cuda, tmp_path / "parts", precision="float16")
    assert resumed.trainer.iteration == 2
    assert resumed.trainer.grad_scaler.state_dict()["_growth_tracker"] == 2
    trained(resumed, tmp_path / "parts")
    assert_same_ends(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(("model", "recipe"), RECIPES)
def test_detectors_train_as_on_the_cpu(cuda, make_trainer, tmp_path, model, recipe):
    options = {"MODEL__PRECISION": "float32"}
    expected = losses(trained(make_trainer(model, recipe, **options, MODEL__DEVICE="cpu"), tmp_path / "cpu"))
    assert any("validation_loss" in row and "AP50_11point" in row for row in read_metrics(tmp_path / "cpu"))
    rows = trained(make_trainer(model, recipe, **options), tmp_path / "gpu")
    assert losses(rows) == pytest.approx(expected, rel=0.1 if IS_REAL else 1e-5, abs=1e-6)


@pytest.mark.parametrize(("model", "recipe"), RECIPES if IS_REAL else RECIPES[::2])
def test_detectors_resume_with_their_scaler(cuda, make_trainer, tmp_path, model, recipe):
    options = {"MODEL__PRECISION": "float16"}
    losses(trained(make_trainer(model, recipe, **options), tmp_path / "whole"))
    stopped = make_trainer(model, recipe, **options)
    stopped.register_hooks([At(1, stop)])
    with pytest.raises(KeyboardInterrupt):
        trained(stopped, tmp_path / "parts")
    resumed = make_trainer(model, recipe, tmp_path / "parts", **options)
    assert resumed.start_iter == 2
    assert resumed.grad_scaler.state_dict() == stopped.grad_scaler.state_dict()
    assert_same(dict(resumed.bare_model.state_dict()), dict(stopped.bare_model.state_dict()))
    trained(resumed, tmp_path / "parts")
    assert_same_ends(tmp_path / "parts", tmp_path / "whole")


# Waits of a training step of two images; those of Faster R-CNN are all Detectron2's own.
WAITS = {"classifier": 0, "yolov3": 0, "faster_rcnn": 65}


def watch_third_step(
    training: Run | Trainer, before: Callable[[], None], after: Callable[[], None], folder: Path
) -> None:
    """Trains for three steps, so that a whole one with its batch and hooks lies between the two calls."""
    folder.mkdir()
    if isinstance(training, Run):
        trainer = training.trainer
        calls = {2: before, 3: after}
        trainer.train(iter(training.loader), 3, lambda: calls.get(trainer.iteration, lambda: None)())
    else:
        training.register_hooks([At(1, before), At(2, after), At(2, stop)])
        with pytest.raises(KeyboardInterrupt):
            training.train(folder)


@pytest.fixture
def make_training(birds, make_trainer) -> Callable[..., Run | Trainer]:
    """Makes the best recipe of a model, its batch in one part."""
    once = {"SOLVER__ACCUMULATE": 1, "SOLVER__IMS_PER_BATCH": 2, "SOLVER__LOG_PERIOD": 20, "SOLVER__MAX_ITER": 4}
    once |= {"SOLVER__CHECKPOINT_PERIOD": 20, "TEST__VALIDATION_LOSS_IMAGES": 0}

    def make(model: str, **options: object) -> Run | Trainer:
        return bird_run(birds, "cuda", **options) if model == "classifier" else make_trainer(model, "best", **once)

    return make


@pytest.mark.parametrize("model", WAITS)
def test_what_a_step_waits_for(gpu, make_training, tmp_path, model):
    seen = []
    watch_third_step(make_training(model), gpu.waits.clear, lambda: seen.extend(gpu.waits), tmp_path / "run")
    theirs = [wait for wait in seen if wait.line.startswith("detectron2/") or "mask" in wait.operator]
    assert len(seen) == WAITS[model], Counter(seen)
    assert theirs == seen


@pytest.mark.skipif(not IS_REAL, reason="no NVIDIA GPU here, which says itself when it is waited for")
@pytest.mark.parametrize("model", [model for model in WAITS if not WAITS[model]])
def test_cuda_itself_sees_no_wait(make_training, tmp_path, model):
    mode = torch.cuda.set_sync_debug_mode
    watch_third_step(make_training(model), lambda: mode("error"), lambda: mode("default"), tmp_path / "run")


def test_faster_rcnn_waits_for_no_more_than_detectron2s_own(gpu, make_training):
    trainer = make_training("faster_rcnn")
    stock = GeneralizedRCNN(trainer.cfg).to("cuda")
    stock.load_state_dict(trainer.bare_model.state_dict())
    batch = next(iter(trainer.data_loader))
    counts = []
    for model in (trainer.bare_model, stock):
        gpu.waits.clear()
        torch.manual_seed(0)
        with EventStorage():
            sum(model(batch).values()).backward()
        counts.append(Counter((wait.kind, wait.operator, wait.line) for wait in gpu.waits))
    assert counts[0] <= counts[1]


def test_models_answer_as_on_the_cpu(cuda, make_detector, make_classifier, tmp_path, monkeypatch):
    paths = {
        app.FASTER_RCNN: make_detector(tmp_path / "frcnn", "faster_rcnn_R_50_FPN", ["red", "blue"], tmp_path),
        app.YOLOV3: make_detector(tmp_path / "yolov3", "yolov3_tiny", ["red", "blue"], tmp_path),
        app.BIRDS: make_classifier(tmp_path / "birds", [f"bird {number}" for number in range(7)]),
    }
    for name in (app.FASTER_RCNN, app.YOLOV3):
        config = paths[name].parent / "config.yaml"
        config.write_text(config.read_text().replace("PRECISION: auto", "PRECISION: float32"))
    image = torch.randint(256, (3, 48, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    answers = []
    for device in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            frcnn, yolov3, bird = (load_model(path) for path in paths.values())
        assert {next(model.parameters()).device.type for model in (frcnn.model, yolov3.model, bird.model)} == {device}
        with record_proposals(frcnn.model) as proposals:
            found = {each.name: to_objects(each.predict(image, 0)) for each in (frcnn, yolov3)}
        boxes = proposals[0].to("cpu").proposal_boxes.tensor
        cut, birds = bird.cut_out(image), bird.predict(image)
        likeliest = dict(zip(birds.names, birds.scores.tolist(), strict=True))
        answers.append((found, compare(found), boxes, likeliest, bird.saliency(cut, 3)))
    for ours, theirs in zip(*(answer[0].values() for answer in answers), strict=True):
        assert len(ours) > 0
        assert [box["score"] for box in ours] == pytest.approx([box["score"] for box in theirs], abs=1e-3)
    assert Counter(pair["agreement"] for pair in answers[0][1]) == Counter(pair["agreement"] for pair in answers[1][1])
    for ours, theirs in zip(*(answer[2:] for answer in answers), strict=True):
        if isinstance(ours, dict):
            assert ours == pytest.approx(theirs, abs=1e-3)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)

    page = app.build_page(app.load_models(paths), score=0.1)
    look = next(block.fn for block in page.fns.values() if block.fn is not None and block.fn.__name__ == "look")
    photograph = tmp_path / "photograph.png"
    photograph.write_bytes(bytes(torchvision.io.encode_png(image).tolist()))
    labels = [part.label for part in look(str(photograph), 20).values() if hasattr(part, "label")]
    assert [label.partition(":")[0] for label in labels] == [app.FASTER_RCNN, app.PROPOSALS, app.YOLOV3]


def test_a_scalar_left_on_the_cpu_in_the_sums_is_found(gpu, make_training, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.torch, "full_like", lambda tensor, value: torch.tensor(value))
    with pytest.raises(RuntimeError, match=r"same device.*stack found.*cpu"):
        make_training("classifier").train(tmp_path)


FAULTS = {
    "an index": ("to_device", lambda values, device: torch.tensor(values)),
    "a mask": ("Boxes", type("Boxes", (Boxes,), {"nonempty": lambda boxes: Boxes(boxes.tensor.cpu()).nonempty()})),
}


@pytest.mark.parametrize(("name", "fault"), FAULTS.values(), ids=FAULTS)
def test_what_the_targets_make_on_the_cpu_is_found(gpu, make_training, tmp_path, monkeypatch, name, fault):
    monkeypatch.setattr(targets, name, fault)
    with pytest.raises(RuntimeError, match=r"same device.*cpu"):
        make_training("yolov3").train(tmp_path)


def test_a_number_asked_for_in_the_step_is_found(gpu, make_training, tmp_path):
    training, seen = make_training("classifier"), []
    criterion = training.trainer.criterion
    training.trainer.criterion = lambda *args: criterion(*args) * (1 + 0 * criterion(*args).item())
    watch_third_step(training, gpu.waits.clear, lambda: seen.extend(gpu.waits), tmp_path / "run")
    assert {(wait.kind, Path(wait.caller.rpartition(":")[0]).name) for wait in seen} == {
        ("number", Path(__file__).name)
    }


@pytest.mark.parametrize("model", ["faster_rcnn", "yolov3"])
def test_a_buffer_of_the_anchors_left_on_the_cpu_is_found(gpu, make_training, tmp_path, model):
    trainer = make_training(model)
    bare = trainer.bare_model
    anchors = (bare if model == "yolov3" else bare.proposal_generator).anchor_generator.cell_anchors
    for name, buffer in list(anchors.named_buffers()):
        anchors._buffers[name] = buffer.cpu()
    with pytest.raises(RuntimeError, match=r"same device.*cpu"):
        trainer.train(tmp_path)


@pytest.mark.parametrize("model", ["classifier", "yolov3"])
def test_infinite_gradients_skip_the_step_and_halve_the_scale(cuda, make_trainer, birds, tmp_path, model):
    if model == "classifier":
        training = bird_run(birds, cuda, precision="float16")
        scaler, network = training.trainer.grad_scaler, training.model
    else:
        training = make_trainer(model, "best", MODEL__PRECISION="float16", SOLVER__MAX_ITER=4)
        scaler, network = training.grad_scaler, training.bare_model
    scales, weights = [], []

    def note() -> None:
        scales.append(scaler.get_scale())
        weights.append([parameter.detach().cpu() for parameter in network.parameters()])

    def plant() -> None:
        note()
        handle.append(next(network.parameters()).register_hook(lambda gradient: gradient * math.inf))

    handle: list = []
    watch_third_step(training, plant, note, tmp_path / "run")
    assert scales[1] == scales[0] / 2
    assert all(torch.equal(before, after) for before, after in zip(*weights, strict=True))


@pytest.mark.parametrize("model", ["classifier", "faster_rcnn", "yolov3"])
def test_a_loss_that_is_no_number_ends_in_one_line(cuda, make_training, tmp_path, model):
    training = make_training(model)
    nn.init.constant_(
        next(iter((training.model if isinstance(training, Run) else training.bare_model).parameters())), math.nan
    )
    with pytest.raises(UserError, match=r"diverged|is infinite or no number") as error:
        training.train(tmp_path)
    assert "\n" not in str(error.value)
