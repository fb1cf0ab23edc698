"""Augmentation of scenes: torchvision's transforms by name, with the same distributions, and scenes made of several.

torchvision's classes hold and check the arguments; `augment` does what they do to a `Scene`, before it has pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, singledispatch

import cv2
import numpy as np
from torchvision.transforms import v2

from common.errors import UserError
from detection.scene import Scene, centres

# Defaults are those of the SSD recipe (Liu et al. 2016), which torchvision's classes implement.
AUGMENTATIONS = {
    "RandomHorizontalFlip": v2.RandomHorizontalFlip,
    "RandomPhotometricDistort": v2.RandomPhotometricDistort,
    "RandomZoomOut": v2.RandomZoomOut,
    "RandomIoUCrop": v2.RandomIoUCrop,
}

# Shares of red, green and blue in grey, those of torchvision.
GREY = np.array([0.2989, 0.587, 0.114])


def build_augmentations(
    augmentations: Sequence[str | Mapping], fill: Sequence[float] = (0, 0, 0)
) -> list[v2.Transform]:
    """The torchvision transforms of `INPUT.AUGMENTATIONS`.

    Args:
        augmentations: names, or `{name: {argument: value}}` where the arguments are not torchvision's own defaults.
        fill: colour around an image that is zoomed out, RGB from 0 to 255.

    Raises:
        UserError: a name is not in `AUGMENTATIONS`, the transform has no such argument, or might never end.
    """
    built = []
    for entry in augmentations:
        for name, arguments in (entry if isinstance(entry, Mapping) else {str(entry): {}}).items():
            if name not in AUGMENTATIONS:
                raise UserError(f"INPUT.AUGMENTATIONS: unknown {name}; expected some of {', '.join(AUGMENTATIONS)}")
            defaults = {"fill": tuple(round(value) for value in fill)} if name == "RandomZoomOut" else {}
            try:
                transform = AUGMENTATIONS[name](**(defaults | arguments))
                if isinstance(transform, v2.RandomIoUCrop) and not any(option >= 1 for option in transform.options):
                    raise ValueError("sampler_options lack 1.0 (no crop); some images would be tried for ever")
                built.append(transform)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"INPUT.AUGMENTATIONS: {name} {arguments}: {error}; see torchvision.transforms.v2.{name}"
                ) from error
    return built


@singledispatch
def augment(transform: v2.Transform, scene: Scene, rng: np.random.Generator) -> Scene:
    """Applies one of `AUGMENTATIONS` to a scene, at random.

    Args:
        transform: the transform.
        scene: the scene, which is not changed.
        rng: source of randomness.

    Returns:
        The scene.
    """
    raise NotImplementedError(type(transform).__name__)


@augment.register
def _(transform: v2.RandomHorizontalFlip, scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, mirrored=scene.mirrored ^ (rng.random() < transform.p))


@augment.register
def _(transform: v2.RandomZoomOut, scene: Scene, rng: np.random.Generator) -> Scene:
    if rng.random() >= transform.p:
        return scene
    size = scene.view[2:] - scene.view[:2]
    canvas = np.floor(size * rng.uniform(*transform.side_range))
    start = scene.view[:2] - np.floor((canvas - size) * rng.random(2))
    return replace(
        scene.with_effect(partial(_fill_outside, transform.fill)), view=np.concatenate([start, start + canvas])
    )


@augment.register
def _(transform: v2.RandomIoUCrop, scene: Scene, rng: np.random.Generator) -> Scene:
    view, boxes, middle = scene.view, scene.boxes, centres(scene.boxes)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    while len(boxes):  # it needs one to choose a crop by
        min_iou = transform.options[rng.integers(len(transform.options))]
        if min_iou >= 1:
            break
        # All trials at once, (trials, 2); the first that is good is taken.
        scales, places = rng.random((2, transform.trials, 2))
        size = np.floor(
            (view[2:] - view[:2]) * (transform.min_scale + (transform.max_scale - transform.min_scale) * scales)
        )
        start = view[:2] + np.floor((view[2:] - view[:2] - size) * places)
        end = start + size
        width, height = size.T
        is_good = (width > 0) & (height > 0)
        is_good &= (transform.min_aspect_ratio * height <= width) & (width <= transform.max_aspect_ratio * height)
        holds = ((start[:, None] < middle) & (middle < end[:, None])).all(axis=2)  # (trials, N)
        low, high = np.maximum(start[:, None], boxes[:, :2]), np.minimum(end[:, None], boxes[:, 2:])
        overlaps = (high - low).clip(0).prod(axis=2)
        enough = overlaps >= min_iou * (size.prod(axis=1)[:, None] + areas - overlaps)
        is_good &= (holds & enough).any(axis=1)
        if is_good.any():
            trial = is_good.argmax()
            return scene.cut(np.concatenate([start[trial], end[trial]]), holds[trial])
    return scene


@augment.register
def _(transform: v2.RandomPhotometricDistort, scene: Scene, rng: np.random.Generator) -> Scene:
    def drawn(step: Callable, bounds: tuple[float, float]) -> list[Callable]:
        return [partial(step, rng.uniform(*bounds))] if rng.random() < transform.p else []

    contrast, contrast_before = drawn(_change_contrast, transform.contrast), rng.random() < 0.5
    steps: list[Callable] = [
        *drawn(_change_brightness, transform.brightness),
        *(contrast if contrast_before else []),
        *drawn(_change_saturation, transform.saturation),
        *drawn(_turn_hue, transform.hue),
        *([] if contrast_before else contrast),
        *([partial(_permute_channels, rng.permutation(3))] if rng.random() < transform.p else []),
    ]
    return scene.with_effect(partial(_distort, steps)) if steps else scene


def _fill_outside(fill: float | Sequence[float], image: np.ndarray, inside: tuple[slice, slice], _: Callable) -> None:
    rows, columns = inside
    line = np.empty(image.shape[1:], np.uint8)
    line[:] = fill
    for band in (image[: rows.start], image[rows.stop :], image[rows, : columns.start], image[rows, columns.stop :]):
        band[:] = line[: band.shape[1]]


def _distort(
    steps: Sequence[Callable], image: np.ndarray, inside: tuple[slice, slice], whole: Callable[[], np.ndarray]
) -> None:
    """Colours; what a crop has cut away is seen only in `whole`, and still counts for the contrast."""
    part, small = image[inside], whole()
    for step in steps if part.size else ():
        part, small = step(part, small), step(small, small)
    image[inside] = part


def _change_brightness(factor: float, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return cv2.transform(part, factor * np.eye(3))


def _change_contrast(factor: float, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    mean = GREY @ cv2.mean(whole)[:3]
    return cv2.transform(part, np.column_stack([factor * np.eye(3), np.full(3, (1 - factor) * mean)]))


def _change_saturation(factor: float, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return cv2.transform(part, factor * np.eye(3) + (1 - factor) * GREY)


def _turn_hue(turn: float, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(part, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)  # 256 are the whole circle: it wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _permute_channels(order: np.ndarray, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return cv2.transform(part, np.eye(3)[order])


def mixup(first: Scene, second: Scene, share: float) -> Scene:
    """Two images laid over each other from the upper left corner, with the objects of both.

    Zhang et al. (2018) for detection, as in Zhang et al., "Bag of Freebies for Training Object Detection Neural
    Networks" (2019): images are not resized, and an object weighs what its image does.

    Args:
        first: scene that shows with weight `share`, not augmented.
        second: scene that shows with weight 1 - `share`, not augmented.
        share: from 0 to 1.

    Returns:
        The scene, as high as the higher and as wide as the wider of the two; black where neither image is.
    """
    shares = ((first, share), (second, 1 - share))
    return Scene(
        tuple(replace(layer, weight=layer.weight * part) for scene, part in shares for layer in scene.layers),
        np.concatenate([first.boxes, second.boxes]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([scene.weights * part for scene, part in shares]),
        np.maximum(first.view, second.view),
    )


def mosaic(scenes: Sequence[Scene], rng: np.random.Generator) -> Scene:
    """Four images in the quarters of a square (Bochkovskiy et al., "YOLOv4", 2020, section 3.3).

    The quarters meet at a random point in the middle of the square. Each is covered by its image, scaled without
    distortion and cut at random; an object stays where its centre does.

    Args:
        scenes: four, each of one image, not augmented; the square is as long as the longer side of the first.
        rng: draws.

    Returns:
        The scene.
    """
    side = max(scenes[0].size)
    row, column = rng.integers(side // 4, side - side // 4, 2, endpoint=True)
    quarters = [[0, 0, column, row], [column, 0, side, row], [0, row, column, side], [column, row, side, side]]
    tiles = [_cover(scene, quarter, rng) for scene, quarter in zip(scenes, np.array(quarters, float), strict=True)]
    return Scene(
        tuple(tile.layers[0] for tile in tiles),
        np.concatenate([tile.boxes for tile in tiles]),
        np.concatenate([tile.labels for tile in tiles]),
        np.concatenate([tile.weights for tile in tiles]),
        np.array([0, 0, side, side], dtype=float),
    )


def _cover(scene: Scene, quarter: np.ndarray, rng: np.random.Generator) -> Scene:
    """The image at the smallest scale at which it covers `quarter`, cut to it."""
    size, extent = scene.view[2:], quarter[2:] - quarter[:2]
    scaled = np.maximum(extent, np.rint(size * max(extent / size)))
    start = quarter[:2] - rng.integers(scaled - extent, endpoint=True)
    boxes = scene.boxes * np.tile(scaled / size, 2) + np.tile(start, 2)
    middle = centres(boxes)
    kept = np.all((quarter[:2] <= middle) & (middle < quarter[2:]), axis=1)
    layer = replace(scene.layers[0], place=np.concatenate([start, start + scaled]), shown=quarter)
    return replace(scene, layers=(layer,), boxes=boxes).cut(quarter, kept)
