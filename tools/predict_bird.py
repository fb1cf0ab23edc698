"""Names the bird on photographs: `python -m tools.predict_bird IMAGE ... --weights WEIGHTS [--saliency]`."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from tqdm import tqdm

from classification import load
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.exported import is_exported
from common.images import find_images, write_picture
from common.results import LeftOut, reserve_results, unique_names


@exits_on_user_error
def main() -> None:
    """Prints the five likeliest species of every image and, when asked, draws what speaks for the first.

    Raises:
        UserError: there is no model, or a file that could not be read.
    """
    parser = ArgumentParser(description="The five likeliest species on each photograph.")
    parser.add_argument("images", nargs="+", help="photographs: files, folders or patterns")
    parser.add_argument("--weights", type=Path, required=True, help="run folder, a checkpoint in it, an exported file")
    parser.add_argument("--saliency", action="store_true", help="also draw what speaks for the likeliest species")
    parser.add_argument("--out", type=Path, default=Path("output/predictions"), help="folder of those pictures")
    arguments = parser.parse_args()

    if arguments.saliency and is_exported(arguments.weights):
        raise UserError(
            f"{arguments.weights}: has no gradients, which tell what speaks for a species; leave SALIENCY out"
        )
    classifier = load(arguments.weights)
    paths = find_images(arguments.images)
    names = [f"{name}_saliency.png" for name in unique_names(paths)]
    if arguments.saliency:
        reserve_results(arguments.out, names, paths)
    with tqdm(total=len(paths), unit="image", disable=None) as progress:
        left_out = LeftOut(len(paths), progress)
        for index, image, prediction in classifier.stream(paths, classifier.cut_out, left_out):
            lines = [str(paths[index])]
            for name, probability in zip(prediction.names, prediction.scores, strict=True):
                lines.append(f"  {100 * probability:5.1f} %  {name}")
            if arguments.saliency:
                heat = classifier.saliency(image, classifier.class_names.index(prediction.names[0]))
                drawn = arguments.out / names[index]
                write_picture(drawn, _beside(image, heat))
                lines.append(f"  {drawn}")
            progress.write("\n".join(lines))
            progress.update()
    left_out.raise_if_all()
    left_out.raise_if_any()


def _beside(image: torch.Tensor, heat: torch.Tensor) -> np.ndarray:
    photograph = image.permute(1, 2, 0).numpy()
    colours = 255 * colormaps["inferno"](heat.numpy())[..., :3]
    return np.hstack([photograph, (0.4 * photograph + 0.6 * colours).astype(np.uint8)])


if __name__ == "__main__":
    main()
