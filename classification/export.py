"""A classifier as one graph, from prepared pixels to logits: what `tools.export` writes for other runtimes."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from classification.cub import FOLDER, Bird, read_cub
from classification.data_loader import BirdDataset
from classification.engine import BatchAugmentation
from classification.model import CARD, KIND, check_image_size, head_modules, load_classifier
from classification.predict import data_of_run
from common.data_root import resolve_data_root
from common.errors import UserError
from common.export import Exportable
from common.prediction import best_weights


def exportable_classifier(weights: Path, size: int | None = None) -> Exportable:
    """A trained classifier, ready to be exported.

    Args:
        weights: a run folder, whose `model_best.pth` is meant, or a checkpoint in one.
        size: side of the images it will see, in pixels; None: as it was trained.

    Raises:
        UserError: weights are missing or broken, or the network does not take images of this size.
    """
    weights = best_weights(weights)
    model, checkpoint = load_classifier(weights)
    card = {"kind": KIND, **{name: checkpoint[name] for name in CARD}}
    if size is not None:
        if size < 1:
            raise UserError(f"SIZE={size}: expected a positive number of pixels")
        check_image_size(card["model_name"], model, size)
        card["image_size"] = size
    side = card["image_size"]
    card["input"] = f"float32 (N, 3, {side}, {side}), RGB from 0 to 1, less mean, over std; outputs are logits"
    normalise = BatchAugmentation(card["mean"], card["std"])
    crop = v2.CenterCrop(side)

    def prepare(bird: Bird) -> Tensor:
        image, _ = BirdDataset([bird], int(side / card["crop_pct"]), crop)[0]
        return normalise(image[None]).contiguous()

    heads = [name for name, module in model.named_modules() if module in head_modules(model)]
    return Exportable(
        network=model,
        example=torch.zeros(1, 3, side, side),
        free={0: "images"},
        outputs=["logits"],
        card=card,
        training_images=lambda data: read_cub(resolve_data_root(data or data_of_run(weights), [FOLDER])[0]).train,
        prepare=prepare,
        kept=heads,
    )
