"""The charts of `charts.py` as PNG: one picture per chart, one sheet with all charts, and the reflection figure.

Each figure has its own canvas, so drawing needs no screen and does not change the matplotlib backend or style.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_search.records.folder import Run, read_run
from trl_search.records.report.charts import Chart, Line, charts_of, run_names, smoothing_window
from trl_search.records.report.reflection import (
    Correlation,
    ReflectionPoint,
    any_reflection,
    correlate,
    reflection_points,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that colour-blind readers can distinguish; the first two are used most.
COLOURS = ("#2f6db3", "#d9752b", "#3b9a78", "#b8476b", "#7a64b0", "#8c8c8c", "#c2a02c", "#4aa5c4")
INK, FAINT, GRID, ALARM = "#2b2f36", "#6b7280", "#e4e7eb", "#d9a520"
DOTS, DASHES, SOLID = (0, (1, 1.2)), (0, (4, 2)), "solid"
DPI = 150
LEGEND_ROW = 12.5  # points


def draw_figures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draws the charts of one run, or of several runs to compare.

    Returns:
        `list[Path]`: `overview.png`, one PNG per chart, and `reflection_and_em.png` if the policy ever reflected.
    """
    names = run_names(runs)
    charts = charts_of(runs, names)
    title = names[0] if len(names) == 1 else ""
    written = [_save(sheet(charts, title=title), folder / "overview.png")]
    written += [_save(sheet([chart], title=title), folder / f"{_file_name(chart.title)}.png") for chart in charts]
    for run, name in zip(runs, names, strict=True):
        found = reflection_points(run)
        if any_reflection(found):
            suffix = f" {name}" if len(runs) > 1 else ""
            figure = reflection_figure(found, correlate(found), title=name)
            written.append(_save(figure, folder / f"{_file_name('reflection and em' + suffix)}.png"))
    return written


def draw_curves(folder: Path, path: Path) -> Path:
    """Draws all charts of a finished run in `folder` on one sheet, `curves.png`."""
    return _save(sheet(charts_of([read_run(folder)], [""])), path)


def sheet(charts: Sequence[Chart], *, title: str = "") -> Figure:
    """Charts side by side on one figure."""
    if not charts:
        figure = _new_figure(6.4, 2.0, "")
        figure.text(0.5, 0.5, "Nothing is logged yet.", ha="center", va="center", color=FAINT)
        return figure
    columns = min(3 if len(charts) <= 9 else 4, len(charts))
    rows = math.ceil(len(charts) / columns)
    width, height = (6.4, 4.0) if len(charts) == 1 else (4.9 * columns, 3.2 * rows + 0.3)
    figure = _new_figure(width, height, title)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(charts) :]:
        axis.remove()
    for axis, chart in zip(axes, charts, strict=False):
        _draw_chart(axis, chart)
    return figure


def reflection_figure(found: Sequence[ReflectionPoint], correlation: Correlation, *, title: str = "") -> Figure:
    """The reflection figure of Seungyoun Shin's reproduction of Search-R1 (June 2025): one point per checkpoint, with
    its average EM over its share of reflective trajectories, and the correlation below."""
    ratio, em = [point.ratio for point in found], [point.em for point in found]
    figure = _new_figure(6.4, 4.6, title)
    text = "\n".join(textwrap.fill(line, 92) for line in words(found, correlation))
    figure.supxlabel(text, fontsize=8.5, color=INK, x=0.012, ha="left", linespacing=1.45)
    axis = figure.subplots()
    steps = [point.step for point in found]
    dots = axis.scatter(ratio, em, c=steps, cmap="viridis_r", s=36, edgecolor="white", linewidth=0.6, zorder=3)
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, -0.03 * high), high)  # a share is never negative
    levels, note = correlation.levels, "one point per checkpoint"
    if levels.slope is not None and levels.intercept is not None:
        ends = [min(ratio), max(ratio)]
        heights = [levels.intercept + levels.slope * x for x in ends]
        axis.plot(ends, heights, color=FAINT, linewidth=1.3, linestyle=DASHES)
        note += "; the line is the least-squares fit"
    _dress(axis, "Reflection and exact match", note, x="share of reflective trajectories, held-out")
    axis.set_ylabel("average EM", fontsize=8.5, color=FAINT)
    if len(steps) > 1:
        bar = figure.colorbar(dots, ax=axis, shrink=0.85, aspect=28, pad=0.02)
        bar.set_label("step", fontsize=8.5, color=FAINT)
        bar.ax.tick_params(labelsize=8, labelcolor=FAINT, length=0)
        bar.outline.set_visible(False)
        _whole_steps(bar.ax.yaxis)
    return figure


def _draw_chart(axis: Axes, chart: Chart) -> None:
    for line in chart.lines:
        _draw_line(axis, line)
    for alarm in chart.alarms:
        for step in alarm.steps:
            axis.axvspan(step - 0.5, step + 0.5, color=ALARM, alpha=0.16, linewidth=0, zorder=0)
        label = f"alarm: {alarm.name.replace('_', ' ')}"
        axis.axvline(alarm.steps[0], color=ALARM, linewidth=1, linestyle=DOTS, label=label)
    window = max((smoothing_window(len(line.steps)) for line in chart.lines), default=1)
    x = "step" if window == 1 else f"step (mean of {window}; pale: each one)"
    _dress(axis, chart.title, chart.note, x=x, legend=len(chart.lines) > 1 or bool(chart.alarms))
    axis.set_xlim(0, max(1, chart.last) * 1.02)
    _whole_steps(axis.xaxis)
    low, high = axis.dataLim.ymin, axis.dataLim.ymax
    if low >= 0:  # an axis from 0 makes small changes look small
        axis.set_ylim(0, high * 1.06 if high > 0 else 1)


def _draw_line(axis: Axes, line: Line) -> None:
    colour = COLOURS[line.colour % len(COLOURS)]
    dash = DOTS if line.level else DASHES if line.colour >= len(COLOURS) else SOLID
    values = [math.nan if value is None else value for value in line.values]
    if line.mean:
        axis.plot(line.steps, values, color=colour, linestyle=dash, linewidth=0.7, alpha=0.28)
        values = [math.nan if value is None else value for value in line.mean]
    # Short lines have markers, because a point between two gaps has no line.
    marker, size = ("o", 3.0) if len(line.steps) <= 45 and not line.level else ("", 0.0)
    [drawn] = axis.plot(
        line.steps, values, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=size
    )
    drawn.set_clip_on(False)  # otherwise the axis would cut a line at 0 in half
    drawn.set_zorder(3)
    drawn.set_label(line.label or "_")


def _dress(axis: Axes, title: str, note: str, *, x: str, legend: bool = False) -> None:
    """Adds title, note, legend and labels. The legend is between title and data, so it hides no data."""
    named = [line for line in axis.get_lines() if legend and not str(line.get_label()).startswith("_")]
    longest = max((len(str(line.get_label())) for line in named), default=0)
    columns = 4 if longest <= 9 else 3 if longest <= 18 else 2 if longest <= 26 else 1
    # Reserve one row even without a legend, so that the titles of neighbours align.
    room = LEGEND_ROW * max(1, math.ceil(len(named) / columns))
    axis.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold", pad=21 + room)
    axis.annotate(
        note, (0, 1), (0, 8 + room), xycoords="axes fraction", textcoords="offset points", fontsize=8.5, color=FAINT
    )
    if named:
        axis.legend(
            handles=named,
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
    axis.tick_params(labelsize=8.5, labelcolor=FAINT, length=0)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _whole_steps(axis: object) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True))  # type: ignore[attr-defined]


def _new_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=9, color=FAINT, x=0.012, ha="left")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title.lower())
