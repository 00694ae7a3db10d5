"""Means and intervals, for one set and averaged over sets, against textbook values and a plain bootstrap."""

from __future__ import annotations

import json
import math
import random

import pytest

from trl_search.common.errors import UserError
from trl_search.evaluation.outcomes import Outcome, bootstrap_interval, by_dataset, evaluation_of, macro, summarize


def outcome(em: float = 0.0, *, source: str = "nq", failed: str = "", **others) -> Outcome:
    return Outcome(
        **{
            "id": "0",
            "data_source": source,
            "question": "?",
            "golden_answers": ("x",),
            "answer": "x" if em else None,
            "em": em,
            "f1": em,
            "contains": em,
            "read": em,
            "searches": 1,
            "turns": 2,
            "malformed": 0,
            "model_tokens": 10,
            "observation_tokens": 5,
            "latency_s": 0.5,
            "reflections": 0,
            "stop_reason": "retrieval_failed" if failed else "answer",
            "error": failed,
        }
        | others
    )


def test_means_of_one_set():
    outcomes = [outcome(1.0, searches=3, reflections=2), outcome(0.0), outcome(1.0, failed="down"), outcome(0.0)]
    result = summarize("search", outcomes)
    assert (result.mode, result.questions, result.failed, result.errors) == ("search", 4, 1, {"down": 1})
    assert result.em == result.f1 == result.reflective_ratio == pytest.approx(1 / 3)
    assert result.searches == pytest.approx(5 / 3)
    assert (result.turns, result.model_tokens, result.observation_tokens, result.latency_s) == (2, 10, 5, 0.5)


def test_the_macro_average_weights_sets_not_questions():
    outcomes = [outcome(1.0)] + [outcome(0.0, source="bamboogle")] * 9
    groups = by_dataset(outcomes)
    assert {name: len(group) for name, group in groups.items()} == {"nq": 1, "bamboogle": 9}
    assert macro("search", groups).em == 0.5 and summarize("search", outcomes).em == pytest.approx(0.1)
    assert macro("search", groups).questions == 10


def test_with_a_set_without_answers_there_is_no_average():
    groups = {"nq": [outcome(1.0)], "popqa": [outcome(failed="down"), outcome(failed="up"), outcome(failed="down")]}
    result = macro("search", groups)
    assert math.isnan(result.em) and result.errors == {"down": 2, "up": 1}
    assert math.isnan(summarize("search", []).em)


def test_an_evaluation_is_read_back_unchanged_from_a_file():
    measured = summarize("search", [outcome(1.0), outcome(0.0), outcome(failed="down")])
    nothing = summarize("search", [outcome(failed="down")])
    for result in (measured, nothing):
        text = json.dumps(result.as_json(), allow_nan=False)
        assert repr(evaluation_of(json.loads(text), "x.json")) == repr(result)  # NaN is not equal to itself
    assert nothing.as_json()["em"] is None and nothing.as_json()["em_interval"] == [None, None]


@pytest.mark.parametrize("values", [{}, {"em": 1.0, "em_interval": [0.0, 1.0]}, {"em_interval": None}, "0.5", None])
def test_other_files_and_versions_are_refused_by_name(values):
    with pytest.raises(UserError, match=r"x\.json holds no evaluation of this version .*: move it away"):
        evaluation_of(values, "x.json")


def test_the_interval_of_a_share_is_wilsons():
    draw = random.Random(0)
    values = [float(draw.random() < 0.3) for _ in range(400)]
    share = sum(values) / 400
    low, high = bootstrap_interval([values])
    assert (high - low) / 2 == pytest.approx(1.96 * (share * (1 - share) / 400) ** 0.5, rel=0.05)
    assert (low + high) / 2 == pytest.approx(share, abs=0.01)
    assert all(map(math.isnan, bootstrap_interval([]))) and all(map(math.isnan, bootstrap_interval([[1.0], []])))


def test_all_right_and_all_wrong_are_not_certain():
    """20 of 20 gives Wilson's .839 to 1, not ± 0."""
    assert bootstrap_interval([[1.0] * 20]) == (pytest.approx(0.8389, abs=1e-4), 1.0)
    assert bootstrap_interval([[0.0] * 20]) == (0.0, pytest.approx(0.1611, abs=1e-4))
    mixed = [1.0, 0.0] * 50
    alone, beside = bootstrap_interval([mixed]), bootstrap_interval([mixed, [1.0] * 20])
    assert 0.75 - beside[0] == pytest.approx(math.hypot(0.5 - alone[0], 0.1611) / 2, rel=0.05)
    assert beside[1] - 0.75 == pytest.approx((alone[1] - 0.5) / 2, rel=0.05)


def test_the_interval_equals_that_of_a_plain_bootstrap():
    """A skewed sample of many distinct values, and two sets: cases without a textbook formula."""
    draw = random.Random(1)
    groups = [[draw.random() ** 4 for _ in range(25)], [draw.random() for _ in range(40)]]
    means = sorted(
        sum(sum(draw.choices(values, k=len(values))) / len(values) for values in groups) / 2 for _ in range(4000)
    )
    low, high = bootstrap_interval(groups)
    assert low == pytest.approx(means[100], abs=0.008) and high == pytest.approx(means[3900], abs=0.008)


def test_the_average_over_sets_has_a_narrower_interval_than_one_set():
    groups = [[1.0, 0.0] * 50] * 7
    one, seven = bootstrap_interval(groups[:1]), bootstrap_interval(groups)
    assert (seven[1] - seven[0]) == pytest.approx((one[1] - one[0]) / 7**0.5, rel=0.05)
    assert bootstrap_interval(groups) == seven  # the bootstrap is deterministic
