"""The results of an evaluation: one `Outcome` per question, and their means with bootstrap intervals.

A question whose search failed cannot be scored. It is counted and reported, but left out of the means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from trl_search.common.errors import UserError
from trl_search.common.files import finite_or_none
from trl_search.rewards.answers import contains_answer, exact_match, f1_score, last_answer
from trl_search.rewards.reflective_phrases import count_reflections
from trl_search.types import FAILURES, Trajectory

RESULTS_FILE = "results.json"  # of a run, and of an evaluation
RESAMPLES = 10_000
# An evaluation with a larger share of failed searches is compared with no other: those that failed are no sample.
MAX_FAILED = 0.05
_AVERAGED = (
    "em", "f1", "contains", "searches", "turns", "malformed", "model_tokens", "observation_tokens", "latency_s",
)  # fmt: skip
_Z95 = 1.959964  # quantile .975 of the normal distribution


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question, answered and scored."""

    id: str
    data_source: str
    question: str
    golden_answers: tuple[str, ...]
    answer: str | None  # the text of the last closed `<answer>`. `None` if there is none; EM is then 0.
    # Whether the answer equals a golden one, the overlap of their words, and whether the answer
    # contains a golden one
    em: float
    f1: float
    contains: float
    read: float  # whether a passage that the policy found contains a golden answer
    searches: int  # calls of the environment's tools. The search of `rag` is not a call, so it is not counted.
    turns: int
    malformed: int  # calls that could not be run
    model_tokens: int
    observation_tokens: int
    latency_s: float  # time of generation and search, including the wait for concurrent questions
    reflections: int  # reflective phrases that the policy wrote
    # A `StopReason`. With `retrieval_failed` or `environment_failed`, the scores are meaningless and `error` has the
    # cause.
    stop_reason: str
    error: str

    @property
    def failed(self) -> bool:
        """Whether the search or the environment failed. Failed questions are left out of the means."""
        return self.stop_reason in FAILURES


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the questions that did not fail; NaN if all failed."""

    mode: str
    questions: int  # all questions, including failed ones
    failed: int  # questions whose search failed; `errors` counts each reason
    errors: dict[str, int]
    em: float
    em_ci95: float  # half the width of `em_interval`
    em_interval: tuple[float, float]  # the 95 % bootstrap interval of `em`
    f1: float
    contains: float
    searches: float
    turns: float
    malformed: float
    model_tokens: float
    observation_tokens: float
    latency_s: float
    reflective_ratio: float  # the share of questions for which the policy wrote a reflective phrase

    @property
    def is_comparable(self) -> bool:
        """Whether there is a mean, and few enough searches failed to compare it with others."""
        return math.isfinite(self.em) and self.failed <= MAX_FAILED * self.questions

    def as_json(self) -> dict[str, Any]:
        """The values for a JSON file, with null in place of NaN. [`evaluation_of`] reads them back."""
        values: dict[str, Any] = finite_or_none(asdict(self))
        return values


def evaluation_of(values: Mapping[str, Any], source: str) -> Evaluation:
    """The evaluation in a file.

    Raises:
        UserError: if the values are not an evaluation of this version.
    """
    try:
        numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
        low, high = (math.nan if value is None else value for value in values["em_interval"])
        return Evaluation(**{**numbers, "em_interval": (low, high)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} holds no evaluation of this version ({error}): move it away") from error


def score(trajectory: Trajectory, row: Mapping[str, Any], identifier: str) -> Outcome:
    """Scores one trajectory. Only the policy's turns are read, because a passage can hold an answer, too."""
    answer, golden = last_answer(trajectory.spoken), tuple(row["golden_answers"])
    return Outcome(
        id=identifier,
        data_source=str(row.get("data_source") or ""),
        question=row["question"],
        golden_answers=golden,
        answer=answer,
        em=0.0 if answer is None else float(exact_match(answer, golden)),
        f1=0.0 if answer is None else float(f1_score(answer, golden)),
        contains=0.0 if answer is None else float(contains_answer(answer, golden)),
        read=float(any(contains_answer(one.titled_text, golden) for found in trajectory.passages for one in found)),
        searches=trajectory.calls,
        turns=len(trajectory.spoken),
        malformed=trajectory.malformed,
        model_tokens=trajectory.model_tokens,
        observation_tokens=trajectory.observation_tokens,
        latency_s=trajectory.generation_s + trajectory.search_s,
        reflections=sum(map(count_reflections, trajectory.spoken)),
        stop_reason=str(trajectory.stop_reason),
        error=trajectory.error,
    )


def by_dataset(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each `data_source`, in order of first appearance."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.data_source, []).append(outcome)
    return groups


def summarize(mode: str, outcomes: Sequence[Outcome]) -> Evaluation:
    """The means over one set of questions. Each question has the same weight."""
    return macro(mode, {"": outcomes})


def macro(mode: str, groups: Mapping[str, Sequence[Outcome]]) -> Evaluation:
    """The averages over sets. Each set has the same weight, regardless of its size.

    The interval is a stratified bootstrap: the sets are fixed, and questions are resampled within each set.
    """
    answered = {name: [one for one in group if not one.failed] for name, group in groups.items()}
    failed = [one for group in groups.values() for one in group if one.failed]

    def mean(value: Callable[[Outcome], float]) -> float:
        if not groups or not all(answered.values()):
            return float("nan")  # no answer is not an EM of 0
        return sum(sum(map(value, group)) / len(group) for group in answered.values()) / len(groups)

    low, high = bootstrap_interval([[one.em for one in group] for group in answered.values()])
    means = {name: mean(attrgetter(name)) for name in _AVERAGED}
    return Evaluation(
        mode=mode,
        questions=sum(map(len, groups.values())),
        failed=len(failed),
        errors=dict(Counter(one.error for one in failed).most_common()),
        em_ci95=(high - low) / 2,
        em_interval=(low, high),
        reflective_ratio=mean(lambda one: float(one.reflections > 0)),
        **means,
    )


def bootstrap_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the average of the groups' means; NaN if a group is empty.

    If a group's values are all 0 or all 1, resampling shows no spread, so Wilson's interval of a share is used.
    The counts of the distinct values in a resample follow a multinomial distribution, so one draw makes a resample.

    Example:
        >>> bootstrap_interval([[1.0, 0.0, 1.0, 1.0]])
        (0.25, 1.0)
    """
    if not groups or not all(groups):
        return float("nan"), float("nan")
    draw = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for values in groups:
        distinct, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
        drawn = draw.multinomial(len(values), counts / len(values), size=RESAMPLES)
        means += drawn @ distinct / len(values) / len(groups)
    low, high = map(float, np.quantile(means, (0.025, 0.975)))
    # Zou and Donner's MOVER (2008): the squared distances of independent parts to their bounds add up.
    middle = sum(sum(values) / len(values) for values in groups) / len(groups)
    missing = [_wilson_width(len(values)) / len(groups) for values in groups if set(values) == {1.0}]
    possible = [_wilson_width(len(values)) / len(groups) for values in groups if set(values) == {0.0}]
    return middle - math.hypot(middle - low, *missing), middle + math.hypot(high - middle, *possible)


def _wilson_width(n: int) -> float:
    """The width of the 95 % Wilson interval of a share that is 0 of n, or n of n.

    Example:
        >>> round(_wilson_width(20), 3)
        0.161
    """
    return _Z95**2 / (n + _Z95**2)
