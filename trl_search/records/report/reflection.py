"""Correlates the share of trajectories with a reflective phrase with the average EM, over the checkpoints of a run.

    a run's log ─► reflection_points ─► [(step, ratio, em), ...] ─► correlate ─► Correlation ─► words

This is the reflection figure of Seungyoun Shin's reproduction of Search-R1 (June 2025).

Both numbers tend to rise in training, so they correlate over the checkpoints of one run like any two numbers that
training changes. The correlation of their first differences is a stricter test: does the EM rise between two
checkpoints when the ratio rises? Neither correlation shows that reflection improves the answers.
"""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from trl_search.records.folder import Run
from trl_search.records.report.charts import history_of, points

EM, RATIO = "eval/em", "eval/reflection_ratio"
# With fewer checkpoints, Fisher's interval spans everything from -1 to 1.
FEWEST = 4
# The standard error of atanh(rho) is wider than that of Pearson's r: Bonett and Wright (2000).
SPEARMAN_WIDENING = 0.5
Z95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class ReflectionPoint:
    """One checkpoint: its share of reflective trajectories, and its average EM."""

    step: int
    ratio: float
    em: float


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A correlation and its 95 % interval. A correlation of ±1 has none, because Fisher's formula fails there."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Association:
    """The association of two series."""

    n: int  # the number of pairs
    problem: str = ""  # why there are no coefficients; empty if there are
    pearson: Coefficient | None = None
    spearman: Coefficient | None = None
    # slope, intercept: The least-squares line
    slope: float | None = None
    intercept: float | None = None


@dataclass(frozen=True, slots=True)
class Correlation:
    """The association of ratio and EM over the checkpoints, and of their changes between checkpoints."""

    levels: Association
    differences: Association


def reflection_points(run: Run) -> list[ReflectionPoint]:
    """The checkpoints whose evaluation logged both an EM and a ratio, by step."""
    history = history_of(run)
    em, ratio = points(history, EM), points(history, RATIO)
    return [ReflectionPoint(step, ratio[step], em[step]) for step in em if step in ratio]


def any_reflection(found: Sequence[ReflectionPoint]) -> bool:
    """Whether any trajectory reflected. If none did, there is nothing to draw."""
    return any(point.ratio > 0 for point in found)


def correlate(found: Sequence[ReflectionPoint]) -> Correlation:
    """
    Pearson's r and Spearman's rho of ratio and EM, and of their first differences.

    The intervals treat checkpoints as independent. Those of one run are not, so the intervals are too narrow.

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


def words(found: Sequence[ReflectionPoint], correlation: Correlation) -> list[str]:
    """The lines of text under the figure: the coefficients and caveats."""
    if not found:
        return [
            "No evaluation of this run logged an EM together with a reflective-phrase ratio, so there is nothing to "
            "compare: train with --evaluate_every N."
        ]
    levels, differences = correlation.levels, correlation.differences
    lines = [f"Checkpoints: {_in_words(levels)}."]
    if levels.pearson:
        lines += [
            f"Changes between checkpoints: {_in_words(differences)}.",
            "Training moves both numbers, so over its steps they may correlate although neither causes the other. The "
            "intervals treat checkpoints as independent.",
        ]
    return lines


def _associate(x: Sequence[float], y: Sequence[float], *, of: str) -> Association:
    n = len(x)
    plural = of.replace("change", "changes") if "change" in of else f"{of}s"
    if n < FEWEST:
        return Association(n, f"{n} {of if n == 1 else plural}, and an interval takes {FEWEST} or more")
    for values, what in ((x, "the reflective share"), (y, "the EM")):
        if _constant(values):
            return Association(n, f"{what} is the same over all {n} {plural}")
    line = statistics.linear_regression(x, y)
    return Association(
        n,
        pearson=_coefficient(statistics.correlation(x, y), n, widening=0.0),
        spearman=_coefficient(statistics.correlation(_ranks(x), _ranks(y)), n, widening=SPEARMAN_WIDENING),
        slope=line.slope,
        intercept=line.intercept,
    )


def _coefficient(value: float, n: int, *, widening: float) -> Coefficient:
    """A coefficient with Fisher's interval: tanh(atanh(r) ± 1.96 · √((1 + widening · r²) / (n − 3)))."""
    # For r = 1, the interval would be [1, 1] for any n, but four points on a line are no proof.
    if abs(value) > 1 - 1e-9:
        return Coefficient(value, None, None)
    half = Z95 * math.sqrt((1 + widening * value**2) / (n - 3))
    return Coefficient(value, math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values get the mean of their ranks. `[0.2, 0.1, 0.2]` gives `[2.5, 1.0, 2.5]`."""
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) + 1) / 2 for value in values]


def _constant(values: Sequence[float]) -> bool:
    # Below 1e-50, the squares in a correlation would underflow.
    return max(values) - min(values) <= max(1e-12 * max(map(abs, values)), 1e-50)


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
