"""Photographs for detectors: a red and a blue rectangle on grey."""

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


def draw_scene(height: int, width: int, seed: int) -> tuple[Image.Image, list[tuple[str, int, int, int, int]]]:
    """A photograph, and class and corners of each rectangle, as VOC counts them."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 120, dtype=np.uint8)
    objects = []
    for name, colour in COLOURS.items():
        (x, y), (w, h) = rng.integers(0, 16, 2), rng.integers(16, 32, 2)
        image[y : y + h, x : x + w] = colour
        objects.append((name, x + 1, y + 1, x + w, y + h))
    return Image.fromarray(image), objects
