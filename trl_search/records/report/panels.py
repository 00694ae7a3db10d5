"""Which metrics of a run are drawn together, and under which names: the panels of the page and of the PNG figures.

A metric is named, or is a pattern (`eval/*/em`): what stands for the star is then the name of the line. A line is
drawn where a run has a number for it, and a panel where it has a line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Panel:
    """
    One chart.

    Args:
        title (`str`): What it shows.
        note (`str`): How to read it, in one line.
        lines (`tuple[tuple[str, str], ...]`): Metric or pattern, and label; a pattern's label holds a star.
    """

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A metric that at least one run has numbers for."""

    metric: str
    label: str


PANELS = (
    Panel("Reward", "weighted sum, mean over trajectories", (("reward", "mean"), ("reward_std", "std within groups"))),
    Panel("Single rewards", "each before its weight", (("rewards/*/mean", "*"),)),
    Panel("Held-out answers", "macro average over datasets", (("eval/em", "exact match"), ("eval/f1", "F1"))),
    Panel("Exact match per dataset", "held-out questions", (("eval/*/em", "*"),)),
    Panel(
        "Searches and turns",
        "a trajectory",
        (("search/searches", "searches"), ("search/turns", "turns"), ("eval/searches", "searches, held out")),
    ),
    Panel(
        "Length",
        "tokens a trajectory",
        (("tokens/model", "model, trained"), ("tokens/observation", "retrieved, masked")),
    ),
    Panel("How trajectories end", "share of trajectories", (("stop/*", "*"),)),
    Panel("Entropy", "of the policy, nats a token", (("entropy", "entropy"),)),
    Panel("KL", "to the reference model", (("kl", "KL"),)),
    Panel(
        "Reflection",
        "share of trajectories with a reflective phrase",
        (("reflection/ratio", "training"), ("eval/reflection_ratio", "held out")),
    ),
    Panel("Reflective phrases", "per 1,000 model tokens", (("reflection/phrases_per_1k_tokens", "phrases"),)),
    Panel(
        "Warning signs",
        "a trajectory; groups without signal as a share",
        (
            ("search/malformed_calls", "malformed calls"),
            ("search/duplicate_tags", "duplicate tags"),
            ("search/empty_retrievals", "empty searches"),
            ("search/failed_rollouts", "failed retrievals"),
            ("frac_reward_zero_std", "groups without signal"),
        ),
    ),
    Panel("Alarms", "1 where one rang", (("alarm/*", "*"),)),
    Panel("Gradient norm", "before clipping", (("grad_norm", "norm"),)),
    Panel("Loss", "GRPO's, near zero by design", (("loss", "loss"),)),
    Panel(
        "Time",
        "seconds: a step, and a trajectory's generation and search",
        (("step_time", "step"), ("time/generation_s", "generation"), ("time/search_s", "search")),
    ),
)


def lines_of(panel: Panel, histories: Iterable[History]) -> list[Line]:
    """
    The lines of a panel for some runs. A way to end that never happened is left out, and an alarm that never rang.

    Example:
        >>> lines_of(Panel("EM", "", (("eval/*/em", "*"),)), [[{"step": 1, "eval/nq/em": 0.3}]])
        [Line(metric='eval/nq/em', label='nq')]
    """
    drawn: dict[str, bool] = {}  # metric -> whether it is ever not zero
    for history in histories:
        for row in history:
            for metric, value in row.items():
                if is_number(value):
                    drawn[metric] = drawn.get(metric, False) or value != 0
    lines = []
    for pattern, label in panel.lines:
        if "*" not in pattern:
            lines += [Line(pattern, label)] if pattern in drawn else []
            continue
        expression = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
        for metric in sorted(drawn):
            match = expression.fullmatch(metric)
            if match and (drawn[metric] or not pattern.startswith(("stop/", "alarm/"))):
                lines.append(Line(metric, label.replace("*", match[1].replace("_", " "))))
    return lines


def points(history: History, metric: str) -> dict[int, float]:
    """The numbers of a metric by step, in order; where a step was logged twice, the last."""
    return {step: value for step, value in curve(history, metric).items() if not math.isnan(value)}


def curve(history: History, metric: str) -> dict[int, float]:
    """
    As `points`, and NaN where what was logged is no finite number: a gap in the curve, and no bridge over it.

    Example:
        >>> curve([{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": None}], "kl")
        {1: 0.5, 3: nan}
    """
    logged = [(row["step"], row[metric]) for row in history if metric in row and "step" in row]
    return dict(sorted((step, float(value) if is_number(value) else math.nan) for step, value in dict(logged).items()))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
