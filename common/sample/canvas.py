"""The drawn background that sprites are laid on, and which of them is seen at each pixel."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

from common.sample.sprite import Sprite


class Canvas:
    """A picture in the making; its sprites are numbered from 0 as they are laid on it.

    Boxes are measured here, on the pixels where a sprite can be seen.
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.image = _background(rng, height, width)
        self._owner = np.full((height, width), -1)
        self._areas: list[int] = []

    def paste(self, sprite: Sprite, length: float, corner: Sequence[int], opacity: float = 1.0) -> None:
        """Lays a sprite of `length` pixels with its left upper corner at x, y, clipped to the picture."""
        colour, coverage = sprite.render(length)
        left, top = max(0, -corner[0]), max(0, -corner[1])
        x, y = max(0, corner[0]), max(0, corner[1])
        inside = np.s_[top : top + self.image.shape[0] - y, left : left + self.image.shape[1] - x]
        colour, coverage = colour[inside], coverage[inside]
        region = np.s_[y : y + coverage.shape[0], x : x + coverage.shape[1]]
        self.image[region] += opacity * (colour - coverage * self.image[region])
        covered = coverage[..., 0] > 0.5
        self._owner[region][covered] = len(self._areas)
        self._areas.append(int(covered.sum()))

    def box(self, index: int) -> tuple[int, int, int, int]:
        """The first and last column and row where a sprite is seen: xmin, ymin, xmax, ymax in pixels from 1."""
        seen = self._owner == index
        rows, columns = np.flatnonzero(seen.any(axis=1)) + 1, np.flatnonzero(seen.any(axis=0)) + 1
        return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])

    def is_occluded(self, index: int) -> bool:
        """Whether a later sprite hides a part of this one."""
        return int((self._owner == index).sum()) < self._areas[index]

    def develop(self, rng: np.random.Generator) -> bytes:
        """Exposes the finished picture: brightness, cast and sensor noise; returns it as JPEG."""
        exposure = rng.uniform(0.85, 1.1) * rng.uniform(0.95, 1.05, 3)
        image = self.image * exposure.astype(np.float32) + 3 * rng.standard_normal(self.image.shape, np.float32)
        image = np.clip(image, 0, 255).astype(np.uint8)
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A pale gradient with one of several textures and a few distracting blobs and lines: (H, W, 3) float32."""

    def pale() -> np.ndarray:
        colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.4), rng.uniform(0.5, 0.95))
        return 255 * np.array(colour, np.float32)

    first, second, third = pale(), pale(), pale()
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * x + np.sin(angle) * y
    ramp = ((slope - slope.min()) / np.ptp(slope))[..., None]
    image = first + (second - first) * ramp
    match rng.integers(5):
        case 0:  # clouds
            coarse = rng.random((rng.integers(3, 9), rng.integers(3, 9)), np.float32)
            cloud = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
            image += 0.8 * (third - image) * np.clip(cloud, 0, 1)
        case 1:  # stripes
            waves = np.sin(slope * rng.uniform(25, 70))[..., None] > rng.uniform(-0.5, 0.8)
            image += 0.35 * (third - image) * waves
        case 2:  # ground below a horizon
            horizon = rng.uniform(0.35, 0.75) * height / max(height, width)
            image[y > horizon + rng.uniform(-0.1, 0.1) * x] = third
        case 3:  # grain
            grain = cv2.GaussianBlur(rng.standard_normal((height, width), np.float32), (0, 0), rng.uniform(0.8, 2.5))
            image += 14 * (grain / grain.std())[..., None]
    image = np.ascontiguousarray(image)
    for _ in range(rng.integers(0, 6)):
        layer = image.copy()
        centre = tuple(int(value) for value in rng.integers(0, (width, height)))
        ink = tuple(float(channel) for channel in pale())
        if rng.random() < 0.5:
            axes = tuple(int(value) for value in rng.integers(4, max(height, width) // 6, 2))
            cv2.ellipse(layer, centre, axes, rng.uniform(0, 180), 0, 360, ink, -1, cv2.LINE_AA)
        else:
            end = tuple(int(value) for value in rng.integers(0, (width, height)))
            cv2.line(layer, centre, end, ink, int(rng.integers(1, 5)), cv2.LINE_AA)
        image += rng.uniform(0.3, 0.8) * (layer - image)
    return image
