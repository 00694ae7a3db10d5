"""Checks before the first rollout that TRL can call each reward, and that the logs can tell them apart.

    reward(prompts=, completions=, completion_ids=, <columns>, trainer_state=, log_extra=, log_metric=)

A function without `**kwargs`, or with a parameter that no column fills, would otherwise fail after the first rollout.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.rewards.scores import reward_name

# What TRL passes besides the columns of the dataset.
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL does not pass.
_NOT_PASSED = {"prompt", "completion"}


def check_calls(rewards: Iterable[Any], columns: Iterable[str], dataset: str) -> None:
    """Checks that every reward accepts TRL's arguments and the columns of a dataset.

    Raises:
        UserError: names the reward and the parameter, or the column.
    """
    present = set(columns)
    if taken := present & set(TRL_ARGUMENTS):
        name = min(taken)
        raise UserError(
            f"{dataset} has the column {name!r}, but TRL passes an argument of this name to the rewards: rename it, "
            f"dataset.rename_column({name!r}, ...)"
        )
    for reward in filter(callable, rewards):
        given = [*TRL_ARGUMENTS, *sorted(present - _NOT_PASSED)]
        try:
            # A user's wrapper may take other arguments than the function that it names with functools.wraps.
            signature = inspect.signature(getattr(reward, "__wrapped__", reward), follow_wrapped=False)
        except (TypeError, ValueError):  # some callables have none
            continue
        try:
            signature.bind(**dict.fromkeys(given))
        except TypeError as error:
            raise UserError(
                f"reward {reward_name(reward)!r} cannot be called with the columns of {dataset}: {error}. It gets "
                f"{', '.join(given)}, each by its name: let it take those that it reads, and **kwargs for the others"
            ) from error


def names_in_logs(rewards: Sequence[Any]) -> list[str]:
    """The names of rewards in TRL's metrics; a string is the name of a reward model."""
    return [
        reward.rstrip("/").split("/")[-1] if isinstance(reward, str) else reward_name(reward) for reward in rewards
    ]


def check_names(rewards: Sequence[Any]) -> None:
    """Refuses two rewards of one name, whose means would be averaged in the logs."""
    names = names_in_logs(rewards)
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"two rewards are called {min(repeated)!r}, so the logs would mix them: give one another name, "
            "reward.__name__ = '...', or leave it out"
        )
