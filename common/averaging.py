"""The weights averaged over a training, and the best of its evaluations."""

import math
from typing import Any

from timm.utils import ModelEmaV3


class WeightAverage(ModelEmaV3):
    """timm's moving average of weights and buffers: average = decay average + (1 - decay) weights.

    The decay rises as (1 + i) / (10 + i) at first: a short past is not worth keeping. `module` is a model with the
    averaged weights.
    """

    def get_decay(self, step: int | None = None) -> float:
        """The decay after iteration `step`, counted from 0."""
        return self.decay if step is None else min(self.decay, (1 + step) / (10 + step))


def horizon_scaled(decay: float, batch_size: int, reference: int) -> float:
    """The decay for `batch_size` that averages over as many images as `decay` does for the batch size `reference`."""
    return decay ** (batch_size / reference)


class Best:
    """The best of the evaluations so far, and how long ago it was.

    Args:
        patience: evaluations without a rise before training should stop; 0 never stops.
        min_rise: a smaller rise does not count for the patience.
    """

    def __init__(self, patience: int, min_rise: float = 0.0) -> None:
        self.patience, self.min_rise = patience, min_rise
        self.value = self.reference = -math.inf
        self.when = -1
        self.without_rise = 0

    def update(self, value: float, when: int) -> bool:
        """Takes in the figure of an evaluation, the higher the better.

        Args:
            value: the figure.
            when: the iteration or epoch that it is of.

        Returns:
            Whether it is the best so far.
        """
        if value > self.reference and value >= self.reference + self.min_rise:
            self.reference, self.without_rise = value, 0
        else:
            self.without_rise += 1
        is_best = value > self.value
        if is_best:
            self.value, self.when = value, when
        return is_best

    @property
    def is_out_of_patience(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.without_rise

    def state_dict(self) -> dict[str, Any]:
        """What it remembers; patience and smallest rise are settings, which a resumed run may change."""
        return {"value": self.value, "reference": self.reference, "when": self.when, "without_rise": self.without_rise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint remembers."""
        self.__dict__.update(state_dict)
