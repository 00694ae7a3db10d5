"""The charts of a report. The page and the PNG figures draw the same `Chart` values.

    metrics.jsonl, results.json ─► history_of ─► charts_of ─► [Chart, ...] ─► static/charts.js (page)
                                                                        └──► figures.py (PNG)

A chart of one run has one line per metric. Charts that compare runs have one metric each, and one line per run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.files import is_number
from trl_search.records.alarm_rules import ALARM_PREFIX, RULES
from trl_search.records.folder import Run
from trl_search.records.report.panels import PANELS, Panel

History = Sequence[Mapping[str, Any]]

MAX_RUNS = 16
# A line with more points is drawn pale, with its running mean on top.
SMOOTH_ABOVE = 80


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    label: str  # the name in the legend
    run: int  # the index of the run
    colour: int  # the index of the colour
    # steps, values: The points. `None` is a gap, where no finite number was logged.
    steps: list[int]
    values: list[float | None]
    mean: list[float | None]  # the running mean of a long line; empty for a short one
    level: bool = False  # whether it is a dotted horizontal line, for a value that was measured once


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm of one run: the steps at which it fired, its meaning and its advice."""

    name: str
    run: int
    steps: list[int]
    means: str = ""
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines that are drawn together; see `Panel`. `last` is the last step of all runs, where the x axis ends."""

    section: str
    title: str
    note: str
    lines: list[Line]
    alarms: list[Alarm]
    last: int


def charts_of(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """The charts of one run, or of several runs to compare. Charts without data are left out.

    Example:
        >>> [chart.title for chart in charts_of([read_run("runs/quickstart")], ["quickstart"])]
        ['Held-out answers', 'Reward', ...]
    """
    histories = [history_of(run) for run in runs]
    last = max((row["step"] for history in histories for row in history), default=1)
    charts = []
    for panel in PANELS:
        metrics = metrics_of(panel, histories)
        alarms = [alarm for run, history in enumerate(histories) for alarm in alarms_of(history, run, panel.alarms)]
        if len(runs) == 1:
            lines = [_line(histories[0], metric, label, 0, i) for i, (metric, label) in enumerate(metrics)]
            if any(metric == "eval/em" for metric, _ in metrics):
                lines += _baselines(runs[0], last, len(lines))
            if lines:
                charts.append(Chart(panel.section, panel.title, panel.note, lines, alarms, last))
            continue
        for metric, label in metrics:
            lines = [_line(history, metric, names[run], run, run) for run, history in enumerate(histories)]
            title = panel.title if len(metrics) == 1 else f"{panel.title}: {label}"
            lines = [line for line in lines if line.steps]
            charts.append(Chart(panel.section, title, panel.note, lines, alarms, last))
            alarms = []  # only the first chart of a panel shows its alarms
    return charts


def history_of(run: Run) -> list[Mapping[str, Any]]:
    """The logged rows of a run, and rows for evaluations in `results.json` (before and after training) that were not
    logged."""
    logged = {row["step"] for row in run.history if is_number(row.get("eval/em"))}
    last = max((row["step"] for row in run.history), default=0)
    measured = {0: run.before}
    measured[last] = run.after or measured.get(last, {})
    added = [
        {
            "step": step,
            "eval/em": result.get("em"),
            "eval/f1": result.get("f1"),
            "eval/searches": result.get("searches"),
            "eval/reflection_ratio": result.get("reflective_ratio"),
        }
        for step, result in measured.items()
        if result and step not in logged
    ]
    return sorted([*run.history, *added], key=lambda row: row["step"])


def metrics_of(panel: Panel, histories: Iterable[History]) -> list[tuple[str, str]]:
    """
    The metrics of a panel that a run has numbers for, each with its label.

    Example:
        >>> metrics_of(Panel("", "EM", "", (("eval/*/em", "*"),)), [[{"step": 1, "eval/nq/em": 0.3}]])
        [('eval/nq/em', 'nq')]
    """
    logged: dict[str, bool] = {}  # by metric: whether it is ever nonzero
    for history in histories:
        for row in history:
            for metric, value in row.items():
                if is_number(value):
                    logged[metric] = logged.get(metric, False) or value != 0
    found = []
    for pattern, label in panel.lines:
        expression = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
        for metric in sorted(logged):
            match = expression.fullmatch(metric)
            if match and (logged[metric] or not panel.rare):
                star = match[1].replace("_", " ") if match.groups() else ""
                found.append((metric, label.replace("*", star)))
    return [] if panel.several and len(found) == 1 else found


def alarms_of(history: History, run: int, names: Iterable[str] | None = None) -> list[Alarm]:
    """The alarms that fired, optionally only those in `names`."""
    if names is None:
        logged = {name for row in history for name in row if name.startswith(ALARM_PREFIX)}
        names = sorted(name.removeprefix(ALARM_PREFIX) for name in logged)
    rang = [(name, [step for step, on in points(history, ALARM_PREFIX + name).items() if on]) for name in names]
    rules = {rule.name: (rule.means, rule.advice) for rule in RULES}
    return [Alarm(name, run, steps, *rules.get(name, ("", ""))) for name, steps in rang if steps]


def run_names(runs: Sequence[Run]) -> list[str]:
    """
    Names the runs by the last part of their folders' paths, or by as many parts as distinguish all runs.

    Raises:
        UserError: for no run, more than `MAX_RUNS`, or a run that is given twice.

    Example:
        >>> run_names([read_run("runs/seed_0/a"), read_run("runs/seed_1/a")])
        ['seed_0/a', 'seed_1/a']
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise UserError(f"a report shows 1 to {MAX_RUNS} runs, but {len(runs)} were given")
    paths = [run.folder.resolve().parts for run in runs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"{runs[i].folder} is given twice: give each run once")
    length = next(n for n in range(1, max(map(len, paths)) + 1) if len({path[-n:] for path in paths}) == len(paths))
    return ["/".join(path[-length:]) for path in paths]


def points(history: History, metric: str) -> dict[int, float]:
    """The numbers of a metric by step, in order. If a step was logged twice, the last number counts."""
    return {step: value for step, value in curve(history, metric).items() if value is not None}


def curve(history: History, metric: str) -> dict[int, float | None]:
    """
    Like `points`, but with `None` for numbers that are not finite, which become gaps in the line.

    Example:
        >>> curve([{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": None}], "kl")
        {1: 0.5, 3: None}
    """
    logged = [(row["step"], row[metric]) for row in history if metric in row]
    return dict(sorted((step, float(value) if is_number(value) else None) for step, value in dict(logged).items()))


def smoothing_window(points: int) -> int:
    """The number of points in the running mean: odd, 1 for no smoothing.

    Example:
        >>> smoothing_window(40), smoothing_window(331)
        (1, 17)
    """
    return 1 if points <= SMOOTH_ABOVE else points // 20 | 1


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The centred mean of `window` values, of fewer at both ends. Gaps stay gaps and are left out of the means.

    Example:
        >>> running_mean([1.0, 2.0, 6.0], 3)
        [1.5, 3.0, 4.0]
    """
    means: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - window // 2) : i + window // 2 + 1] if v is not None]
        means.append(None if value is None else sum(near) / len(near))
    return means


def _line(history: History, metric: str, label: str, run: int, colour: int) -> Line:
    drawn = curve(history, metric)
    values = list(drawn.values())
    window = smoothing_window(len(values))
    return Line(label, run, colour, list(drawn), values, running_mean(values, window) if window > 1 else [])


def _baselines(run: Run, last: int, colour: int) -> list[Line]:
    measured = [(name, result["em"]) for name, result in run.baselines.items() if is_number(result.get("em"))]
    return [Line(name, 0, colour + i, [0, last], [em, em], [], level=True) for i, (name, em) in enumerate(measured)]
