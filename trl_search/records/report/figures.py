"""The curves of one run, or of two compared, as PNG: a picture a panel, all on one sheet, and the seed's figure.

Two runs share each panel: the colour says which metric, solid or dashed which run. What is drawn stands in
`panels.py`, for these pictures and for the HTML page alike.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trl_search.common.errors import UserError
from trl_search.records.report.drawing import (
    COLOURS,
    FAINT,
    INK,
    draw_line,
    dress,
    from_zero,
    new_figure,
    save,
    whole_steps,
)
from trl_search.records.report.panels import PANELS, History, Panel, curve, lines_of
from trl_search.records.report.reflection import draw_reflection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trl_search.evaluation.outcomes import Evaluation
    from trl_search.records.folder import Run

DASHES: tuple[Literal["-", "--"], ...] = ("-", "--")


def draw_figures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """
    Draws everything that was logged of one run, or of two in the same panels.

    Args:
        runs (`Sequence[Run]`): One or two, as `read_run` gives them.
        folder (`Path`): Made where it is missing. Pictures of the same names in it are overwritten.

    Returns:
        `list[Path]`: `overview.png`, one PNG for each panel that something was logged for, and the reflection figure
        of each run.

    Example:
        >>> draw_figures([read_run("runs/quickstart")], Path("figures"))
        [PosixPath('figures/overview.png'), PosixPath('figures/reward.png'), ...]
    """
    named = dict(zip(run_names(runs), runs, strict=True))
    histories = {name: run.history for name, run in named.items()}
    written = [save(overview_figure(histories), folder / "overview.png")]
    for panel in filled_panels(histories):
        written.append(save(panel_figure(panel, histories), folder / f"{_file_name(panel.title)}.png"))
    for name, run in named.items():
        path = folder / f"{_file_name('reflection and em' + (f' {name}' if len(named) > 1 else ''))}.png"
        draw_reflection(run, path, name=name)
        written.append(path)
    return written


def draw_curves(history: History, path: Path, measured: Mapping[str, Evaluation]) -> Path:
    """Draws the log of a run that has just ended; what was measured beside the log lies level in the panel of EM."""
    levels = {row: result.em for row, result in measured.items()}
    return save(overview_figure({"": history}, levels=levels), path)


def run_names(runs: Sequence[Run]) -> list[str]:
    """
    The runs by their folders: the last part, or as much of the path as tells two apart.

    Example:
        >>> run_names([read_run("runs/seed_0/a"), read_run("runs/seed_1/a")])
        ['seed_0/a', 'seed_1/a']
    """
    if not 1 <= len(runs) <= len(DASHES):
        raise UserError(f"one run can be drawn, or two together; {len(runs)} were given")
    paths = [run.folder.resolve().parts for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError(f"{runs[0].folder} is given twice: there is nothing to compare")
    length = next(n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in paths}) == len(paths))
    return ["/".join(path[-length:]) for path in paths]


def filled_panels(histories: Mapping[str, History]) -> list[Panel]:
    """The panels that one of the runs has numbers for."""
    return [panel for panel in PANELS if lines_of(panel, histories.values())]


def panel_figure(panel: Panel, histories: Mapping[str, History]) -> Figure:
    """One panel as a picture of its own. `histories`: one or two, by the name of the run."""
    figure = new_figure(6.4, 4.0)
    _draw_panel(figure.subplots(), panel, histories, {})
    _name_runs(figure, histories)
    return figure


def overview_figure(histories: Mapping[str, History], *, levels: Mapping[str, float] | None = None) -> Figure:
    """
    All panels on one sheet.

    Args:
        histories (`Mapping[str, History]`): One or two, by the name of the run; `""` for no name.
        levels (`Mapping[str, float]`, *optional*): EM measured beside the log, by name: level lines.
    """
    levels = levels or {}
    filled = filled_panels(histories)
    drawn = [panel for panel in PANELS if panel in filled or (levels and _shows_em(panel))]
    if not drawn:
        figure = new_figure(6.4, 2.0)
        figure.text(0.5, 0.5, "Nothing is logged yet.", ha="center", va="center", color=FAINT)
        return figure
    columns = min(3 if len(drawn) <= 9 else 4, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = new_figure(4.9 * columns, 3.2 * rows + 0.3)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(drawn) :]:
        axis.remove()
    for axis, panel in zip(axes, drawn, strict=False):
        _draw_panel(axis, panel, histories, levels if _shows_em(panel) else {})
    _name_runs(figure, histories)
    return figure


def _draw_panel(axis: Axes, panel: Panel, histories: Mapping[str, History], levels: Mapping[str, float]) -> None:
    lines = lines_of(panel, histories.values())
    window = 1
    for line, colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        label = line.label  # once, in the colour that both runs share
        for history, dash in zip(histories.values(), DASHES, strict=False):
            drawn = curve(history, line.metric)
            if not all(map(math.isnan, drawn.values())):
                window = max(window, draw_line(axis, drawn, colour=colour, dash=dash, label=label))
                label = ""
    for (name, em), colour in zip(levels.items(), COLOURS[len(lines) :], strict=False):
        axis.axhline(em, color=colour, linewidth=1.4, linestyle=(0, (1, 1.2)), label=name)
    named = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    dress(
        axis,
        title=panel.title,
        note=panel.note,
        x="step" if window == 1 else f"step (mean of {window}; pale: each one)",
        legend=named if len(named) > 1 else (),
    )
    last = max((row["step"] for history in histories.values() for row in history if "step" in row), default=1)
    axis.set_xlim(0, max(1, last) * 1.02)
    whole_steps(axis.xaxis)
    from_zero(axis)


def _shows_em(panel: Panel) -> bool:
    return any(metric == "eval/em" for metric, _ in panel.lines)


def _name_runs(figure: Figure, histories: Mapping[str, History]) -> None:
    """The name of one run as a line above, those of two as a legend of solid and dashed."""
    names = [name for name in histories if name]
    if len(names) == 1:
        figure.suptitle(names[0], fontsize=9, color=FAINT, x=0.012, ha="left")
    elif names:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=INK, linestyle=dash, linewidth=1.7, label=name)
            for name, dash in zip(names, DASHES, strict=True)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=9, frameon=False, handlelength=2.6)


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title.lower())
