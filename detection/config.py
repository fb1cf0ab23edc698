"""The configuration of a run: Detectron2's keys and ours, from files and options; one without an effect is refused."""

import ast
import contextlib
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from fvcore.common.config import BASE_KEY

from common.errors import UserError, first_line, one_line
from common.runtime import default_device
from detection.yolov3.config import add_yolov3_config

CONFIGS = Path(__file__).parent / "configs"
LEAF = {"faster_rcnn": "faster_rcnn_R_50_FPN", "yolov3": "yolov3_darknet53"}
RECIPES = ("best", "sgd", "study", "small", "coco")
META_ARCHITECTURES = {"faster_rcnn": ("FasterRCNN", "GeneralizedRCNN"), "yolov3": ("YOLOv3",)}
NAMES = {"FasterRCNN": "Faster R-CNN", "GeneralizedRCNN": "Faster R-CNN", "YOLOv3": "YOLOv3"}

# A length in iterations, and the key that says the same in epochs.
IN_EPOCHS = {
    "SOLVER.MAX_ITER": "SOLVER.MAX_EPOCHS",
    "SOLVER.STEPS": "SOLVER.STEPS_EPOCHS",
    "SOLVER.WARMUP_ITERS": "SOLVER.WARMUP_EPOCHS",
    "INPUT.CLOSE_ITERS": "INPUT.CLOSE_EPOCHS",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}
# Keys that Detectron2 reads and that have no effect here, and why.
IDLE = {
    "INPUT.FORMAT": "images are in RGB",
    "VIS_PERIOD": "make visualize-batches draws training images",
    "MODEL.MASK_ON": "annotations hold boxes and no masks",
    "MODEL.KEYPOINT_ON": "annotations hold boxes and no keypoints",
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": "only heads of masks and keypoints train on them",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": "annotations hold no frequencies of classes",
}
# Keys that have no effect while another key has one of these values.
IDLE_WHILE = {
    "MODEL.RESNETS.DEFORM_MODULATED": ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", ([False] * 4,)),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", ([False] * 4,)),
    "MODEL.RPN.SMOOTH_L1_BETA": ("MODEL.RPN.BBOX_REG_LOSS_TYPE", ("giou", "diou", "ciou")),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", ("giou", "diou", "ciou")),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": ("MODEL.ROI_BOX_HEAD.NUM_CONV", (0,)),
    "MODEL.ROI_BOX_HEAD.NORM": ("MODEL.ROI_BOX_HEAD.NUM_CONV", (0,)),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("value",)),
    "SOLVER.WARMUP_FACTOR": ("SOLVER.WARMUP_ITERS", (0,)),
    "SOLVER.WARMUP_METHOD": ("SOLVER.WARMUP_ITERS", (0,)),
    "INPUT.MIXUP_BETA": ("INPUT.MIXUP_PROB", (0.0,)),
}
# For keys that were not read: what takes their place.
INSTEAD = {
    "INPUT.RANDOM_FLIP": "INPUT.AUGMENTATIONS lists what is done to an image",
    "INPUT.CROP.ENABLED": "INPUT.AUGMENTATIONS lists what is done to an image",
    "INPUT.MIN_SIZE_TRAIN": "INPUT.SQUARE_SIZES_TRAIN takes its place",
    "INPUT.MAX_SIZE_TRAIN": "INPUT.SQUARE_SIZES_TRAIN takes its place",
    "SOLVER.AMP.ENABLED": "MODEL.PRECISION names the type",
    "SOLVER.REFERENCE_WORLD_SIZE": "the file of a recipe says it; options are taken as they are",
    "DATASETS.ROOT": "DATA= names the data",
    "OUTPUT_DIR": "runs are below output/",
}


def add_detection_config(cfg: CfgNode) -> None:
    """Adds the keys that both detectors share to Detectron2's."""
    # What the network computes in, in training and inference: "auto", the device's fastest, "bfloat16", "float16" or
    # "float32".
    cfg.MODEL.PRECISION = "auto"
    cfg.MODEL.CHANNELS_LAST = True
    # A backbone of timm: any network that has features at strides 8, 16 and 32; at 4 too below a feature pyramid of
    # Faster R-CNN, with MODEL.BACKBONE.NAME build_timm_fpn_backbone.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = "darknet53"
    cfg.MODEL.TIMM.NORM = "BN"  # or "SyncBN"
    # None keeps the network's own values: 1e-5 and 0.01 in timm's darknet53. Darknet's own files need 1e-6 and 0.1.
    cfg.MODEL.TIMM.NORM_EPS = None
    cfg.MODEL.TIMM.NEGATIVE_SLOPE = None
    # Names of the classes in the order of their ids, taken from the data, and the folder the data came from.
    cfg.MODEL.CLASSES = []
    cfg.DATASETS.ROOT = ""

    # What boxes were drawn on, where the annotated size does not tell: "auto", the image turned and mirrored as its
    # EXIF tag says, or "stored", the pixels as they are in the file.
    cfg.INPUT.EXIF = "auto"
    # torchvision.transforms.v2 classes by name, in order, applied to the training images with their boxes; arguments
    # other than their defaults as {name: {argument: value}}.
    cfg.INPUT.AUGMENTATIONS = ["RandomHorizontalFlip"]
    # Sides of the squares that training images are fitted and padded into, one for each batch; replaces MIN_SIZE_TRAIN
    # and MAX_SIZE_TRAIN, which are chosen for each image.
    cfg.INPUT.SQUARE_SIZES_TRAIN = []
    # "nearest", "bilinear", "bicubic": one is drawn for each training image.
    cfg.INPUT.INTERPOLATIONS = ["bilinear"]
    # Shares of the training images that are mixed with another one, by a weight from Beta(b, b), or put into a mosaic.
    cfg.INPUT.MIXUP_PROB = 0.0
    cfg.INPUT.MIXUP_BETA = 1.5
    cfg.INPUT.MOSAIC_PROB = 0.0
    # Length of the last phase, without mixup and mosaic and, with SQUARE_SIZES_TRAIN, at MIN_SIZE_TEST.
    cfg.INPUT.CLOSE_ITERS = 0

    cfg.SOLVER.OPTIMIZER = "SGD"  # or "AdamW"

    # Lengths in epochs, one pass over the training images; 0 leaves the count in iterations to Detectron2's key. Of a
    # recipe's WARMUP_ITERS and WARMUP_EPOCHS the shorter counts.
    cfg.SOLVER.MAX_EPOCHS = 0.0
    cfg.SOLVER.STEPS_EPOCHS = []
    cfg.SOLVER.WARMUP_EPOCHS = 0.0
    cfg.INPUT.CLOSE_EPOCHS = 0.0
    cfg.TEST.EVAL_EPOCHS = 0.0
    # Gradient accumulation: number of parts that a process splits its share of a batch into, to save memory. A recipe
    # is scaled as if there were that many times as many processes.
    cfg.SOLVER.ACCUMULATE = 1
    # Exponential moving average of the weights, evaluated and kept in their stead; 0 is off.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Iterations between two rows of metrics.json and lines of the log.
    cfg.SOLVER.LOG_PERIOD = 20

    # Evaluations without a rise of AP50_11point by MIN_RISE before training stops; 0 never stops early.
    cfg.TEST.PATIENCE = 0
    cfg.TEST.MIN_RISE = 0.001
    # Images whose losses are averaged into validation_loss at every evaluation; 0 is off.
    cfg.TEST.VALIDATION_LOSS_IMAGES = 500
    cfg.TEST.IMS_PER_BATCH = 4
    # Sizes of test-time augmentation, in the sense of INPUT.MIN_SIZE_TEST; the long side is scaled too, up to
    # TEST.AUG.MAX_SIZE. Empty: 0.75, 1 and 1.25 times INPUT.MIN_SIZE_TEST.
    cfg.TEST.AUG.MIN_SIZES = ()


def get_cfg() -> CfgNode:
    """Detectron2's defaults with the keys of this project."""
    cfg = get_detectron2_cfg()
    add_detection_config(cfg)
    add_yolov3_config(cfg)
    return cfg


def leaf_name(model: str, recipe: str) -> str:
    """Name of the leaf configuration, and of the runs, of a model (see `LEAF`) and a recipe (see `RECIPES`).

    Raises:
        UserError: the model has no such recipe.
    """
    leaves = {name: LEAF[model] + ("" if name == "best" else f"_{name}") for name in RECIPES}
    known = [name for name, leaf in leaves.items() if (CONFIGS / f"{leaf}.yaml").is_file()]
    if recipe not in known:
        raise UserError(f"RECIPE={recipe}: {model} has none of this name; expected one of {', '.join(known)}")
    return leaves[recipe]


def read_run_cfg(run: Path, options: Sequence[str] = ()) -> CfgNode:
    """The configuration of a run folder, for the device that is here.

    Args:
        run: the folder.
        options: KEY VALUE pairs over it.

    Raises:
        UserError: there is none, it is broken, or an option is wrong.
    """
    cfg = get_cfg()
    merge_file(cfg, run / "config.yaml")
    cfg.MODEL.DEVICE = default_device()
    merge_options(cfg, options)
    return cfg


def merge_file(cfg: CfgNode, path: Path, within: Sequence[Path] = ()) -> tuple[CfgNode, list[str]]:
    """Merges a YAML file and the `_BASE_` that it names into `cfg`; a base is looked for beside it, then in `CONFIGS`.

    A length in iterations replaces the same length in epochs, unless the file sets both.

    Args:
        cfg: changed in place.
        path: of the file.
        within: the files that name it as their base; it cannot name one of them as its own.

    Returns:
        The configuration before the file's own keys are merged, and those keys.

    Raises:
        UserError: the file is missing, is no YAML, or holds a key or type that the configuration does not know.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a configuration of detection/configs or of a run folder")
    return merge_yaml(cfg, path.read_bytes(), path, within)


def merge_yaml(cfg: CfgNode, text: str | bytes, path: Path, within: Sequence[Path] = ()) -> tuple[CfgNode, list[str]]:
    """Merges YAML as `merge_file` does; `path` is the file that it stands in."""
    try:
        leaf = yaml.safe_load(text) or {}
        if not isinstance(leaf, dict):
            raise TypeError(f"it holds a {type(leaf).__name__}")
        bases = leaf.pop(BASE_KEY, [])
        bases = [bases] if isinstance(bases, str) else list(bases)
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is no YAML of keys and values ({first_line(error)})") from error
    within = (*within, path.resolve())
    for base in map(str, bases):
        places = [place for place in (path.parent / base, CONFIGS / base) if place.resolve() not in within]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(f"{path}: {BASE_KEY} {base}: no such file, expected one beside it or in {CONFIGS}")
        merge_file(cfg, found, within)
    from_bases = cfg.clone()
    _fit_types(leaf, cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode(leaf))
    except Exception as error:  # yacs raises a dozen kinds
        reason = first_line(error)
        raise UserError(f"{path}: {reason}; expected the keys of detection/config.py and Detectron2") from error
    given = list(_flat(leaf))
    for key in IN_EPOCHS.keys() & given:
        if IN_EPOCHS[key] not in given:
            _forget_epochs(cfg, key)
    return from_bases, given


def merge_options(cfg: CfgNode, options: Sequence[str]) -> list[str]:
    """Merges `KEY VALUE ...` pairs into `cfg`; a length in iterations replaces the same length in epochs.

    Returns:
        The keys.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or one of them is missing.
    """
    if len(options) % 2:
        raise UserError(f"OPTS: {' '.join(options)!r} has {len(options)} words; expected pairs of KEY VALUE")
    for key, value in zip(options[::2], options[1::2], strict=True):
        try:
            known = functools.reduce(lambda node, part: node.get(part, {}), key.split("."), cfg)
            if value.removeprefix("-").isdecimal() and isinstance(known, float):
                value = f"{value}.0"  # yacs would refuse the integer
            if isinstance(known, str) and value[:1] not in ("'", '"'):
                value = repr(value)
            elif isinstance(known, list | tuple):
                value = _with_quotes(value)
            cfg.merge_from_list([key, value])
            if key in IN_EPOCHS:
                _forget_epochs(cfg, key)
        except Exception as error:
            raise UserError(f"OPTS: {key} {value}: {first_line(error)}; see detection/config.py") from error
    return list(options[::2])


def _with_quotes(value: str) -> str:
    """A list in Python's syntax, also if its words lack quotes, as in YAML."""
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return repr(yaml.safe_load(value))
    return value


def _fit_types(leaf: dict, cfg: CfgNode) -> None:
    """Converts values, in place, to what yacs accepts for the configuration's floats and strings.

    yacs refuses whole numbers for floats, and would read a string, such as a folder `2024`, as a number.
    """
    for key, value in leaf.items():
        known = cfg.get(key)
        if isinstance(value, dict) and isinstance(known, CfgNode):
            _fit_types(value, known)
        elif type(value) is int and isinstance(known, float):
            leaf[key] = float(value)
        elif isinstance(value, str) and isinstance(known, str):
            leaf[key] = repr(value)


def _forget_epochs(cfg: CfgNode, key: str) -> None:
    """Resets a length in epochs, so that its key in iterations counts."""
    cfg.merge_from_list([IN_EPOCHS[key], [] if key == "SOLVER.STEPS" else 0.0])


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(dict.__getitem__, key.split("."), cfg)


def at_least_one(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key, a number or several, of pixels or images.

    Raises:
        UserError: one is below 1.
    """
    value = functools.reduce(getattr, key.split("."), cfg)  # which remembers that it was read
    if any(number < 1 for number in (value if isinstance(value, Sequence) else [value])):
        raise UserError(f"{key} {value}: expected 1 or more")
    return value


def _flat(node: Mapping, prefix: str = "") -> Iterator[str]:
    """Dotted names of the leaves of nested mappings."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


class RecordingCfg(CfgNode):
    """A copy of a configuration that remembers which of its keys were read."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        self.__dict__.setdefault("_read", set()).add(name)
        return value

    def __deepcopy__(self, memo: dict) -> CfgNode:
        """A plain copy. Whoever takes it may read all of it, at any time."""
        self.__dict__.setdefault("_read", set()).update(self)
        return CfgNode(dict(self))

    def was_read(self, key: str) -> bool:
        """Whether anything has asked for this dotted key."""
        *parents, leaf = key.split(".")
        node = value_of(self, ".".join(parents)) if parents else self
        return leaf in node.__dict__.get("_read", ())


def refuse_unread(cfg: RecordingCfg, recipe: CfgNode, keys: Iterable[str]) -> None:
    """Refuses keys that the user has set to no effect; call it once everything is built.

    Args:
        cfg: the configuration that everything was built from.
        recipe: the configuration before the user changed it.
        keys: those that the user has set.

    Raises:
        UserError: one of them is never read, or is read without effect.
    """
    in_iterations = {epochs: iterations for iterations, epochs in IN_EPOCHS.items()}
    for key in keys:
        value = value_of(cfg, key)
        if value == value_of(recipe, key):
            continue
        hint = IDLE.get(key)
        if not cfg.was_read(in_iterations.get(key, key)):
            hint = INSTEAD.get(key) or f"{NAMES[cfg.MODEL.META_ARCHITECTURE]} with these settings does not read it"
        elif key in IDLE_WHILE:
            other, idle = IDLE_WHILE[key]
            if value_of(cfg, other) in idle:
                hint = f"{other} is {value_of(cfg, other)}"
        if hint:
            raise UserError(f"{key} {value}: nothing would come of it; {hint}: leave it out")


@contextlib.contextmanager
def blamed_on(keys: Collection[str]) -> Iterator[None]:
    """Blames a library's error, while something is built, on the keys that the user has set, if any.

    Raises:
        UserError: in place of an error that would not tell the user what to mend.
    """
    try:
        yield
    except Exception as error:  # each part of Detectron2 has its own way to fail
        if not keys or one_line(error) is not None:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"OPTS: nothing can be built ({reason[:200]}); expected values that fit together: see detection/config.py "
            f"and Detectron2's defaults, and leave some out of {', '.join(dict.fromkeys(keys))}"
        ) from error
