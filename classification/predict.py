"""Which bird is it: probabilities for photographs, and the pixels that speak for an answer."""

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from classification.data_loader import read_resized
from classification.engine import BatchAugmentation
from classification.model import load_classifier
from classification.recipe import Recipe, load_recipe
from common.errors import UserError
from common.run_folder import read_metrics


def newest_weights(output: Path) -> Path | None:
    """`model_best.pth` of the newest classifier that was trained for its own sake, on whatever data; None without one.

    A run that another one started from was only its beginning. Of the runs of a sweep or a comparison the best counts.
    """
    folders = sorted({*output.glob("*/model_best.pth"), *output.glob("*/*/model_best.pth")})
    recipes = {path: recipe for path in folders if (recipe := _recipe_beside(path))}
    beginnings = {Path(recipe.weights).resolve().parent for recipe in recipes.values() if recipe.weights}
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in recipes:
        if path.resolve().parent not in beginnings:
            groups[output / path.relative_to(output).parts[0]].append(path)
    newest = max(groups.values(), key=lambda paths: max(path.stat().st_mtime for path in paths), default=[])
    return max(newest, key=_validation_top1, default=None)


def _recipe_beside(weights: Path) -> Recipe | None:
    try:
        return load_recipe(weights.parent / "config.yaml")
    except UserError:  # a detector has another kind of configuration
        return None


def _validation_top1(weights: Path) -> float:
    return max((row["validation_top1"] for row in read_metrics(weights.parent)), default=0.0)


class BirdClassifier:
    """A trained network with the preparation of images it was trained with.

    Args:
        weights: `model_best.pth` or `model_last.pth` of a run.
        device: to compute on.

    Raises:
        UserError: the file is not such a checkpoint.
    """

    def __init__(self, weights: Path, device: torch.device | str = "cpu"):
        self.model, card = load_classifier(weights)
        self.model.to(device)
        self.device = torch.device(device)
        self.class_names: list[str] = card["class_names"]
        self._side = int(card["image_size"] / card["crop_pct"])
        self._crop = v2.CenterCrop(card["image_size"])
        self._prepare = BatchAugmentation(card["mean"], card["std"])

    def read(self, path: Path) -> Tensor:
        """The square cut-out of a photograph that the network sees, uint8 (3, S, S).

        Raises:
            UserError: the file is not an image.
        """
        return self._crop(read_resized(path, self._side))

    def cut_out(self, image: Tensor) -> Tensor:
        """The same of a photograph that is read already, uint8 (3, H, W), RGB."""
        return self._crop(v2.functional.resize(image, [self._side], antialias=True))

    def likeliest(self, image: Tensor, count: int = 5) -> dict[str, float]:
        """The likeliest classes of a cut-out, uint8 (3, S, S), with their probabilities, the likeliest first."""
        probabilities, labels = self.probabilities(image[None])[0].topk(min(count, len(self.class_names)))
        names = [self.class_names[label] for label in labels.tolist()]
        return dict(zip(names, probabilities.tolist(), strict=True))

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of all classes, float32 (B, C), for cut-outs, uint8 (B, 3, S, S)."""
        return self.model(self._prepare(images.to(self.device))).softmax(1).cpu()

    def saliency(self, image: Tensor, label: int, samples: int = 16, noise: float = 0.15) -> Tensor:
        """How much each pixel speaks for or against a class: the mean gradient over noisy copies of the image.

        Source: D. Smilkov et al. SmoothGrad: removing noise by adding noise. 2017.

        Args:
            image: cut-out, uint8 (3, S, S).
            label: the class in question.
            samples: noisy copies.
            noise: their standard deviation, as a share of the range of the image.

        Returns:
            float32 (S, S) in [0, 1], smoothed over a few pixels; drawn from a fixed seed.
        """
        batch = self._prepare(image[None].to(self.device))
        draws = torch.randn(samples, *batch.shape[1:], generator=torch.Generator().manual_seed(0)).to(self.device)
        batch = (batch + noise * (batch.max() - batch.min()) * draws).requires_grad_()
        (gradient,) = torch.autograd.grad(self.model(batch)[:, label].sum(), batch)
        heat = gradient.abs().amax(1).mean(0)
        width = 2 * (heat.shape[-1] // 32) + 1
        heat = functional.avg_pool2d(heat[None, None], width, stride=1, padding=width // 2, count_include_pad=False)[
            0, 0
        ]
        heat = heat - heat.min()
        return (heat / heat.max().clamp_min(1e-12)).cpu()
