"""The seed's figure: the share of trajectories with a reflective phrase against the average EM, over the checkpoints
of a run, with their correlation.

    a run's log ─► reflection_points ─► [(step, ratio, em), ...] ─► correlate ─► Correlation ─► words, figure

Both numbers tend to rise while a policy learns, so that over the checkpoints of one run they correlate as any two
things that training changes do. The correlation of their first differences asks for more: whether the EM rises between
the checkpoints between which the ratio rises. Neither says that reflecting is why the answers got better.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trl_search.common.errors import UserError
from trl_search.records.report.drawing import COLOURS, FAINT, INK, dress, from_zero, new_figure, save, whole_steps
from trl_search.records.report.panels import points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trl_search.records.folder import Run

EM, HELD_OUT_RATIO, TRAINING_RATIO = "eval/em", "eval/reflection_ratio", "reflection/ratio"
# Below this, Fisher's interval spans everything from -1 to 1.
FEWEST = 4
# The standard error of atanh(rho) is wider than that of Pearson's r: Bonett and Wright (2000).
SPEARMAN_WIDENING = 0.5
Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class ReflectionPoint:
    """One checkpoint: how many of its trajectories reflect, and its average EM."""

    step: int
    ratio: float
    em: float


@dataclass(frozen=True, slots=True)
class ReflectionSeries:
    """
    The checkpoints of a run, by step.

    Args:
        source (`str`): Where the ratio is from. `held-out`: the trajectories that the EM is of. `training`: those
            sampled for training since the evaluation before, at the training temperature, over other questions.
    """

    source: Literal["held-out", "training"]
    points: tuple[ReflectionPoint, ...]


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A correlation and its 95 % interval; none where the agreement is complete, as no formula gives one then."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Association:
    """
    How two series go together; no number where none can be had.

    Args:
        n (`int`): How many pairs.
        problem (`str`): Why nothing is claimed; empty where something is.
        slope, intercept (`float`, *optional*): The line of least squares.
    """

    n: int
    problem: str = ""
    pearson: Coefficient | None = None
    spearman: Coefficient | None = None
    slope: float | None = None
    intercept: float | None = None


@dataclass(frozen=True, slots=True)
class Correlation:
    """Of ratio and EM over the checkpoints, and of their changes from one checkpoint to the next."""

    levels: Association
    differences: Association


def reflection_points(run: Run) -> ReflectionSeries:
    """
    The checkpoints that were evaluated, from the run's log.

    Where no evaluation logged its own ratio, that of training is taken: the mean over the steps since the evaluation
    before. The two are never mixed.
    """
    history = run.history
    em = points(history, EM)
    held_out, training = points(history, HELD_OUT_RATIO), points(history, TRAINING_RATIO)
    both = [ReflectionPoint(step, held_out[step], em[step]) for step in em if step in held_out]
    if both:
        return ReflectionSeries("held-out", tuple(both))
    found, before = [], -1
    for step in em:
        ratios = [ratio for at, ratio in training.items() if before < at <= step]
        if ratios:
            found.append(ReflectionPoint(step, statistics.fmean(ratios), em[step]))
        before = step
    return ReflectionSeries("training", tuple(found))


def correlate(found: Sequence[ReflectionPoint]) -> Correlation:
    """
    Pearson's r and Spearman's rho of ratio and EM, and of their first differences.

    The intervals take the checkpoints for independent draws, which those of one run are not: they are too narrow.

    Example:
        >>> rising = [ReflectionPoint(step, ratio, em) for step, ratio, em in ...]
        >>> correlate(rising).levels.pearson
        Coefficient(value=0.81, low=0.36, high=0.95)
    """
    ratio, em = [point.ratio for point in found], [point.em for point in found]
    return Correlation(
        levels=_associate(ratio, em, of="checkpoint"),
        differences=_associate(_differences(ratio), _differences(em), of="change between checkpoints"),
    )


def words(series: ReflectionSeries, correlation: Correlation) -> list[str]:
    """What the figure says beneath its panels, and what to bear in mind: a line each."""
    if not series.points:
        return [
            "No evaluation of this run logged an EM together with a reflective-phrase ratio, so there is nothing to "
            "compare: train with --evaluate_every N."
        ]
    levels, differences = correlation.levels, correlation.differences
    lines = [f"Checkpoints: {_in_words(levels)}."]
    if levels.pearson:
        lines += [
            f"Changes between checkpoints: {_in_words(differences)}.",
            "Training moves both numbers, so over its steps they may correlate although neither causes the other; the "
            "intervals take checkpoints for independent.",
        ]
    if series.source == "training":
        lines.append(
            "The ratio is that of the training rollouts since the evaluation before: no evaluation logged its own."
        )
    return lines


def draw_reflection(run: Run, path: Path, *, name: str | None = None) -> Correlation:
    """
    Draws the figure of a run: both numbers over the steps, and one against the other.

    Args:
        name (`str`, *optional*): What the run is called in it; its folder's name by default.

    Returns:
        `Correlation`: the numbers that stand in the figure.
    """
    series = reflection_points(run)
    correlation = correlate(series.points)
    save(reflection_figure(series, correlation, name=run.folder.name if name is None else name), path)
    return correlation


def reflection_figure(series: ReflectionSeries, correlation: Correlation, *, name: str = "") -> Figure:
    """The figure itself."""
    import textwrap

    lines = words(series, correlation)
    figure = new_figure(10.4, 4.6 if series.points else 1.6)
    text = "\n".join(textwrap.fill(line, 150) for line in lines)
    figure.supxlabel(text, fontsize=8.5, color=INK, x=0.012, ha="left", linespacing=1.45)
    if name:
        figure.suptitle(name, fontsize=9, color=FAINT, x=0.012, ha="left")
    if not series.points:
        return figure

    over_steps, against = figure.subplots(1, 2, width_ratios=(1.15, 1))
    steps = [point.step for point in series.points]
    ratio, em = [point.ratio for point in series.points], [point.em for point in series.points]
    share = f"reflective share, {series.source}"

    # Two axes: a ratio of .02 and an EM of .40 have no scale in common.
    beside = over_steps.twinx()
    drawn = []
    for axis, values, colour, label in (
        (over_steps, em, COLOURS[0], "average EM"),
        (beside, ratio, COLOURS[1], share),
    ):
        drawn += axis.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.7, label=label)
    dress(
        over_steps, title="Over the checkpoints", note="each on its own axis", x="step", y="average EM", legend=drawn
    )
    dress(beside, title="", note="", x="", y=share)
    beside.grid(visible=False)
    for axis, line in zip((over_steps, beside), drawn, strict=True):
        line.set(clip_on=False, zorder=3)
        axis.yaxis.label.set_color(line.get_color())
        axis.tick_params(axis="y", labelcolor=line.get_color())
        from_zero(axis)
    whole_steps(over_steps.xaxis)

    levels = correlation.levels
    line = "" if levels.slope is None else "; the line is that of least squares"
    dress(against, title="One against the other", note=f"each point a checkpoint{line}", x=share, y="average EM")
    dots = against.scatter(ratio, em, c=steps, cmap="viridis_r", s=36, edgecolor="white", linewidth=0.6, zorder=3)
    low, high = against.get_xlim()
    against.set_xlim(max(low, -0.03 * high), high)  # there is no share below 0
    if levels.slope is not None and levels.intercept is not None:
        ends = [min(ratio), max(ratio)]
        heights = [levels.intercept + levels.slope * x for x in ends]
        against.plot(ends, heights, color=FAINT, linewidth=1.3, linestyle=(0, (4, 2)))
    if len(steps) > 1:
        bar = figure.colorbar(dots, ax=against, shrink=0.85, aspect=28, pad=0.02)
        bar.set_label("step", fontsize=8.5, color=FAINT)
        bar.ax.tick_params(labelsize=8, labelcolor=FAINT, length=0)
        bar.outline.set_visible(False)
        whole_steps(bar.ax.yaxis)
    return figure


def _associate(x: Sequence[float], y: Sequence[float], *, of: str) -> Association:
    n = len(x)
    plural = of.replace("change", "changes") if "change" in of else f"{of}s"
    if n < FEWEST:
        return Association(n, f"{n} {of if n == 1 else plural}, and an interval takes {FEWEST} or more")
    for values, what in ((x, "the reflective share"), (y, "the EM")):
        if _constant(values):
            return Association(n, f"{what} is the same over all {n} {plural}")
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError('the correlation needs scipy: pip install "trl-search[report]"') from error

    pearson = stats.pearsonr(x, y)
    interval = pearson.confidence_interval(0.95)
    rho = float(stats.spearmanr(x, y).statistic)
    line = stats.linregress(x, y)
    return Association(
        n,
        pearson=_coefficient(float(pearson.statistic), float(interval.low), float(interval.high)),
        spearman=_coefficient(rho, *_spearman_ci95(rho, n)),
        slope=float(line.slope),
        intercept=float(line.intercept),
    )


def _coefficient(value: float, low: float, high: float) -> Coefficient:
    # Fisher's interval of r = 1 is [1, 1], of any n: that four points lie on a line does not make it certain.
    complete = abs(value) > 1 - 1e-9
    return Coefficient(value, None if complete else low, None if complete else high)


def _spearman_ci95(rho: float, n: int) -> tuple[float, float]:
    if abs(rho) >= 1:
        return rho, rho
    half = Z95 * math.sqrt((1 + SPEARMAN_WIDENING * rho**2) / (n - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def _constant(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-12 * max(map(abs, values))


def _differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


def _in_words(association: Association) -> str:
    if association.problem:
        return f"no correlation is claimed ({association.problem})"
    assert association.pearson and association.spearman
    return (
        f"Pearson r = {_shown(association.pearson)}, Spearman ρ = {_shown(association.spearman)}, n = {association.n}"
    )


def _shown(coefficient: Coefficient) -> str:
    value = f"{coefficient.value:.2f}".replace("-", "−")
    if coefficient.low is None or coefficient.high is None:
        return f"{value} (complete agreement: no interval)"
    interval = f"[{coefficient.low:.2f}, {coefficient.high:.2f}]".replace("-", "−")
    return f"{value} {interval}"
