"""The pictures of the report: curves drawn anew, to be read on light and on dark, and pictures of runs made small."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType
from PIL import Image

from tools.report.document import Picture
from tools.report.runs import Runs

MAX_WIDTH = 1600  # pixels, of a picture taken over
INK = "#7a7d82"  # legible on white and on near black
COLORS = ("#3d85c6", "#d9762b", "#4b9b62", "#a06cc0")
STYLE: dict[RcKeyType, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), INK),
    **{"axes.grid": True, "grid.color": INK, "grid.alpha": 0.25, "grid.linewidth": 0.6, "axes.titlesize": 10},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8, "legend.frameon": False},
    **{"font.size": 9, "lines.markersize": 3, "svg.hashsalt": "report"},  # a fixed salt: equal curves, equal bytes
}


def curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], name: str, caption: str) -> list[Picture]:
    """Panels side by side as SVG without a background; nothing where no panel has a point.

    Args:
        panels: title -> label -> points by epoch. A panel starts at 0 unless it is one of losses. A label that ends on
            "training" is only context: dashed, in the colour of the curve before.
        name: of the picture's file, without its suffix.
        caption: of the picture.
    """
    panels = {title: {label: points for label, points in lines.items() if points} for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return []
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.3), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            colors, color = iter(COLORS), COLORS[0]
            for label, points in lines.items():
                is_context, marker = label.endswith("training"), "o" if len(points) < 30 else ""
                color = color if is_context else next(colors)
                line, width = ("--", 1.1) if is_context else ("-", 1.8)
                axes.plot(*zip(*points, strict=True), line, color=color, linewidth=width, marker=marker, label=label)
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=max(axes.get_xlim()) >= 2)
            if "loss" not in title:
                axes.set_ylim(0, None)
            axes.legend()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return [Picture(f"{name}.svg", buffer.getvalue(), caption)]


def taken_over(runs: Runs, path: Path, caption: str, name: str = "") -> list[Picture]:
    """A picture of a run as WebP, at most `MAX_WIDTH` wide; nothing where it is missing or broken."""

    def shrink(path: Path) -> Picture:
        buffer = io.BytesIO()
        with Image.open(path) as image:
            picture = image.convert("RGB")
        picture.thumbnail((MAX_WIDTH, picture.height), Image.Resampling.LANCZOS)
        picture.save(buffer, "WEBP", quality=86, method=3)
        return Picture(f"{name or path.stem}.webp", buffer.getvalue(), caption)

    picture = runs.attempt(shrink, path)
    return [picture] if picture else []
