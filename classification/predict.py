"""Which bird is it: probabilities for photographs, and the pixels that speak for an answer."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from classification.cub import read_image
from classification.engine import BatchAugmentation
from classification.model import load_classifier
from classification.recipe import load_recipe
from common.errors import UserError


def newest_weights(output: Path) -> Path | None:
    """`model_best.pth` of the newest run of a classifier, on whatever data; None if there is none."""
    found = [path for path in output.glob("*/model_best.pth") if _is_of_classifier(path.parent)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _is_of_classifier(run: Path) -> bool:
    try:
        load_recipe(run / "config.yaml")
    except UserError:  # a detector has another kind of configuration
        return False
    return True


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
        return self._crop(read_image(path, self._side))

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
