"""Small multiples: a picture with a panel a class, the worst and the best where there are too many."""

import math
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_PANELS = 40  # a panel takes a twentieth of a second


def class_panels(ap: Mapping[str, float]) -> tuple[Figure, Iterator[tuple[str, Axes]], str]:
    """A figure of panels to one scale, from 0 to 1 upwards, five in a row, each with the name and AP of its class.

    Args:
        ap: class name -> its AP, nan without objects; at least one.

    Returns:
        The figure; the classes shown with their panels; and a line that says which they are, empty if all are shown.
    """
    names, which = list(ap), ""
    if len(names) > MOST_PANELS:
        half = MOST_PANELS // 2
        ranked = sorted((name for name in names if not math.isnan(ap[name])), key=lambda name: ap[name])
        which = f"\nthe worst and the best {half} of {len(names)} classes"
        names = [*ranked[:half], *ranked[half:][-half:]] or names[:MOST_PANELS]
    columns = min(len(names), 5)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(2.4 * columns, 5), 2.2 * rows + 0.8), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for name, axes in zip(names, panels, strict=False):
        figures = "no objects" if math.isnan(ap[name]) else f"{ap[name]:.3f}"
        axes.set_title(f"{name}  {figures}", fontsize=9, parse_math=False)
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=7, length=0)
        axes.spines[:].set_color("0.8")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure, zip(names, panels, strict=False), which


def plot_training(rows: Sequence[dict], metric: str, prefix: str) -> Figure | None:
    """The AP of each class at every evaluation of a training, before the mean over the classes in grey.

    Args:
        rows: of `metrics.json`.
        metric: key of the mean.
        prefix: the key of a class is this and its name.

    Returns:
        The figure; None where no row holds a class.
    """
    evaluations = [row for row in rows if metric in row]
    last = {key: row[key] for row in evaluations for key in row if key.startswith(prefix)}
    if not last:
        return None
    figure, panels, which = class_panels({key.removeprefix(prefix): value for key, value in last.items()})
    for name, axes in panels:
        for key, color, marker in ((metric, "0.7", ""), (prefix + name, "tab:blue", "o")):
            points = [(row["iteration"] + 1, row[key]) for row in evaluations if key in row]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=3, linewidth=1.2)
        axes.locator_params("x", nbins=4)
        axes.set_xlim(0, 1.03 * (evaluations[-1]["iteration"] + 1))
    figure.suptitle(f"{metric} of each class; in grey the mean of all classes{which}", fontsize=11, parse_math=False)
    figure.supxlabel("iteration", fontsize=9)
    return figure
