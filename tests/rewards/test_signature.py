"""Rewards that TRL could not call, or whose logs could not be told apart, are refused before the first rollout."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

from trl_search.common.errors import UserError
from trl_search.rewards import BUILT_IN, resolve_rewards
from trl_search.rewards.declaration import with_settings
from trl_search.rewards.scores import checked
from trl_search.rewards.signature import check_calls, check_names

COLUMNS = ["prompt", "completion", "question", "golden_answers"]


def ones(completions: Any, **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def narrow(completions: Any) -> list[float]:
    return [1.0] * len(completions)


@functools.wraps(narrow)
def wide(completions: Any, **kwargs: Any) -> list[float]:
    return narrow(completions)


class Judge:
    def __call__(
        self, prompts: Any, completions: Any, *, question: Any, strict: bool = True, **kwargs: Any
    ) -> Any: ...


@pytest.mark.parametrize("reward", [ones, wide, Judge(), functools.partial(ones, scale=2), *BUILT_IN])
def test_what_trl_can_call_is_accepted(reward: Any) -> None:
    settings = SimpleNamespace(max_completion_length=64)
    check_calls([checked(with_settings(*resolve_rewards(reward), settings))], COLUMNS, "train_dataset")


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        (narrow, COLUMNS, r"'narrow' cannot be called .* unexpected keyword argument 'prompts'.*and \*\*kwargs for"),
        (Judge(), ["prompt"], "'Judge' cannot be called with the columns of train_dataset: missing .* 'question'"),
        (ones, [*COLUMNS, "completions"], "has the column 'completions', .*rename_column\\('completions', ...\\)"),
        (ones, [*COLUMNS, "trainer_state"], "has the column 'trainer_state'"),
    ],
)  # fmt: skip
def test_what_trl_cannot_call_is_named(reward: Any, columns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_calls([checked(reward)], columns, "train_dataset")


def test_two_rewards_of_one_name_are_refused() -> None:
    check_names([checked(ones), checked(wide), "org/judge"])
    for rewards in (
        [checked(lambda completions, **_: []), checked(lambda completions, **_: [])],
        [checked(wide), checked(narrow)],  # functools.wraps copies the name
        ["org/ones", checked(ones)],
    ):
        with pytest.raises(UserError, match=r"two rewards are called '.*', so the logs would mix them"):
            check_names(rewards)
