"""A sample before it is painted: images laid on a canvas, the objects in them, and the view that will be seen.

An augmentation moves the view or adds an effect. Pixels are read once all of them are known: no file is decoded larger
than it is seen, and nothing is made that is cut away later. Rectangles are (x0, y0, x1, y1) in pixels of the canvas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional

# Sides of the small picture that stands for a whole view where an effect asks for it.
WHOLE = (128, 128)

# Ways to resize, and what OpenCV calls them.
INTERPOLATIONS = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

# Called with the painted image (uint8, (H, W, 3), RGB, changed in place), the rows and columns of it that show what was
# in view when the effect was added, and a way to get all of that view in small.
Effect = Callable[[np.ndarray, tuple[slice, slice], Callable[[], np.ndarray]], None]


@dataclass(frozen=True)
class Layer:
    """An image on the canvas.

    Attributes:
        read: decodes it to uint8 (3, H, W), RGB; the argument is the factor by which it may be shrunk at most.
        size: height and width of the file's image.
        place: where all of it would lie.
        shown: the part of `place` that is not cut off.
        weight: how much it adds to the picture, 1 unless it is mixed with another.
    """

    read: Callable[[int], Tensor]
    size: tuple[int, int]
    place: np.ndarray
    shown: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class Scene:
    """What is known of a sample before it is painted; made by `open_scene`.

    Attributes:
        layers: the images; black where there is none.
        boxes: of the objects, (N, 4).
        labels: their classes, (N,).
        weights: how much of each is seen, (N,), 1 unless it is mixed with another image.
        view: what is seen of the canvas, in whole pixels; it may go beyond the images.
        mirrored: whether left and right are exchanged in the end.
        effects: what is done to the pixels, in order, each with the view at its time.
    """

    layers: tuple[Layer, ...]
    boxes: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    view: np.ndarray
    mirrored: bool = False
    effects: tuple[tuple[np.ndarray, Effect], ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view."""
        width, height = self.view[2:] - self.view[:2]
        return int(height), int(width)

    def cut(self, view: np.ndarray, kept: np.ndarray) -> "Scene":
        """The scene with a view inside the present one, and the objects of the mask `kept`, cut at its border."""
        boxes = clip(self.boxes[kept], view)
        return replace(self, view=view, boxes=boxes, labels=self.labels[kept], weights=self.weights[kept])

    def with_effect(self, effect: Effect) -> "Scene":
        """The scene with an effect on what is in view now."""
        return replace(self, effects=(*self.effects, (self.view, effect)))


def open_scene(
    read: Callable[[int], Tensor], size: tuple[int, int], boxes: Sequence[Sequence[float]], labels: Sequence[int]
) -> Scene:
    """The scene of one image: all of it, and its objects.

    Args:
        read: as of a `Layer`.
        size: height and width of the image.
        boxes: of the objects, XYXY in its pixels.
        labels: their classes.
    """
    view = np.array([0, 0, size[1], size[0]], dtype=float)
    return Scene(
        (Layer(read, size, view, view),),
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.ones(len(boxes)),
        view,
    )


def clip(rectangles: np.ndarray, border: np.ndarray) -> np.ndarray:
    """Rectangles (..., 4) cut off at a border (4,)."""
    return np.clip(rectangles, border[[0, 1, 0, 1]], border[[2, 3, 2, 3]])


def centres(rectangles: np.ndarray) -> np.ndarray:
    """Middle points (..., 2) of rectangles (..., 4)."""
    return (rectangles[..., :2] + rectangles[..., 2:]) / 2


def map_boxes(scene: Scene, height: int, width: int) -> np.ndarray:
    """The scene's boxes (N, 4) in pixels of the image that `paint` makes, inside it."""
    boxes = _onto(clip(scene.boxes, scene.view), scene.view, height, width)
    return np.array([width, 0, width, 0]) + boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] if scene.mirrored else boxes


def paint(scene: Scene, height: int, width: int, interpolation: str = "bilinear") -> np.ndarray:
    """Renders what is in view at a size; antialiased where that shrinks it, except with "nearest".

    Args:
        scene: the scene.
        height: of the image.
        width: of the image.
        interpolation: one of `INTERPOLATIONS`.

    Returns:
        uint8 (height, width, 3), RGB.
    """
    zoom = max(height / scene.size[0], width / scene.size[1])
    pixels = []
    for layer in scene.layers:
        place = layer.place[2:] - layer.place[:2]
        scale = zoom * max(place / layer.size[::-1])
        pixels.append(layer.read(max(shrink for shrink in (1, 2, 4, 8) if shrink == 1 or shrink * scale <= 1)))

    def compose(view: np.ndarray, size: tuple[int, int], interpolation: str, effects: int) -> np.ndarray:
        image = np.zeros((*size, 3), np.uint8)
        for layer, source in zip(scene.layers, pixels, strict=True):
            visible = clip(layer.shown, view)
            rows, columns = _slices(_onto(visible, view, *size))
            part = image[rows, columns]
            if not part.size:
                continue
            rows, columns = _slices(_onto(visible, layer.place, *source.shape[1:]), source.shape[1:])
            target = part if layer.weight == 1 else np.empty_like(part)
            _resize(source[:, rows, columns], target, interpolation)
            if target is not part:
                cv2.addWeighted(part, 1, target, layer.weight, 0, dst=part)
        for number, (seen, effect) in enumerate(scene.effects[:effects]):
            inside = _slices(_onto(clip(seen, view), view, *size))
            effect(image, inside, partial(compose, seen, WHOLE, "nearest", number))
        return image

    image = compose(scene.view, (height, width), interpolation, len(scene.effects))
    return cv2.flip(image, 1, dst=image) if scene.mirrored else image


def _resize(source: Tensor, target: np.ndarray, interpolation: str) -> None:
    """Resizes `source`, (3, H, W), into `target`, (H', W', 3).

    By OpenCV, which is faster; where it shrinks by torchvision, which antialiases.
    """
    size, (height, width) = source.shape[1:], target.shape[:2]
    if interpolation == "nearest" or (height >= size[0] and width >= size[1]):
        pixels = source.permute(1, 2, 0).numpy()
        cv2.resize(pixels, (width, height), dst=target, interpolation=INTERPOLATIONS[interpolation])
    else:
        target[:] = functional.resize(source, [height, width], interpolation).permute(1, 2, 0).numpy()


def _onto(rectangles: np.ndarray, view: np.ndarray, height: int, width: int) -> np.ndarray:
    """Rectangles of the canvas in pixels of an image of `view`."""
    scale = np.array([width, height]) / (view[2:] - view[:2])
    return (rectangles - view[[0, 1, 0, 1]]) * scale[[0, 1, 0, 1]]


def _slices(rectangle: np.ndarray, size: Sequence[int] | None = None) -> tuple[slice, slice]:
    """Rows and columns of a rectangle, to whole pixels; with `size`, of an image, at least one of each."""
    x0, y0, x1, y1 = np.rint(rectangle).astype(int).tolist()
    if size:
        y0, x0 = min(y0, size[0] - 1), min(x0, size[1] - 1)
        y1, x1 = max(y1, y0 + 1), max(x1, x0 + 1)
    return slice(y0, y1), slice(x0, x1)
