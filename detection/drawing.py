"""Drawing boxes into photographs: the one routine behind every picture of the project."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import resize

FONT_SIZE = 7  # points
FULL_FRAME = 5  # inches of the long side of an image alone in its figure
MIN_SIDE = 640  # pixels of the same, so that labels have room
MAX_SIDE = 1600  # pixels of an image that a panel can show; a photograph of 50 megapixels takes seconds to draw


def class_colors(count: int) -> np.ndarray:
    """One colour a class, as far apart as a colour wheel allows: RGB from 0 to 1, shape (count, 3)."""
    wheel = colormaps["hsv"](np.arange(count) / max(count, 1))[:, :3]
    return 0.15 + 0.8 * wheel


def side_by_side(image: torch.Tensor, count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in a row that fit an image (3, H, W), however long or tall, with room for titles."""
    height, width = image.shape[1:]
    panel_width = max(min(6.5, 8 * width / height), 3.2)  # inches
    panel_height = max(min(panel_width * height / width, 8), 1)
    figure = Figure(figsize=(count * panel_width, panel_height + 0.5), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def full_frame(image: torch.Tensor) -> tuple[Figure, Axes]:
    """A figure that is the image (3, H, W) and nothing beside it, pixel for pixel between `MIN_SIDE` and `MAX_SIDE`."""
    height, width = image.shape[1:]
    side = min(max(height, width, MIN_SIDE), MAX_SIDE)
    width, height = (max(round(length * side / max(height, width)), 1) for length in (width, height))
    dpi = side / FULL_FRAME  # lines and labels grow with the image
    # A hundredth more, since the canvas drops fractions of a pixel.
    figure = Figure(figsize=((width + 0.01) / dpi, (height + 0.01) / dpi), dpi=dpi)
    return figure, figure.add_axes((0, 0, 1, 1))


def to_pixels(figure: Figure) -> np.ndarray:
    """Renders a figure: uint8 (H, W, 3), RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


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
        labels: a text for each box, written at one of its corners; later boxes choose first.
    """
    pixels: torch.Tensor = torch.from_numpy(image).permute(2, 0, 1) if isinstance(image, np.ndarray) else image
    height, width = pixels.shape[1:]
    if max(height, width) > MAX_SIDE:
        pixels = resize(pixels, None, max_size=MAX_SIDE)
    axes.imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    for (x0, y0, x1, y1), color in zip(boxes, colors, strict=True):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.6))
    if labels is not None:
        _draw_labels(axes, boxes, colors, labels)


def _draw_labels(axes: Axes, boxes: np.ndarray, colors: np.ndarray, labels: Sequence[str]) -> None:
    """Writes each label at a corner of its box, inside the image and off the labels of later boxes where it can."""
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    axes.apply_aspect()
    pixels_per_point = width / (72 * axes.get_window_extent().width / axes.figure.dpi)
    line = 1.8 * FONT_SIZE * pixels_per_point
    placed = np.empty((0, 4))
    for index in reversed(range(len(boxes))):
        x0, y0, x1, y1 = boxes[index]
        length = 0.65 * FONT_SIZE * len(labels[index]) * pixels_per_point
        corners = [(x, y) for y in (y0, y0 + line, y1, y1 + line) for x in (x0, x1 - length)]
        left, bottom = np.array(corners).T
        left, bottom = left.clip(0, max(width - length, 0)), bottom.clip(min(line, height), height)
        spots = np.stack([left, bottom - line, left + length, bottom], axis=1)
        overlap = box_iou(torch.from_numpy(spots), torch.from_numpy(placed)).sum(dim=1)
        spot = spots[overlap.numpy().argmin()]  # the first of equals
        placed = np.concatenate([placed, spot[None]])
        color = colors[index]
        axes.text(
            spot[0],
            spot[3],
            labels[index],
            fontsize=FONT_SIZE,
            color="white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.6 else "black",
            verticalalignment="bottom",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
            clip_on=True,
            zorder=3 + index / len(boxes),
        )
