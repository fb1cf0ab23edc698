"""Every key of the configuration, changed for either detector, is refused or changes what can be observed."""

import hashlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from PIL import ExifTags, Image

from common.errors import UserError
from detection.config import IN_EPOCHS, RecordingCfg, _flat, blamed_on, get_cfg, merge_options, refuse_unread, value_of
from detection.experiment import new_experiment
from detection.train_net import parse_args
from detection.trainer import Trainer

YOLOV3 = {
    "MODEL.TIMM.NAME": "test_resnet",
    "MODEL.YOLOV3.CONV_DIMS": [8, 16, 16],
    "MODEL.YOLOV3.NUM_CONVS": [1, 1, 1],
    "MODEL.YOLOV3.SCORE_THRESH_TEST": 0.000001,
    "INPUT.SQUARE_SIZES_TRAIN": [32, 64],
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.BASE_LR": 0.01,
    "INPUT.CLOSE_ITERS": 1,
    "TEST.EVAL_PERIOD": 5,
    "TEST.VALIDATION_LOSS_IMAGES": 2,
}
# Another valid value, where it does not follow from the one that a key has; the file of weights is written by the test.
VALID = {
    "MODEL.DEVICE": "cuda",
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.FPN.NORM": "BN",
    "MODEL.FPN.FUSE_TYPE": "avg",
    "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 30,
    "MODEL.ANCHOR_GENERATOR.NAME": "YOLOAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[9], [18], [36], [72], [140]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0, 2.0]],
    "MODEL.RPN.IOU_LABELS": [0, 0, 1],
    "MODEL.RPN.IOU_THRESHOLDS": [0.2, 0.4],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POSITIVE_FRACTION": 0.05,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.RPN.BBOX_REG_WEIGHTS": (2.0, 2.0, 2.0, 2.0),
    "MODEL.RPN.SMOOTH_L1_BETA": 0.5,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 5,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 5,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 5,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 5,
    "MODEL.RPN.NMS_THRESH": 0.3,
    "MODEL.RPN.CONV_DIMS": [16, 8],
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.05],
    "MODEL.ROI_HEADS.IOU_LABELS": [-1, 1],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.1,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.4,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (9.0, 9.0, 5.0, 5.0),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool",
    "MODEL.ROI_BOX_HEAD.NORM": "BN",
    "MODEL.RESNETS.DEPTH": 101,
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True],
    "MODEL.PRECISION": "bfloat16",
    "MODEL.YOLOV3.IN_FEATURES": ["dark5", "dark4", "dark3"],
    "MODEL.YOLOV3.CONV_DIMS": [8, 16, 24],
    "MODEL.YOLOV3.NUM_CONVS": [1, 1, 3],
    "MODEL.YOLOV3.ANCHORS": [[[9, 9], [10, 20], [20, 10]]] * 3,
    "MODEL.YOLOV3.NORM": "SyncBN",
    "MODEL.YOLOV3.IGNORE_THRESH": 0.1,
    "MODEL.YOLOV3.BBOX_REG_LOSS_TYPE": "ciou",
    "MODEL.YOLOV3.FOCAL_LOSS_ALPHA": 0.25,
    "MODEL.YOLOV3.SCORE_THRESH_TEST": 0.0001,
    "MODEL.YOLOV3.TOPK_CANDIDATES_TEST": 5,
    "MODEL.YOLOV3.NMS_THRESH_TEST": 0.1,
    "MODEL.TIMM.NAME": "resnet10t",
    "MODEL.TIMM.NORM": "SyncBN",
    "MODEL.TIMM.NORM_EPS": 0.001,
    "MODEL.TIMM.NEGATIVE_SLOPE": 0.2,
    "INPUT.EXIF": "stored",
    "INPUT.MIN_SIZE_TRAIN": (40,),
    "INPUT.MAX_SIZE_TRAIN": 56,
    "INPUT.MIN_SIZE_TEST": 48,
    "INPUT.MAX_SIZE_TEST": 80,
    "INPUT.AUGMENTATIONS": ["RandomPhotometricDistort"],
    "INPUT.SQUARE_SIZES_TRAIN": [64],
    "INPUT.INTERPOLATIONS": ["nearest"],
    "INPUT.CLOSE_ITERS": 2,
    "DATASETS.TRAIN": ("voc_test",),
    "DATASETS.TEST": ("voc_trainval",),
    "SOLVER.OPTIMIZER": "AdamW",
    "SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR",
    "SOLVER.BASE_LR_END": 0.001,
    "SOLVER.STEPS": (2,),
    "SOLVER.NUM_DECAYS": 1,
    "SOLVER.WARMUP_METHOD": "constant",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
    "SOLVER.STEPS_EPOCHS": [0.9],
    "SOLVER.MAX_EPOCHS": 2.0,
    "SOLVER.WARMUP_EPOCHS": 0.3,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.0001,
    "TEST.EVAL_EPOCHS": 1.0,
    "TEST.DETECTIONS_PER_IMAGE": 1,
    "TEST.VALIDATION_LOSS_IMAGES": 4,
    "TEST.IMS_PER_BATCH": 1,  # of four images no more than two have one size
    "INPUT.CLOSE_EPOCHS": 0.7,
    "TEST.AUG.MIN_SIZES": (48,),
    "TEST.AUG.MAX_SIZE": 40,
}
# What must be set besides for a key to mean anything.
WITH = {
    **{f"TEST.AUG.{key}": {"TEST.AUG.ENABLED": True} for key in ("MIN_SIZES", "MAX_SIZE", "FLIP")},
    "MODEL.RESNETS.NUM_GROUPS": {"MODEL.RESNETS.WIDTH_PER_GROUP": 4},
    "MODEL.ROI_BOX_HEAD.CONV_DIM": {"MODEL.ROI_BOX_HEAD.NUM_CONV": 1},
    "MODEL.ROI_BOX_HEAD.NORM": {"MODEL.ROI_BOX_HEAD.NUM_CONV": 1},
    "MODEL.TIMM.NEGATIVE_SLOPE": {"MODEL.TIMM.NAME": "darknet17"},
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": {"SOLVER.CLIP_GRADIENTS.ENABLED": True},
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": {"SOLVER.CLIP_GRADIENTS.ENABLED": True},
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": {
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.001,
    },
}
MULTISTEP = {"SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR"}
WITH_YOLOV3 = {
    "SOLVER.NUM_DECAYS": {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR"},
    "SOLVER.STEPS": MULTISTEP,
    "SOLVER.STEPS_EPOCHS": MULTISTEP,
    "SOLVER.GAMMA": MULTISTEP | {"SOLVER.STEPS": (2,)},
    "INPUT.MIXUP_BETA": {"INPUT.MIXUP_PROB": 1.0},
}
# Keys that something reads, and refused nevertheless: no other value of them makes a detector of boxes here.
REFUSED = {
    "faster_rcnn": {
        *("MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.BACKBONE.NAME", "MODEL.PROPOSAL_GENERATOR.NAME"),
        *("MODEL.ANCHOR_GENERATOR.NAME", "MODEL.RPN.HEAD_NAME", "MODEL.ROI_HEADS.NAME", "MODEL.ROI_BOX_HEAD.NAME"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", "MODEL.ROI_BOX_HEAD.USE_FED_LOSS"),
        *("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", "MODEL.RESNETS.RES5_DILATION", "MODEL.RESNETS.DEFORM_MODULATED"),
        *("MODEL.RESNETS.DEFORM_NUM_GROUPS", "INPUT.FORMAT", "INPUT.MIXUP_PROB", "VIS_PERIOD"),
        *("INPUT.MIXUP_BETA", "INPUT.SQUARE_SIZES_TRAIN"),  # with MIXUP_PROB 0, and over a MIN_SIZE_TRAIN that is given
        # These go together only.
        *("MODEL.FPN.IN_FEATURES", "MODEL.RPN.IN_FEATURES", "MODEL.RESNETS.OUT_FEATURES"),
    },
    "yolov3": {
        *("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.ANCHOR_GENERATOR.NAME", "MODEL.YOLOV3.NUM_CLASSES"),
    },
}  # fmt: skip
# Honoured or refused as the machine has it.
AS_THE_MACHINE = {"MODEL.DEVICE", "MODEL.RESNETS.DEFORM_ON_PER_STAGE"}


def build(model: str, data: Path, options: dict[str, Any]) -> tuple[CfgNode, RecordingCfg, Trainer]:
    """What the command line builds and refuses before it writes anything."""
    words = [str(word) for pair in options.items() for word in pair]
    experiment = new_experiment(parse_args(["--model", model, "--data", str(data), "--pretrained", "0", *words]))
    experiment.resolve()
    cfg = RecordingCfg(experiment.cfg)
    with blamed_on(experiment.given):
        trainer = Trainer(cfg)
    refuse_unread(cfg, experiment.recipe, experiment.given)
    return experiment.cfg, cfg, trainer


def observations(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """What a run does, cheapest first: the name of what is observed, and its digest."""

    def observe() -> Iterator[tuple[str, object]]:
        model = trainer.bare_model
        yield "machine", (torch.backends.cudnn.benchmark, str(model.device), getattr(model, "precision", None))
        yield "modules", repr(model)
        yield "weights", model.state_dict()
        yield "trained weights", [parameter.requires_grad for parameter in model.parameters()]
        yield "groups", [{**group, "params": len(group["params"])} for group in trainer.optimizer.param_groups]
        rates = []
        for iteration in range(trainer.max_iter):
            trainer.scheduler.last_epoch = iteration
            rates.append(trainer.scheduler.get_lr())
        yield "schedule", rates
        yield "averaging", trainer.averaging and trainer.averaging.average.decay
        names = ("period", "patience", "min_rise", "seed", "batch_size")
        yield "hooks", [[getattr(hook, name, None) for name in names] for hook in trainer._hooks]
        yield "loader", trainer.data_loader.loader.num_workers
        yield "training images", list(trainer.data_loader)
        yield "test images", [(name, list(loader)) for name, loader in trainer.evaluator.loaders.items()]
        yield "labelled test images", list(trainer.evaluator.labelled_loader)
        for number in range(2):
            torch.manual_seed(number)
            with EventStorage() as trainer.storage:
                trainer.run_step()
            yield "losses", trainer.loss_sum
        yield "trained model", model.state_dict()
        model.eval()
        with torch.no_grad():
            detections = [model(batch) for loader in trainer.evaluator.loaders.values() for batch in loader]
        yield "detections", detections

    for name, value in observe():
        digest = hashlib.blake2b()
        feed(digest, value)
        yield name, digest.hexdigest()


def feed(digest: "hashlib._Hash", value: object) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(repr((value.dtype, value.shape, value.stride())).encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Instances):
        fields = value.get_fields()
        feed(digest, {name: getattr(field, "tensor", field) for name, field in fields.items()})
    elif isinstance(value, dict):
        digest.update(str(len(value)).encode())
        for key, part in value.items():
            digest.update(str(key).encode())
            feed(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for part in value:
            feed(digest, part)
    else:
        digest.update(repr(value).encode())


def another(cfg: CfgNode, key: str) -> object:
    """A value that the key does not have."""
    value = value_of(cfg, key)
    if key in VALID and value != VALID[key]:
        return VALID[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + (0.25 if value == 0 else 0)
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, (list, tuple)):
        doubled = [part * 2 if type(part) in (int, float) else part for part in value]
        return type(value)(doubled if doubled != list(value) else [*value, *(value[:1] or [1])])
    return 0.5


def verdict(model: str, data: Path, options: dict[str, Any], key: str, value: object, bases: dict) -> str:
    """What comes of a value: "refused", what is observed to change first, or "nothing"."""
    cfg = bases["cfg"]
    companions = {**WITH, **(WITH_YOLOV3 if model == "yolov3" else {})}.get(key, {})
    if not all(cfg.was_read(name) for name in companions):
        companions = {}
    if not companions and key not in IN_EPOCHS.values() and not cfg.was_read(key):
        # What nothing reads changes nothing that is built.
        recipe = bases["plain"].clone()
        merge_options(recipe, [key, str(value)])
        with pytest.raises(UserError, match=f"^{key} .*nothing would come of it; .*leave it out$"):
            refuse_unread(cfg, recipe, [key])
        return "refused"
    base = observations(build(model, data, options | companions)[2]) if companions else bases["observations"]
    options = {name: given for name, given in (options | companions).items() if name != key}
    try:
        *_, trainer = build(model, data, {**options, key: value})
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    for expected, found in itertools.zip_longest(base, observations(trainer)):
        if expected != found:
            return (expected or found)[0]
    return "nothing"


@pytest.mark.parametrize("model", ["faster_rcnn", "yolov3"])
def test_every_key_is_honoured_or_refused(
    model: str, voc_folder: Path, tiny_opts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    options = YOLOV3 if model == "yolov3" else dict(zip(tiny_opts[::2], tiny_opts[1::2], strict=True))
    options = {**options, "TEST.VALIDATION_LOSS_IMAGES": 2}
    if model == "faster_rcnn":
        options |= {"SOLVER.MAX_ITER": 3, "SOLVER.WARMUP_ITERS": 2}
        del options["SOLVER.STEPS"]  # those of the recipe
    data = tmp_path / "data"  # as voc_folder, but that EXIF mirrors a picture, for INPUT.EXIF
    shutil.copytree(voc_folder, data)
    mirrored = Image.Exif()
    mirrored[ExifTags.Base.Orientation] = 2
    picture = data / "JPEGImages/trainval_0.jpg"
    Image.open(picture).save(picture, quality="keep", exif=mirrored)
    plain, cfg, trainer = build(model, data, options)
    weights = tmp_path / "weights.pth"
    torch.save({name: value + 1 for name, value in trainer.bare_model.state_dict().items()}, weights)
    bases = {"plain": plain, "cfg": cfg, "observations": list(observations(trainer))}
    assert (
        list(observations(build(model, data, options)[2])) == bases["observations"]
    )  # what differs is the key's doing

    verdicts = {}
    for key in _flat(get_cfg()):
        value = str(weights) if key == "MODEL.WEIGHTS" else another(cfg, key)
        verdicts[key] = verdict(model, data, options, key, value, bases)
    assert {key for key, found in verdicts.items() if found == "nothing"} == set()
    refused = {key for key, found in verdicts.items() if found == "refused" and key not in AS_THE_MACHINE}
    assert {key for key in refused if cfg.was_read(key)} == REFUSED[model]
