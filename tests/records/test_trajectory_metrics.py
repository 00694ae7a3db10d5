"""Metrics of drift, from a trajectory's queries and how it ends."""

from __future__ import annotations

import pytest

from trl_search.records.trajectory_metrics import idle_metrics, trajectory_metrics
from trl_search.types import Answer, Completion, FinishReason, Search, StopReason, Trajectory


def metrics(*actions, reason=StopReason.ANSWER, tokens=6):
    trajectory = Trajectory(prompt_ids=(1,))
    for action in actions:
        trajectory.act(Completion((2,) * tokens, (-0.1,) * tokens, FinishReason.EOS), text="so")
        trajectory.actions.append(action)
    trajectory.finish(reason)
    return trajectory_metrics(trajectory)


def test_shares_of_quoted_and_repeated_queries():
    seen = metrics(
        Search(('born "Mira Talvane"', "Quiet Raven")), Search((" quiet raven", "author's «name»")), Answer("x")
    )
    assert seen["search/quoted_queries"] == 0.5 and seen["search/repeated_queries"] == 0.25
    assert seen["tokens/per_turn"] == 6 and seen["search/no_answer"] == 0
    none = metrics(Answer("x"))
    assert none["search/quoted_queries"] == none["search/repeated_queries"] == 0


@pytest.mark.parametrize(
    ("reason", "counted"),
    [(StopReason.TOKEN_BUDGET, 1.0), (StopReason.RETRIEVAL_FAILED, 0.0), (StopReason.ENVIRONMENT_FAILED, 0.0)],
)
def test_a_trajectory_without_an_answer_is_counted_unless_its_retrieval_failed(reason, counted):
    assert metrics(Search(("a",)), reason=reason)["search/no_answer"] == counted


def test_metrics_without_meaning_for_the_environment_are_left_out():
    assert idle_metrics(["search"]) == {"tools/calls"} and idle_metrics(["search", "open"]) == set()
    assert "search/searches" in idle_metrics(["add"]) and "tools/calls" not in idle_metrics(["add"])
    assert {"search/searches", "tools/calls"} <= idle_metrics([])
