"""Bird classification on CUB-200-2011 with timm. In a notebook: `from classification import load`."""

from pathlib import Path
from typing import TYPE_CHECKING

import common  # noqa: F401 # before torch: sets how its threads wait

if TYPE_CHECKING:
    from classification.predict import BirdClassifier


def load(weights: str | Path) -> "BirdClassifier":
    """A trained classifier: `load("output/resnet18-best").predict("photo.jpg")` gives the likeliest names and scores.

    Args:
        weights: a run folder, whose `model_best.pth` is meant, a checkpoint in one, or an exported file.

    Raises:
        UserError: the file is no classifier.
    """
    from classification.predict import BirdClassifier  # here, since timm takes seconds to import
    from common.runtime import default_device

    return BirdClassifier(Path(weights).expanduser(), default_device())
