"""Which bird is it: probabilities for photographs, and the pixels that speak for an answer."""

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from classification.data_loader import resize_short_side
from classification.engine import BatchAugmentation
from classification.model import load_classifier
from classification.recipe import Recipe, load_recipe
from common.errors import UserError
from common.prediction import Prediction, Predictor, best_weights
from common.run_folder import read_metrics


def newest_classifier(output: Path) -> Path | None:
    """`model_best.pth` of the newest classifier in the folder of all runs, on any data; None if there is none.

    Runs that another run started from do not count. Of the runs of a sweep, comparison or study, the best one counts.
    """
    # The runs of a sweep lie one folder deeper than others, all of the demo and of a study one deeper still.
    folders = sorted(path for parents in ("*", "*/*", "*/*/*") for path in output.glob(f"{parents}/model_best.pth"))
    recipes = {path: recipe for path in folders if (recipe := _recipe_beside(path))}
    beginnings = {Path(recipe.weights).resolve().parent for recipe in recipes.values() if recipe.weights}
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in recipes:
        if path.resolve().parent not in beginnings:
            groups[output / path.relative_to(output).parts[0]].append(path)
    newest = max(groups.values(), key=lambda paths: max(path.stat().st_mtime for path in paths), default=[])
    return max(newest, key=_validation_top1, default=None)


def data_of_run(weights: Path) -> str | None:
    """The data root in the recipe of the run that weights or an exported file came from; None for the default."""
    beside = _recipe_beside(weights) or _recipe_beside(weights.parent)
    return beside.data if beside else None


def _recipe_beside(weights: Path) -> Recipe | None:
    try:
        return load_recipe(weights.parent / "config.yaml")
    except UserError:  # a detector has another kind of configuration
        return None


def _validation_top1(weights: Path) -> float:
    """Of the epoch whose weights were kept."""
    figures = [row["validation_top1"] for row in read_metrics(weights.parent)] or [0.0]
    recipe = _recipe_beside(weights)
    return figures[-1] if recipe and recipe.choose == "last" else max(figures)


class BirdClassifier(Predictor):
    """A trained network with the preparation of images it was trained with.

    Args:
        weights: a run folder, whose `model_best.pth` is meant, a checkpoint in one, or an exported file.
        device: to compute on.

    Raises:
        UserError: the file is no classifier.
    """

    batch_size = 32
    min_score = 0.0

    def __init__(self, weights: Path, device: torch.device | str = "cpu"):
        self.model, card = load_classifier(best_weights(weights))
        self.model.to(device).to(memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.class_names: list[str] = card["class_names"]
        self._side = int(card["image_size"] / card["crop_pct"])
        self._crop = v2.CenterCrop(card["image_size"])
        self._prepare = BatchAugmentation(card["mean"], card["std"])

    def cut_out(self, pixels: Tensor) -> Tensor:
        """The square of a photograph, uint8 (3, H, W), RGB, that the network sees, uint8 (3, S, S)."""
        return self._crop(resize_short_side(pixels, self._side))

    def prepare(self, pixels: Tensor) -> dict:
        """The cut-out of an image."""
        return {"image": self.cut_out(pixels)}

    def size_of(self, sample: dict) -> tuple[int, ...]:
        """The same for all."""
        return tuple(sample["image"].shape)

    def run(self, samples: list[dict]) -> list[Prediction]:
        """The five likeliest classes of each image, with their probabilities."""
        probabilities = self.probabilities(torch.stack([sample["image"] for sample in samples])).double()
        likeliest = probabilities.topk(min(5, len(self.class_names)))
        return [
            Prediction([self.class_names[label] for label in labels], scores.numpy())
            for labels, scores in zip(likeliest.indices, likeliest.values, strict=True)
        ]

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of all classes, float32 (B, C), for cut-outs, uint8 (B, 3, S, S)."""
        return self.logits(images).softmax(1)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """What the network gives for cut-outs, uint8 (B, 3, S, S): float32 (B, C), on the CPU."""
        return self.model(self._prepare(images.to(self.device))).cpu()

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
