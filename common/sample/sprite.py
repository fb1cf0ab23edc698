"""Vector silhouettes, and the sprites that they become: posed, coloured, rendered at any size."""

import colorsys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

_SUPERSAMPLING = 3
_COLOURS = {"dark": "#23262e", "white": "#f6f3ea", "glass": "#a8d8f0", "pink": "#e8a0a0", "steel": "#9aa3ad"}

Part = tuple[str, str, list[float]]  # kind, name of the colour, numbers: a line of silhouettes.txt


class Silhouette(NamedTuple):
    """Parts, back to front, and the colours (#rrggbb by name) that they have beside those known to all."""

    view: str
    colours: dict[str, str]
    parts: list[Part]


def read_silhouettes(file: Path) -> dict[str, Silhouette]:
    """Reads silhouettes by name, in the format that the head of `silhouettes.txt` explains."""
    silhouettes: dict[str, Silhouette] = {}
    for line in file.read_text().splitlines():
        if line.startswith("#"):
            continue
        first, second, *rest = line.split()
        if not line.startswith(" "):
            parts: list[Part] = []
            silhouettes[first] = Silhouette(second, dict(zip("abc", rest, strict=False)), parts)
        else:
            parts.append((first, second, [float(number) for number in rest]))
    return silhouettes


class Sprite:
    """A silhouette in a random pose (turned by up to `tilt` degrees) and tint (hue shifted by up to `hue` of 1).

    `extent` is its width and height, in the scale of the pose; the longer side is `length` pixels when rendered.
    """

    def __init__(self, rng: np.random.Generator, silhouette: Silhouette, tilt: float, hue: float) -> None:
        shift = rng.uniform(-hue, hue), rng.uniform(0.8, 1.15), rng.uniform(0.85, 1.1)
        colours = {name: _shifted(colour, *shift) for name, colour in (_COLOURS | silhouette.colours).items()}
        self.mirrored = bool(rng.random() < 0.5)
        self._light = rng.uniform(0.04, 0.16)
        angle = np.deg2rad(rng.uniform(-tilt, tilt))
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        stretch = np.exp(rng.uniform(-0.12, 0.12))
        pose = rotation @ np.diag([-stretch if self.mirrored else stretch, 1 / stretch]) / 100
        self._outlines = []
        for kind, colour, numbers in silhouette.parts:
            points, width, closed = _outline(kind, numbers)
            self._outlines.append((points @ pose.T, width / 100, closed, colours[colour]))
        self._origin = np.min([(points - width / 2).min(axis=0) for points, width, _, _ in self._outlines], axis=0)
        end = np.max([(points + width / 2).max(axis=0) for points, width, _, _ in self._outlines], axis=0)
        self.extent = end - self._origin

    def size(self, length: float) -> tuple[int, int]:
        """Width and height in pixels of what `render` returns: two pixels of margin around the sprite."""
        width, height = np.ceil(self.extent * length / self.extent.max()).astype(int) + 4
        return int(width), int(height)

    def render(self, length: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the colour (H, W, 3), multiplied by the coverage, and the coverage (H, W, 1) from 0 to 1."""
        scale = _SUPERSAMPLING * length / self.extent.max()
        edge = max(2, round(0.012 * length * _SUPERSAMPLING))
        size = self.size(length)
        image = np.zeros((_SUPERSAMPLING * size[1], _SUPERSAMPLING * size[0], 4), np.uint8)  # colour and coverage
        for outline, stroke, closed, colour in self._outlines:
            points = [np.rint((outline - self._origin) * scale + 2 * _SUPERSAMPLING).astype(np.int32)]
            fill, rim = (*colour, 255), (*(0.45 * channel for channel in colour), 255)
            if stroke:
                thickness = max(1, round(stroke * scale))
                cv2.polylines(image, points, closed, rim, thickness + edge)
                cv2.polylines(image, points, closed, fill, thickness)
            else:
                cv2.fillPoly(image, points, fill)
                cv2.polylines(image, points, closed, rim, edge)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        shade = np.linspace(1 + self._light, 1 - self._light, size[1], dtype=np.float32)[:, None, None]
        return image[..., :3] * shade, image[..., 3:] / 255


def _outline(kind: str, numbers: list[float]) -> tuple[np.ndarray, float, bool]:
    """Points (N, 2) in units, stroke width (0: filled), and whether the outline is closed."""
    width = numbers[0] if kind in ("line", "stroke", "ring") else 0.0
    points = np.array(numbers[1:] if width else numbers).reshape(-1, 2)
    match kind:
        case "disc" | "ring":
            angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)[:, None]
            points = points[0] + points[1] * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        case "curve" | "stroke":
            points = _smooth(points, closed=kind == "curve")
    return points, width, kind not in ("line", "stroke")


def _smooth(points: np.ndarray, closed: bool) -> np.ndarray:
    """Catmull-Rom spline through the points (N, 2), eight steps a segment."""
    padded = np.concatenate([points[-1:], points, points[:2]] if closed else [points[:1], points, points[-1:]])
    t = np.linspace(0, 1, 8, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return np.concatenate([curve.reshape(-1, 2), points[:0] if closed else points[-1:]])


def _shifted(colour: str, hue: float, saturation: float, value: float) -> tuple[float, ...]:
    """Shifts #rrggbb in HSV; returns blue, green, red from 0 to 255."""
    h, s, v = colorsys.rgb_to_hsv(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    rgb = colorsys.hsv_to_rgb((h + hue) % 1, min(1.0, s * saturation), min(1.0, v * value))
    return tuple(255 * channel for channel in reversed(rgb))
