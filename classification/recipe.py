"""A recipe: every setting of a training run, read from YAML, typed, overridable by KEY=VALUE."""

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from timm.optim import get_optimizer_info, list_optimizers
from yaml import YAMLError

from common.averaging import horizon_scaled
from common.errors import UserError, first_line
from common.files import write_text
from common.runtime import PRECISIONS

_CHOICES: dict[str, tuple[str, ...]] = {
    "choose": ("best", "last"),
    "train_crop": ("center", "random", "random_resized"),
    "schedule": ("constant", "cosine", "multistep"),
    "precision": ("auto", *PRECISIONS),
}
# Lower and upper bound of each setting, and whether each bound is itself allowed.
_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("flip", "random_erasing", "mix_prob"), (0, 1, "[]")),
    **dict.fromkeys(("label_smoothing", "warmup", "ema_decay", "holdout", "drop_rate", "momentum"), (0, 1, "[)")),
    **dict.fromkeys(("crop_pct", "crop_scale"), (0, 1, "(]")),
    **dict.fromkeys(("image_size", "epochs", "batch_size", "accumulate", "checkpoint_every"), (1, math.inf, "[)")),
    **dict.fromkeys(
        ("mixup", "cutmix", "snapmix", "weight_decay", "clip_grad", "backbone_lr_scale"), (0, math.inf, "[)")
    ),
    **dict.fromkeys(("patience", "workers"), (0, math.inf, "[)")),
    "seed": (0, 2**63, "[)"),
    "lr": (0, math.inf, "()"),
    "rotation": (0, 180, "[]"),
}

# Settings that take effect only together with another one: which, and whether a recipe has it.
_NEEDS: dict[str, tuple[str, Callable[["Recipe"], bool]]] = {
    "crop_scale": ("train_crop=random_resized", lambda recipe: recipe.train_crop == "random_resized"),
    "mix_prob": ("mixup, cutmix or snapmix", lambda recipe: bool(recipe.mixup or recipe.cutmix or recipe.snapmix)),
    "milestones": ("schedule=multistep", lambda recipe: recipe.schedule == "multistep"),
    "momentum": ("an optimizer that has it", lambda recipe: get_optimizer_info(recipe.optimizer).has_momentum),
}
VERBATIM = ("data", "model", "weights")  # names, which may look like YAML's numbers

# Settings that change neither the weights a run ends with nor their meaning.
INDIFFERENT = frozenset(("cache", "workers", "checkpoint_every"))
# What a resumed run may change: neither the network nor what stands at a position of the training stream.
MAY_CHANGE = frozenset(
    (
        *("data", "lr", "backbone_lr_scale", "momentum", "weight_decay", "schedule", "milestones", "warmup"),
        *("clip_grad", "epochs", "patience", "precision", "compile", *INDIFFERENT),
    )
)


@dataclass(frozen=True)
class Recipe:
    """Settings of one run; the defaults are the plainest training there is, and a recipe file says what differs.

    Attributes:
        data: folder that holds CUB_200_2011; without it `datasets`, or the drawn sample where that is empty.
        model: a timm model name, with or without a weights tag, or `alexnet` (torchvision's).
        pretrained: start from ImageNet weights; without them every layer learns at the full rate.
        weights: file to take them from instead of the hub (.pth or .safetensors).
        image_size: side in pixels of what the network sees.
        crop_pct: centre crop over short side, as in timm: images are resized to a short side of image_size / crop_pct.
        train_crop: `center` (as in testing), `random` (of the resized image) or `random_resized`.
        crop_scale: smallest share of the image's area that `random_resized` may keep.
        flip: probability of a horizontal flip.
        rotation: largest angle in degrees, drawn evenly on both sides.
        random_erasing: probability that a rectangle of an image is blanked.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; with both, each batch takes one or the other.
        snapmix: alpha of SnapMix, 0 for none.
        mix_prob: probability that a batch is mixed at all.
        label_smoothing: share of the target spread over all classes.
        drop_rate: dropout before the head; without it the model's own (0.5 for AlexNet, 0 for ResNet).
        optimizer: timm's name; `momentum` is SGD with classic momentum, `sgd` the same with Nesterov's.
        lr: rate of the head.
        backbone_lr_scale: rate of every other layer over the head's, for pretrained runs.
        momentum: of the optimizer.
        weight_decay: of all parameters.
        schedule: `constant`, `cosine` (to zero) or `multistep` (a tenth at each milestone), set at every iteration.
        milestones: epochs at which `multistep` lowers the rate.
        warmup: share of the run in which the rate rises linearly from zero.
        clip_grad: largest norm of the gradient, 0 for no limit.
        epochs: passes over the training images; if they are changed without the milestones, those scale with them.
        batch_size: images per step over all processes; a recipe gives that of one process, which is multiplied by their
            number, as its rate is.
        accumulate: micro-batches that a process splits its share of a batch into, so that a large batch fits into
            little memory.
        ema_decay: decay of the moving average of the weights, which is then what is measured and kept; 0 for none.
            If batch_size is changed without it, it is adapted to average over as many images as before.
        choose: `best`, the weights of the epoch with the highest validation top-1, or `last`, those of the last epoch:
            then no image chooses, and all of them can be trained on.
        holdout: share of the training images kept for validation; 0 validates on the test split.
        patience: epochs without a better validation top-1 after which the run stops; 0 never stops early.
        seed: of the weights, the order of images and every augmentation.
        precision: `float32`, or `bfloat16`, `float16` (autocast), or `auto`: what the hardware is fastest in.
        compile: pass the model through torch.compile.
        cache: keep decoded images in memory if they fit.
        workers: loading processes for each training process.
        checkpoint_every: iterations between checkpoints within an epoch; every epoch ends with one.
    """

    data: str | None = None
    model: str = "resnet18"
    pretrained: bool = True
    weights: str | None = None

    image_size: int = 224
    crop_pct: float = 0.875
    train_crop: str = "center"
    crop_scale: float = 0.5
    flip: float = 0.5
    rotation: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    snapmix: float = 0.0
    mix_prob: float = 1.0
    label_smoothing: float = 0.0
    drop_rate: float | None = None

    optimizer: str = "momentum"
    lr: float = 0.01
    backbone_lr_scale: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    schedule: str = "constant"
    milestones: list[float] = field(default_factory=list)
    warmup: float = 0.0
    clip_grad: float = 0.0
    epochs: int = 20
    batch_size: int = 64
    accumulate: int = 1
    ema_decay: float = 0.0

    choose: str = "best"
    holdout: float = 0.0
    patience: int = 0
    seed: int = 0

    precision: str = "auto"
    compile: bool = False
    cache: bool = True
    workers: int = 2
    checkpoint_every: int = 200


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies `KEY=VALUE` overrides, the last one winning.

    `weights=` without `pretrained=` means `pretrained=true`.

    Raises:
        UserError: the file cannot be read, a key or value is not valid, or a setting would have no effect.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; expected one of classification/recipes/*.yaml")
    malformed = [override for override in overrides if not override.partition("=")[1]]
    if malformed:
        raise UserError(f"{malformed[0]}: expected KEY=VALUE, as in OPTS='lr=0.01 epochs=5'")
    try:
        settings = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(path))
        changes = OmegaConf.from_dotlist([text for text in overrides if text.partition("=")[0] not in VERBATIM])
        for override in overrides:
            setting, _, text = override.partition("=")
            if setting in VERBATIM:
                changes[setting] = text if text not in ("", "null") else None
        if changes.get("weights"):  # a recipe that starts from random ones does so where none are given
            changes.setdefault("pretrained", True)
        recipe = OmegaConf.to_object(OmegaConf.merge(settings, changes))
        written = OmegaConf.to_object(settings)
        assert isinstance(recipe, Recipe) and isinstance(written, Recipe), "both are merged into a Recipe"
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error, OSError) and error.filename:
            raise  # not what is in the file
        key = getattr(error, "full_key", None)
        line = first_line(error)
        known = [setting.name for setting in dataclasses.fields(Recipe)]
        is_known = str(key).partition("[")[0] in known
        wish = "expected another type" if is_known else f"the settings are: {', '.join(known)}"
        raise UserError(f"{path} {' '.join(overrides)}: {key + ': ' if key else ''}{line}; {wish}") from None
    _check(recipe, path)
    for key, (other, is_met) in _NEEDS.items():
        if key in changes and not is_met(recipe):
            raise UserError(f"{key}={changes[key]}: nothing would come of it without {other}; give both or none")
    if "epochs" in changes and "milestones" not in changes:
        share = recipe.epochs / written.epochs
        recipe = dataclasses.replace(recipe, milestones=[milestone * share for milestone in recipe.milestones])
    if "batch_size" in changes and "ema_decay" not in changes:
        decay = horizon_scaled(recipe.ema_decay, recipe.batch_size, written.batch_size)
        recipe = dataclasses.replace(recipe, ema_decay=decay)
    return recipe


def scale_to_processes(recipe: Recipe, changes: Sequence[str], processes: int) -> Recipe:
    """The recipe with batch size, rate and averaging scaled to the number of processes; the user's own values stay.

    Args:
        recipe: with the changes.
        changes: `KEY=VALUE` that the user has given.
        processes: that train together.
    """
    given = {change.partition("=")[0] for change in changes}
    if "batch_size" in given or processes == 1:
        return recipe
    size = recipe.batch_size * processes
    lr = recipe.lr if "lr" in given else recipe.lr * processes
    decay = recipe.ema_decay if "ema_decay" in given else horizon_scaled(recipe.ema_decay, size, recipe.batch_size)
    return dataclasses.replace(recipe, batch_size=size, lr=lr, ema_decay=decay)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes all settings of a recipe, so that `load_recipe` returns an equal one."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def differences(old: Recipe, new: Recipe, allowed: Collection[str] = INDIFFERENT) -> list[str]:
    """Settings that differ, but for those `allowed` to, as `key: old -> new`."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [
        f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key] and key not in allowed
    ]


def _check(recipe: Recipe, path: Path) -> None:
    for key, allowed in _CHOICES.items():
        if getattr(recipe, key) not in allowed:
            raise UserError(f"{path}: {key}={getattr(recipe, key)}: expected one of {', '.join(allowed)}")
    for key, (low, high, ends) in _RANGES.items():
        value = getattr(recipe, key)
        if (
            value is None
            or low < value < high
            or (value == low and ends[0] == "[")
            or (value == high and ends[1] == "]")
        ):
            continue
        least = f"{low} or more" if ends[0] == "[" else f"more than {low}"
        most = "" if high == math.inf else f" and at most {high}" if ends[1] == "]" else f" and less than {high}"
        raise UserError(f"{path}: {key}={value}: expected {least}{most}")
    # Those excluded need libraries that are not installed, or second derivatives, or draw in each process on their own.
    left_out = ["bnb*", "fused*", "adahessian", "kron*"]
    optimizers = [str(name) for name in list_optimizers(exclude_filters=left_out)]
    if recipe.optimizer not in optimizers:
        close = difflib.get_close_matches(recipe.optimizer, optimizers, n=3) or ["sgd", "adamw"]
        raise UserError(
            f"{path}: optimizer={recipe.optimizer}: no such optimizer here; did you mean {' or '.join(close)}?"
        )
    if recipe.weights and not recipe.pretrained:
        raise UserError(
            f"{path}: weights={recipe.weights} with pretrained=false: give WEIGHTS or PRETRAINED=0, not both"
        )
    stops = [0.0, *recipe.milestones, math.inf]
    if recipe.schedule == "multistep" and not (
        recipe.milestones and all(before < after for before, after in itertools.pairwise(stops))
    ):
        raise UserError(f"{path}: milestones={recipe.milestones}: expected epochs at which the rate falls, in order")
    if recipe.patience and recipe.choose == "last":
        raise UserError(f"{path}: patience={recipe.patience} with choose=last: stopping early is choosing; give one")
    if recipe.snapmix and (recipe.mixup or recipe.cutmix):
        raise UserError(f"{path}: snapmix={recipe.snapmix} beside mixup or cutmix: expected one way to mix")
