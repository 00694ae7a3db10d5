"""How the figures look: colours, axes, lines. A figure is built on its own canvas, so that nobody's matplotlib backend
or style is changed, and drawing needs no screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Told apart by colour-blind readers too; the first two are used most.
COLOURS = ("#2f6db3", "#d9752b", "#3b9a78", "#b8476b", "#7a64b0", "#8c8c8c", "#c2a02c", "#4aa5c4")
INK, FAINT, GRID = "#2b2f36", "#6b7280", "#e4e7eb"
# Curves of more points than this are drawn pale, with their running mean on top.
SMOOTH_ABOVE = 80
DPI = 150
LEGEND_ROW = 12.5  # points


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, apart from pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def dress(axis: Axes, *, title: str, note: str, x: str, y: str = "", legend: Sequence[Artist] = ()) -> None:
    """
    Title, a line on how to read it, legend, labels; and no more ink around the data than reading takes.

    Args:
        legend (`Sequence[Artist]`, *optional*): What it names. It stands between title and data, and hides nothing.
    """
    columns = 4 if all(len(str(artist.get_label())) <= 9 for artist in legend) else 3
    columns = 2 if any(len(str(artist.get_label())) > 18 for artist in legend) else columns
    # A row without a legend too, so that the titles of neighbours are level.
    room = LEGEND_ROW * max(1, math.ceil(len(legend) / columns))
    axis.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold", pad=21 + room)
    axis.annotate(
        note,
        (0, 1),
        (0, 8 + room),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=FAINT,
    )
    if legend:
        axis.legend(
            handles=list(legend),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            fontsize=8,
            labelcolor=INK,
            frameon=False,
            borderaxespad=0.1,
            borderpad=0.3,
            labelspacing=0.35,
            handlelength=1.5,
            columnspacing=1.2,
        )
    axis.set_xlabel(x, fontsize=8.5, color=FAINT)
    axis.set_ylabel(y, fontsize=8.5, color=FAINT)
    axis.tick_params(labelsize=8.5, labelcolor=FAINT, length=0)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def whole_steps(axis: Axis) -> None:
    """Lets the ticks stand at whole numbers: there is no step 2.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def draw_line(axis: Axes, curve: Mapping[int, float], *, colour: str, dash: str = "-", label: str = "") -> int:
    """
    One curve by its steps; a long one as its running mean, with the values themselves pale behind it.

    Returns:
        `int`: over how many points the mean is taken; 1 where the curve is short and drawn as it is.
    """
    steps, values = list(curve), list(curve.values())
    window = smoothing_window(len(steps))
    if window > 1:
        axis.plot(steps, values, color=colour, linestyle=dash, linewidth=0.7, alpha=0.28)
        values = running_mean(values, window)
    # A point alone, or between two gaps, has no line: where there is room, each is marked.
    marker, size = ("o", 3.0) if len(steps) <= 45 else ("", 0.0)
    [line] = axis.plot(steps, values, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=size)
    # A curve at 0 is as thick as any other, and lies over the axis.
    line.set_clip_on(False)
    line.set_zorder(3)
    line.set_label(label or "_")
    return window


def smoothing_window(points: int) -> int:
    """How many points the running mean takes: an odd number, 1 for no smoothing.

    Example:
        >>> smoothing_window(40), smoothing_window(331)
        (1, 17)
    """
    return 1 if points <= SMOOTH_ABOVE else points // 20 | 1


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The centred mean of `window` values, of fewer at both ends; NaN stays NaN and enters no mean.

    Example:
        >>> running_mean([1.0, 2.0, 6.0], 3)
        [1.5, 3.0, 4.0]
    """
    means = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if not math.isnan(v)]
        means.append(math.nan if math.isnan(value) else sum(near) / len(near))
    return means


def from_zero(axis: Axes) -> None:
    """Lets the y axis begin at 0 unless something lies below, so that small changes look small."""
    low, high = axis.dataLim.ymin, axis.dataLim.ymax
    if low >= 0:
        axis.set_ylim(0, high * 1.06 if high > 0 else 1)
