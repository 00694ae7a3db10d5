"""A reward must return one finite score or `None` per completion; anything else is named at the first step."""

from __future__ import annotations

import asyncio
import functools

import numpy
import pytest
import torch

from trl_search.common.errors import UserError
from trl_search.rewards import em
from trl_search.rewards.scores import check_scores, checked


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "returned None: return a list with one score per completion, 2 here"),
        (0.5, "returned 0.5: return a list"),
        ("ab", "returned 'ab': return a list"),
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0, 0.0, 1.0], "returned 3 scores for 2 completions"),
        ([1.0, float("nan")], "returned nan for completion 1: return a finite number, or None"),
        ([float("inf"), 1.0], "returned inf for completion 0"),
        ([1.0, 1e39], "returned 1e\\+39 for completion 1"),
        ([1.0, "1.0"], "returned '1.0' for completion 1"),
        ([[1.0], [0.0]], r"returned \[1.0\] for completion 0"),
    ],
)
def test_invalid_scores_are_named(scores: object, message: str) -> None:
    with pytest.raises(UserError, match=f"^reward 'mine' {message}"):
        check_scores("mine", scores, 2)


def test_every_kind_of_number_is_accepted() -> None:
    assert check_scores("mine", [1, None], 2) == [1.0, None]
    assert check_scores("mine", (True, numpy.float32(0.5)), 2) == [1.0, 0.5]
    assert check_scores("mine", torch.tensor([0.25, 1.0]), 2) == [0.25, 1.0]
    assert check_scores("mine", [torch.tensor(2.0), 1], 2) == [2.0, 1.0]


def test_a_checked_reward_keeps_its_name_and_attributes() -> None:
    reward = checked(em)
    assert reward.__name__ == "em" and reward.required_columns == em.required_columns

    assert checked(functools.partial(em, scale=2)).__name__ == "em"
    named = functools.partial(em, scale=2)
    named.__name__ = "twice"  # type: ignore[attr-defined]
    assert checked(named).__name__ == "twice"

    class Short:
        async def __call__(self, completions, **kwargs):
            return [1.0]

    later = checked(Short())
    assert later.__name__ == "Short" and asyncio.iscoroutinefunction(later)
    with pytest.raises(UserError, match="reward 'Short' returned 1 scores for 2"):
        asyncio.run(later(prompts=[], completions=["a", "b"]))
