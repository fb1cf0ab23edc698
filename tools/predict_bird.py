"""Names the bird on photographs: `python -m tools.predict_bird IMAGE ... --weights WEIGHTS [--saliency]`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from classification.predict import BirdClassifier
from tools.errors import UserError, exits_on_user_error

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


@exits_on_user_error
def main() -> None:
    """Prints the five likeliest species of every image and, when asked, draws what speaks for the first."""
    parser = argparse.ArgumentParser(description="The five likeliest species on each photograph.")
    parser.add_argument("images", nargs="+", type=Path, help="photographs, or folders of them")
    parser.add_argument("--weights", type=Path, required=True, help="model_best.pth of a run")
    parser.add_argument("--saliency", action="store_true", help="also draw what speaks for the likeliest species")
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), help="folder of those pictures")
    arguments = parser.parse_args()

    classifier = BirdClassifier(arguments.weights, "cuda" if torch.cuda.is_available() else "cpu")
    for path in _photographs(arguments.images):
        image = classifier.read(path)
        probabilities, labels = classifier.probabilities(image[None])[0].topk(min(5, len(classifier.class_names)))
        print(path)
        for probability, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
            print(f"  {100 * probability:5.1f} %  {classifier.class_names[label]}")
        if arguments.saliency:
            heat = classifier.saliency(image, int(labels[0]))
            arguments.output.mkdir(parents=True, exist_ok=True)
            drawn = arguments.output / f"{path.stem}_saliency.png"
            _beside(image, heat).save(drawn)
            print(f"  {drawn}")


def _photographs(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(inside for inside in path.iterdir() if inside.suffix.lower() in _SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such image or folder; expected photographs, IMAGES='a.jpg b.jpg'")
    if not found:
        raise UserError(f"{paths[0]}: no images in this folder; expected {', '.join(_SUFFIXES)}")
    return found


def _beside(image: torch.Tensor, heat: torch.Tensor) -> Image.Image:
    photograph = image.permute(1, 2, 0).numpy()
    colours = 255 * colormaps["inferno"](heat.numpy())[..., :3]
    return Image.fromarray(np.hstack([photograph, (0.4 * photograph + 0.6 * colours).astype(np.uint8)]))


if __name__ == "__main__":
    main()
