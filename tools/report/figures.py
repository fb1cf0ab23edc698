"""The pictures of the report: curves drawn anew, to be read on light and on dark, and photographs made small."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

MAX_WIDTH = 1600  # pixels, of a picture taken over
INK = "#7a7d82"  # legible on white and on near black
COLORS = ("#3d85c6", "#d9762b", "#4b9b62", "#a06cc0")


@dataclass(frozen=True)
class Curve:
    """One line of a panel: its label, its points, and the colour's number; dashed for what is only context."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int
    is_dashed: bool = False


def curves(panels: Mapping[str, Sequence[Curve]], x: str) -> bytes:
    """Panels side by side as SVG without a background.

    Args:
        panels: title -> its curves; a panel starts at 0 unless it is one of losses.
        x: what is on the horizontal axis.
    """
    style = {"axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK}
    # A fixed salt and no date: the same curves are the same bytes.
    with mpl.rc_context({**style, "font.size": 9, "svg.hashsalt": "report"}):
        figure = Figure(figsize=(4.6 * len(panels), 3.3), layout="constrained")
        for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for line in lines:
                axes.plot(
                    *zip(*line.points, strict=True),
                    color=COLORS[line.color],
                    linestyle="--" if line.is_dashed else "-",
                    linewidth=1.1 if line.is_dashed else 1.8,
                    marker="o" if len(line.points) < 30 else "",
                    markersize=3,
                    label=line.label,
                )
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(x)
            axes.xaxis.get_major_locator().set_params(integer=max(axes.get_xlim()) >= 2)
            if "loss" not in title:
                axes.set_ylim(0, None)
            axes.grid(color=INK, alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(fontsize=8, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def shrink(path: Path) -> bytes:
    """A picture of a run as WebP, at most `MAX_WIDTH` wide.

    Raises:
        OSError, ValueError, SyntaxError: it is not a picture, or a broken one.
    """
    buffer = io.BytesIO()
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if picture.width > MAX_WIDTH:
        picture = picture.resize(
            (MAX_WIDTH, round(picture.height * MAX_WIDTH / picture.width)), Image.Resampling.LANCZOS
        )
    picture.save(buffer, "WEBP", quality=86, method=3)
    return buffer.getvalue()
