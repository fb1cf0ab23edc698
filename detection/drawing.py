"""Drawing boxes into photographs: the one routine behind every picture of the project that has no axes."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib import colormaps, font_manager
from matplotlib.colors import Colormap
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

FONT_FILE = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
MIN_SIDE = 640  # pixels of the long side of a picture, so that labels have room
MAX_SIDE = 1600  # pixels of the same; more than a screen shows
LINE = 1 / 320  # thickness of a box, of the long side
FONT = 1 / 50  # height of the letters of a label, of the long side
CAPTION = 15  # height of the letters of a caption, in pixels
GAP = 10  # pixels between panels


class Picture:
    """A photograph to draw on, pixel for pixel where its long side has `MIN_SIDE` to `MAX_SIDE` pixels, else resized.

    Args:
        image: uint8, (3, H, W), RGB; it is not changed.

    Attributes:
        height: of the photograph.
        width: of the photograph.
        pixels: uint8 (H', W', 3), RGB, with what has been drawn so far.
    """

    def __init__(self, image: torch.Tensor) -> None:
        self.height, self.width = image.shape[1:]
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        side = max(self.height, self.width)
        if MIN_SIDE <= side <= MAX_SIDE:
            self.pixels = pixels.copy()
        else:
            scale = min(max(side, MIN_SIDE), MAX_SIDE) / side
            size = max(round(scale * self.width), 1), max(round(scale * self.height), 1)
            self.pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)

    def draw_boxes(
        self, boxes: torch.Tensor | np.ndarray, colors: np.ndarray, labels: Sequence[str] | None = None
    ) -> None:
        """Draws boxes.

        Args:
            boxes: (N, 4), XYXY in pixels of the photograph; the last is drawn on top.
            colors: (N, 3 or 4), RGB from 0 to 1.
            labels: a text for each box, written at one of its corners or near it; later boxes choose first.
        """
        height, width = self.pixels.shape[:2]
        side = max(height, width)
        scale = np.array([width / self.width, height / self.height] * 2)
        scaled = np.asarray(boxes, dtype=float).reshape(-1, 4) * scale
        colors = np.rint(255 * np.asarray(colors, dtype=float)[:, :3]).astype(int) if len(scaled) else np.empty((0, 3))
        thickness = max(round(side * LINE), 2)
        for box, color in zip(scaled, colors.tolist(), strict=True):
            # The middle of a line lies on the edge; OpenCV counts from the middle of the first pixel, in sixteenths.
            x0, y0, x1, y1 = np.rint(16 * (box - 0.5)).clip(-1e6, 1e6).astype(int).tolist()
            cv2.rectangle(self.pixels, (x0, y0), (x1, y1), color, thickness, cv2.LINE_AA, shift=4)
        if labels:
            self._write_labels(scaled, colors, labels, max(round(side * FONT), 11))

    def draw_objects(
        self,
        names: Sequence[str],
        boxes: torch.Tensor | np.ndarray,
        colors: Mapping[str, np.ndarray],
        scores: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        """Draws objects with their classes and, where they have some, their scores.

        Args:
            names: of the classes, the best object first; it is drawn on top.
            boxes: (N, 4), XYXY in pixels of the photograph.
            colors: name of the class -> RGB from 0 to 1.
            scores: of the objects.
        """
        labels = (
            [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)] if scores is not None else names
        )
        edges = np.array([colors[name] for name in names]).reshape(-1, 3)
        self.draw_boxes(np.asarray(boxes)[::-1], edges[::-1], labels[::-1])

    def _write_labels(self, boxes: np.ndarray, colors: np.ndarray, labels: Sequence[str], font_size: int) -> None:
        pad = max(font_size // 6, 2)
        sizes = np.array([(_width(text, font_size) + 2 * pad, font_size + 3 * pad) for text in labels])
        height, width = self.pixels.shape[:2]
        places = place_labels(boxes, sizes, (width, height))
        for (x0, y0, x1, y1), color, text in zip(places.tolist(), colors.tolist(), labels, strict=True):
            self.pixels[y0:y1, x0:x1] = color
            ink = 255 if np.dot(color, (0.299, 0.587, 0.114)) < 0.6 * 255 else 0
            _write(self.pixels, text, (x0 + pad, (y0 + y1) // 2), font_size, ink)


def class_colors(names: Sequence[str]) -> dict[str, np.ndarray]:
    """A colour for each class, as far apart as a colour wheel allows: RGB from 0 to 1."""
    wheel = 0.15 + 0.8 * colormaps["hsv"](np.arange(len(names)) / max(len(names), 1))[:, :3]
    return dict(zip(names, wheel, strict=True))


def place_labels(boxes: np.ndarray, sizes: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
    """Where the labels of boxes are written: inside the frame, none over another while there is room.

    The label of the last box chooses first: above or below one of the corners of its box, on either side of the edge,
    or else the free place nearest to the usual one, which is above the upper left corner.

    Args:
        boxes: (N, 4), XYXY.
        sizes: (N, 2), width and height of each label.
        frame: width and height.

    Returns:
        (N, 4), XYXY in whole pixels.
    """
    placed = np.empty((0, 4))
    for (x0, y0, x1, y1), (width, height) in zip(boxes[::-1], sizes[::-1], strict=True):
        most_x, most_y = np.maximum(np.array(frame) - (width, height), 0)
        left = np.rint(np.clip([x0, x1 - width] * 4, 0, most_x))
        top = np.rint(np.clip(np.repeat([y0 - height, y0, y1 - height, y1], 2), 0, most_y))
        shared = (_shared(left, width, placed[:, ::2]) * _shared(top, height, placed[:, 1::2])).sum(axis=1)
        spot = left[shared.argmin()], top[shared.argmin()]  # the first of equals
        if shared.min() > 0:
            columns = np.append(np.arange(0, most_x, width // 4), most_x)
            rows = np.append(np.arange(0, most_y, height), most_y)
            shared = _shared(columns, width, placed[:, ::2]) @ _shared(rows, height, placed[:, 1::2]).T
            distance = np.abs(columns - left[0])[:, None] + np.abs(rows - top[0])
            if shared.min() == 0:
                column, row = np.unravel_index(np.where(shared == 0, distance, np.inf).argmin(), shared.shape)
                spot = columns[column], rows[row]
        placed = np.concatenate([placed, [[*spot, spot[0] + width, spot[1] + height]]])
    return np.rint(placed[::-1]).astype(int)


def _shared(starts: np.ndarray, length: float, others: np.ndarray) -> np.ndarray:
    """Lengths (S, P) that segments of one length, from each start (S,), share with others, (P, 2) starts and ends."""
    shared = np.minimum(starts[:, None] + length, others[:, 1]) - np.maximum(starts[:, None], others[:, 0])
    return shared.clip(min=0)


def beside(panels: Sequence[np.ndarray], captions: Sequence[str], columns: int = 0, title: str = "") -> np.ndarray:
    """Panels on white, row by row, a caption above each.

    Args:
        panels: uint8 (H, W, 3), RGB.
        captions: one for each, or none at all.
        columns: panels in a row; 0: all.
        title: above all of them.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    columns = columns or len(panels)
    line = 2 * CAPTION
    captions = captions or [""] * len(panels)
    needed = [max(panel.shape[1], _width(text, CAPTION)) for panel, text in zip(panels, captions, strict=True)]
    widths = [max(needed[column::columns]) for column in range(columns)]
    heights = [
        max(panel.shape[0] for panel in panels[start : start + columns]) for start in range(0, len(panels), columns)
    ]
    above = line if any(captions) else 0
    top = line if title else GAP
    width = max(sum(widths) + GAP * (columns + 1), _width(title, CAPTION) + 2 * GAP)
    sheet = np.full((sum(heights) + len(heights) * (above + GAP) + top, width, 3), 255, dtype=np.uint8)
    _write(sheet, title, ((width - _width(title, CAPTION)) // 2, CAPTION), CAPTION)
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        row, column = divmod(index, columns)
        x = GAP + sum(widths[:column]) + GAP * column
        y = top + sum(heights[:row]) + row * (above + GAP) + above
        _write(sheet, caption, (x + (widths[column] - _width(caption, CAPTION)) // 2, y - CAPTION), CAPTION)
        left = x + (widths[column] - panel.shape[1]) // 2
        sheet[y : y + panel.shape[0], left : left + panel.shape[1]] = panel
    return sheet


def color_scale(height: int, colormap: Colormap, label: str) -> np.ndarray:
    """A panel that tells what the colours of values from 0 to 1 are, uint8 (height, W, 3), RGB."""
    panel = np.full((height, 20 + 7 * CAPTION // 2, 3), 255, np.uint8)
    panel[:, :16] = np.rint(255 * colormap(np.linspace(1, 0, height))[:, None, :3])
    for value, y in ((0, height - CAPTION // 2), (0.5, height // 2), (1, CAPTION // 2)):
        _write(panel, f"{value:g}", (20, y), CAPTION)
    # It reads from below: on the panel turned to the right, x goes from the lower end of it upwards.
    middle = min(3 * height // 4, height - CAPTION - _width(label, CAPTION) // 2)
    _write(np.rot90(panel, -1), label, (middle - _width(label, CAPTION) // 2, 20 + 5 * CAPTION // 2), CAPTION)
    return panel


def bars(values: Mapping[str, float], size: tuple[int, int]) -> np.ndarray:
    """A panel with a bar and a text for each value from 0 to 1, in per cent, uint8 (height, width, 3), RGB.

    Args:
        values: by name, from top to bottom.
        size: height and width of the panel.
    """
    height, width = size
    step = height / max(len(values), 1)
    figures = [f"{100 * value:.1f} %" for value in values.values()]
    font_size = int(np.clip(step / 4, 11, 2 * CAPTION))
    widest = max((_width(text, font_size) for text in figures), default=0)
    widest += max((_width(name, font_size) for name in values), default=0)
    font_size = max(int(font_size * min((width - 3 * GAP) / max(widest, 1), 1)), 8)
    before_names = max((_width(text, font_size) for text in figures), default=0) + 2 * GAP
    panel = np.full((height, width, 3), 255, np.uint8)
    for place, ((name, value), figure) in enumerate(zip(values.items(), figures, strict=True)):
        top, middle, bottom = (round((place + part) * step) for part in (0.1, 0.5, 0.9))
        panel[top:bottom, : max(round(value * width), 1)] = (187, 214, 233)
        _write(panel, figure, (before_names - GAP - _width(figure, font_size), middle), font_size)
        _write(panel, name, (before_names, middle), font_size)
    return panel


def _write(pixels: np.ndarray, text: str, place: tuple[int, int], size: int, ink: int = 0) -> None:
    """Writes a text into uint8 (H, W, 3), from the middle of its left edge on; what does not fit is cut off."""
    letters = _letters(text, size)
    x, y = place[0], place[1] - len(letters) // 2
    height, width = pixels.shape[:2]
    letters = letters[max(-y, 0) : max(height - y, 0), max(-x, 0) : max(width - x, 0), None].astype(np.uint16)
    x, y = max(x, 0), max(y, 0)
    below = pixels[y : y + letters.shape[0], x : x + letters.shape[1]]
    below[:] = (below * (255 - letters) + ink * letters + 127) // 255


def _width(text: str, size: int) -> int:
    return _letters(text, size).shape[1]


# The same names and figures come again and again, and Python's threads render letters one after another.
@functools.lru_cache(maxsize=4096)
def _letters(text: str, size: int) -> np.ndarray:
    """How much of each pixel a text in letters of this height covers, uint8 (H, W), 0 to 255."""
    font = ImageFont.truetype(_font_file("".join(sorted({*text} - {*"0123456789. "}))), size)
    canvas = Image.new("L", (math.ceil(font.getlength(text)), sum(font.getmetrics())))
    ImageDraw.Draw(canvas).text((0, 0), text, fill=255, font=font)
    return np.asarray(canvas)


@functools.lru_cache(maxsize=1024)
def _font_file(characters: str) -> str:
    """The font of matplotlib where it has all of these characters, else one of the system's that has them."""
    wanted = {ord(character) for character in characters if character.isprintable()}
    installed = (font.fname for font in font_manager.fontManager.ttflist if "LastResort" not in font.fname)
    for file in (FONT_FILE, *sorted(installed)):
        if wanted <= _characters(file):
            return file
    logger.warning("No font here has all characters of %r: install one of that script to read the labels", characters)
    return FONT_FILE


@functools.lru_cache(maxsize=1024)
def _characters(file: str) -> frozenset[int]:
    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):  # matplotlib remembers fonts that may be gone or broken now
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
