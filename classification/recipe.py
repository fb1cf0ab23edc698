"""A recipe: every setting of a training run, read from YAML, typed, overridable by KEY=VALUE."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import UserError

_CHOICES = {
    "train_crop": ("center", "random", "random_resized"),
    "schedule": ("constant", "cosine", "multistep"),
    "precision": ("auto", "bfloat16", "float32"),
}
_SHARES = ("flip", "random_erasing", "label_smoothing", "warmup", "ema_decay", "holdout")
_AT_LEAST_ONE = ("image_size", "epochs", "batch_size", "checkpoint_every")

# Settings that change neither the weights a run ends with nor their meaning.
INDIFFERENT = ("cache", "workers", "checkpoint_every")


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
        epochs: passes over the training images.
        batch_size: images a step, over all processes together.
        ema_decay: decay of the moving average of the weights, which is then what is measured and kept; 0 for none.
        holdout: share of the training images kept for choosing the best epoch; 0 chooses on the test split.
        patience: epochs without a better validation top-1 after which the run stops; 0 never stops early.
        seed: of the weights, the order of images and every augmentation.
        precision: `float32`, `bfloat16` (autocast), or `auto`: bfloat16 where the hardware computes with it.
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
    mix_prob: float = 1.0
    label_smoothing: float = 0.0
    drop_rate: float | None = None

    optimizer: str = "momentum"
    lr: float = 0.01
    backbone_lr_scale: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    schedule: str = "constant"
    milestones: list[int] = field(default_factory=list)
    warmup: float = 0.0
    clip_grad: float = 0.0
    epochs: int = 20
    batch_size: int = 64
    ema_decay: float = 0.0

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

    Raises:
        UserError: the file cannot be read, or a key or value is not one a `Recipe` has.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such recipe; expected one of classification/recipes/*.yaml")
    malformed = [override for override in overrides if not override.partition("=")[1]]
    if malformed:
        raise UserError(f"{malformed[0]}: expected KEY=VALUE, as in OPTS='lr=0.01 epochs=5'")
    try:
        settings = OmegaConf.merge(
            OmegaConf.structured(Recipe), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        )
        recipe = OmegaConf.to_object(settings)
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        key = getattr(error, "full_key", None)
        line = str(error).splitlines()[0]
        known = ", ".join(setting.name for setting in dataclasses.fields(Recipe))
        wish = "expected another type" if hasattr(Recipe, str(key)) else f"the settings are: {known}"
        raise UserError(f"{path} {' '.join(overrides)}: {key + ': ' if key else ''}{line}; {wish}") from None
    _check(recipe, path)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes all settings of a recipe, so that `load_recipe` returns an equal one."""
    OmegaConf.save(OmegaConf.structured(recipe), path)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Settings that would change a run's result, as `key: old -> new`."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [
        f"{key}: {before[key]} -> {after[key]}"
        for key in before
        if before[key] != after[key] and key not in INDIFFERENT
    ]


def _check(recipe: Recipe, path: Path) -> None:
    for key, allowed in _CHOICES.items():
        if getattr(recipe, key) not in allowed:
            raise UserError(f"{path}: {key}={getattr(recipe, key)}: expected one of {', '.join(allowed)}")
    for key in _SHARES:
        if not 0 <= getattr(recipe, key) < 1 and not (key in ("flip", "random_erasing") and getattr(recipe, key) == 1):
            raise UserError(f"{path}: {key}={getattr(recipe, key)}: expected 0 or more and less than 1")
    for key in _AT_LEAST_ONE:
        if getattr(recipe, key) < 1:
            raise UserError(f"{path}: {key}={getattr(recipe, key)}: expected 1 or more")
    for key in ("crop_pct", "crop_scale"):
        if not 0 < getattr(recipe, key) <= 1:
            raise UserError(f"{path}: {key}={getattr(recipe, key)}: expected more than 0 and at most 1")
    if not recipe.lr > 0:
        raise UserError(f"{path}: lr={recipe.lr}: expected more than 0")
    if recipe.weights and not recipe.pretrained:
        raise UserError(
            f"{path}: weights={recipe.weights} with pretrained=false: give WEIGHTS or PRETRAINED=0, not both"
        )
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise UserError(
            f"{path}: batch_size={recipe.batch_size}: mixup and CutMix pair images, expected an even number"
        )
