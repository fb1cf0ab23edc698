"""The weights averaged over a training, and the best of its evaluations."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of the weights: average = decay average + (1 - decay) weights.

    Integer buffers are copied. The decay rises as (1 + i) / (10 + i) at first: a short past is not worth keeping.

    Args:
        model: the model without a distributed wrapper.
        decay: share of the old average at each iteration, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        # Found once: asking the model at every iteration would take longer than averaging does.
        moving = [
            (self.average[name], value) for name, value in model.state_dict().items() if value.is_floating_point()
        ]
        self._averages, self._values = [list(tensors) for tensors in zip(*moving, strict=True)]

    def update(self, iteration: int) -> None:
        """Moves the average towards the weights after `iteration`, counted from 0."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the average into the model inside the block."""
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """The average itself, with the model's names."""
        for name, value in self.model.state_dict().items():
            if not value.is_floating_point():
                self.average[name].copy_(value)
        return self.average

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Takes over the average of a checkpoint."""
        for name, value in state_dict.items():
            self.average[name].copy_(value)


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
