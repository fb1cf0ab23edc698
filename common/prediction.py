"""From images to predictions, in notebooks and on command lines: read in a pool, run in batches of one size."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError, first_line
from common.images import read_image, to_rgb
from common.runtime import compute_alone
from common.threads import available_cores

Source = str | os.PathLike | np.ndarray | Image.Image | Tensor


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image, the surest first.

    Attributes:
        names: of the classes.
        scores: (N,) float64, from 0 to 1.
        boxes: of a detector, (N, 4) float64, XYXY in pixels of the image, continuous and counted from 0.
    """

    names: list[str]
    scores: np.ndarray
    boxes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def above(self, score: float) -> "Prediction":
        """What has at least this score."""
        count = int((self.scores >= score).sum())
        boxes = None if self.boxes is None else self.boxes[:count]
        return Prediction(self.names[:count], self.scores[:count], boxes)


class Seen(NamedTuple):
    """An image that a model has seen.

    Attributes:
        place: among the images, from 0.
        kept: what was asked to be kept of it.
        prediction: what the model says of it.
    """

    place: int
    kept: Any
    prediction: Prediction


class Predictor(ABC):
    """A trained model with the preparation of images that it was trained with.

    Attributes:
        class_names: all that it knows.
        batch_size: images that its network sees at a time, at most.
        min_score: predictions below it are dropped, unless another one is asked for.
    """

    class_names: list[str]
    batch_size: int
    min_score: float

    @abstractmethod
    def prepare(self, pixels: Tensor) -> dict:
        """What the network sees of an image, uint8 (3, H, W), RGB; called by several threads at a time."""

    @abstractmethod
    def size_of(self, sample: dict) -> Hashable:
        """Samples of equal size run in one batch."""

    @abstractmethod
    def run(self, samples: list[dict]) -> list[Prediction]:
        """Runs the network on what `prepare` has made, one batch."""

    @overload
    def predict(self, images: list | tuple, score: float | None = ...) -> list[Prediction]: ...

    @overload
    def predict(self, images: Source, score: float | None = ...) -> Prediction: ...

    def predict(self, images: Source | list | tuple, score: float | None = None) -> Prediction | list[Prediction]:
        """What the model says of one image, or of each of several.

        Args:
            images: a file, an array (uint8, (H, W, 3) in RGB, or (H, W)), a PIL image, a tensor (uint8, (3, H, W),
                RGB), or a list of those.
            score: predictions below it are dropped; None: `min_score`.

        Raises:
            UserError: a file cannot be read, or an array is no image.
        """
        several = images if isinstance(images, list | tuple) else [images]
        seen = sorted(self.stream(several), key=lambda each: each.place)
        at_least = self.min_score if score is None else score
        predictions = [each.prediction.above(at_least) for each in seen]
        return predictions if isinstance(images, list | tuple) else predictions[0]

    def stream(
        self,
        images: Iterable[Source],
        keep: Callable[[Tensor], Any] = lambda pixels: None,
        leave_out: Callable[[UserError], None] | None = None,
    ) -> Iterator[Seen]:
        """Predicts any number of images in little memory; see `batches`."""
        for batch in self.batches(images, keep, leave_out):
            places, samples, kept = zip(*batch, strict=True)
            yield from map(Seen, places, kept, self._run_in_memory(list(samples)))

    def batches(
        self,
        images: Iterable[Source],
        keep: Callable[[Tensor], Any] = lambda pixels: None,
        leave_out: Callable[[UserError], None] | None = None,
    ) -> Iterator[list[tuple[int, dict, Any]]]:
        """Prepares any number of images in little memory, the next ones while those before are used.

        Args:
            images: to prepare; those of one size come in order, but may be overtaken by those of another size.
            keep: makes of the pixels, uint8 (3, H, W), what is wanted later; called by several threads at a time.
            leave_out: called with the reason for each image that cannot be read.

        Yields:
            At most `batch_size` images of one size: of each its place, its sample, and what is kept of it.

        Raises:
            UserError: an image cannot be read, and `leave_out` is None.
        """
        waiting: dict[Hashable, list[tuple[int, dict, Any]]] = {}
        for index, sample, kept in self._read_ahead(images, keep, leave_out):
            size = self.size_of(sample)
            waiting.setdefault(size, []).append((index, sample, kept))
            if len(waiting[size]) == self.batch_size:
                yield waiting.pop(size)
            elif sum(map(len, waiting.values())) > 4 * self.batch_size:
                yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
        yield from sorted(waiting.values(), key=len, reverse=True)

    def _read_ahead(
        self,
        images: Iterable[Source],
        keep: Callable[[Tensor], Any],
        leave_out: Callable[[UserError], None] | None,
    ) -> Iterator[tuple[int, dict, Any]]:
        """The place of each image, its sample and what is kept of it, in order, while threads prepare the next ones."""

        def load(image: Source) -> tuple[dict, Any]:
            pixels = as_pixels(image)
            try:
                return self.prepare(pixels), keep(pixels)
            except (ValueError, RuntimeError, ArithmeticError) as error:
                reason = first_line(error)
                name = image if isinstance(image, str | os.PathLike) else "image"
                raise UserError(f"{name}: cannot be prepared for the network ({reason}); replace it") from error

        numbered = enumerate(images)
        loading: deque[tuple[int, Future]] = deque()
        cores = available_cores()
        # A thread of the pool computes alone, or each would want all cores beside the network.
        with ThreadPoolExecutor(cores, initializer=compute_alone) as pool:
            while True:
                ahead = self.batch_size + cores - len(loading)
                loading.extend((index, pool.submit(load, image)) for index, image in islice(numbered, ahead))
                if not loading:
                    return
                index, future = loading.popleft()
                try:
                    sample, kept = future.result()
                except UserError as error:
                    if leave_out is None:
                        raise
                    leave_out(error)
                    continue
                yield index, sample, kept

    def _run_in_memory(self, samples: list[dict]) -> list[Prediction]:
        """Runs a batch, or where it is too large for the memory of a GPU, its halves."""
        try:
            return self.run(samples)
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise
        half = len(samples) // 2
        return self._run_in_memory(samples[:half]) + self._run_in_memory(samples[half:])


def as_pixels(image: Source) -> Tensor:
    """An image as uint8 (3, H, W), RGB.

    Args:
        image: see `Predictor.predict`.

    Raises:
        UserError: a file cannot be read, or an array is no image.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        try:
            image = to_rgb(ImageOps.exif_transpose(image))
        except (ValueError, OSError) as error:
            raise UserError(f"image: {error}; expected a whole one of 8 or 16 bits") from error
    if isinstance(image, np.ndarray) and (not image.flags.writeable or min(image.strides, default=0) < 0):
        image = image.copy()  # torch would warn of a tensor that could write to it, and takes no mirrored one
    wanted = "expected uint8, an array (H, W, 3) or (H, W) or a tensor (3, H, W), in RGB"
    try:
        pixels = torch.as_tensor(image)
    except (TypeError, ValueError) as error:  # of Python's objects, say
        raise UserError(f"image: {first_line(error)}; {wanted}") from error
    if isinstance(image, np.ndarray) and image.ndim == 2:
        pixels = pixels.expand(3, -1, -1)
    elif isinstance(image, np.ndarray) and image.ndim == 3:
        pixels = pixels.permute(2, 0, 1)
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or len(pixels) != 3 or not pixels.numel():
        found = f"{type(image).__name__} of {pixels.dtype} and shape {tuple(image.shape)}"
        raise UserError(f"image: is {found}; {wanted}")
    return pixels.cpu()


def parse_score(text: str, expected: str = "a number from 0 to 1") -> float:
    """The type of a command line's SCORE.

    Args:
        text: what was given.
        expected: what may be given, in words.

    Raises:
        UserError: it is no number from 0 to 1.
    """
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise UserError(f"SCORE={text}: expected {expected}")


def best_weights(path: Path) -> Path:
    """The file of weights that a path means: of a run folder its `model_best.pth`, else itself."""
    return path / "model_best.pth" if path.is_dir() else path
