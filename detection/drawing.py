"""Drawing boxes into photographs: the one routine behind every picture of the project."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle


def class_colors(count: int) -> np.ndarray:
    """One colour a class, as far apart as a colour wheel allows: RGB from 0 to 1, shape (count, 3)."""
    wheel = colormaps["hsv"](np.arange(count) / max(count, 1))[:, :3]
    return 0.15 + 0.8 * wheel


def draw_boxes(
    axes: Axes,
    image: torch.Tensor | np.ndarray,
    boxes: torch.Tensor | np.ndarray,
    colors: np.ndarray,
    labels: Sequence[str] | None = None,
) -> None:
    """Draws an image with boxes over it.

    Args:
        axes: where to draw; ticks are switched off.
        image: uint8, (3, H, W) tensor or (H, W, 3) array, RGB.
        boxes: (N, 4), XYXY in pixels of `image`; the last is drawn on top.
        colors: (N, 3 or 4), RGB or RGBA from 0 to 1.
        labels: a text for each box, written at its upper left corner.
    """
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0).numpy()
    axes.imshow(image)
    axes.set_axis_off()
    height, width = image.shape[:2]
    for index, (x0, y0, x1, y1) in enumerate(np.asarray(boxes, dtype=float).reshape(-1, 4)):
        color = colors[index]
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.6))
        if labels is not None:
            # Inside the image even where the box touches its upper edge.
            above = y0 > 0.06 * height
            axes.text(
                min(max(x0, 0), width),
                y0 if above else y0 + 1,
                labels[index],
                fontsize=7,
                color="white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.6 else "black",
                verticalalignment="bottom" if above else "top",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
                clip_on=True,
            )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
