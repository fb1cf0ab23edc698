"""Names the bird on photographs: `python -m tools.predict_bird IMAGE ... --weights WEIGHTS [--saliency]`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from classification.predict import BirdClassifier
from common.errors import exits_on_user_error
from tools.images import find_images


@exits_on_user_error
def main() -> None:
    """Prints the five likeliest species of every image and, when asked, draws what speaks for the first."""
    parser = argparse.ArgumentParser(description="The five likeliest species on each photograph.")
    parser.add_argument("images", nargs="+", help="photographs: files, folders or patterns")
    parser.add_argument("--weights", type=Path, required=True, help="model_best.pth of a run")
    parser.add_argument("--saliency", action="store_true", help="also draw what speaks for the likeliest species")
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), help="folder of those pictures")
    arguments = parser.parse_args()

    classifier = BirdClassifier(arguments.weights, "cuda" if torch.cuda.is_available() else "cpu")
    for path in find_images(arguments.images):
        image = classifier.read(path)
        likeliest = classifier.likeliest(image)
        print(path)
        for name, probability in likeliest.items():
            print(f"  {100 * probability:5.1f} %  {name}")
        if arguments.saliency:
            heat = classifier.saliency(image, classifier.class_names.index(next(iter(likeliest))))
            arguments.output.mkdir(parents=True, exist_ok=True)
            drawn = arguments.output / f"{path.stem}_saliency.png"
            _beside(image, heat).save(drawn)
            print(f"  {drawn}")


def _beside(image: torch.Tensor, heat: torch.Tensor) -> Image.Image:
    photograph = image.permute(1, 2, 0).numpy()
    colours = 255 * colormaps["inferno"](heat.numpy())[..., :3]
    return Image.fromarray(np.hstack([photograph, (0.4 * photograph + 0.6 * colours).astype(np.uint8)]))


if __name__ == "__main__":
    main()
