"""What a reward function declares: the dataset columns and settings it reads, and its default weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from trl_search.common.errors import UserError

Reward = Callable[..., Any]
RewardT = TypeVar("RewardT", bound=Reward)


def declare(
    *, required_columns: Sequence[str] = (), default_weight: float = 1.0, settings: Sequence[str] = ()
) -> Callable[[RewardT], RewardT]:
    """Marks a reward function with what it needs and its default weight. The function itself is unchanged.

    Args:
        required_columns (`Sequence[str]`, *optional*, defaults to `()`): Dataset columns that it takes as keywords.
        default_weight (`float`, *optional*, defaults to `1.0`):
            Its weight if `reward_weights` is not given. With 0 the reward is logged but not trained on.
        settings (`Sequence[str]`, *optional*, defaults to `()`):
            Keys of [`SearchGRPOConfig`] that the trainer passes to it as keywords.

    Example:
        >>> @declare(required_columns=["golden_answers"])
        ... def brevity(completions, golden_answers, **kwargs): ...
    """

    def mark(reward: RewardT) -> RewardT:
        declared = {"required_columns": tuple(required_columns), "settings": tuple(settings)}
        vars(reward).update(declared, default_weight=default_weight)
        return reward

    return mark


def required_columns(reward: Reward) -> tuple[str, ...]:
    """The dataset columns that a reward declares; none by default."""
    return tuple(getattr(reward, "required_columns", ()))


def with_settings(reward: Reward, config: Any) -> Reward:
    """The reward with its declared settings bound to the values of `config`; unchanged if it declares none."""
    names = getattr(reward, "settings", ())
    if not names:
        return reward
    bound = functools.partial(reward, **{name: getattr(config, name) for name in names})
    return functools.update_wrapper(bound, reward)


def default_weight(reward: Reward) -> float:
    """The weight that a reward declares; 1.0 by default."""
    return float(getattr(reward, "default_weight", 1.0))


def check_columns(rewards: Iterable[Reward], columns: Iterable[str]) -> None:
    """Raises a `UserError` if the dataset lacks a column that a reward needs."""
    present = set(columns)
    for reward in rewards:
        for column in required_columns(reward):
            if column not in present:
                raise missing_column(getattr(reward, "__name__", str(reward)), column, present)


def missing_column(reward: str, column: str, present: Iterable[str]) -> UserError:
    found = ", ".join(sorted(present)) or "none"
    return UserError(
        f"reward {reward!r} needs the dataset column {column!r}; the columns are: {found}. Add the column, or remove "
        "the reward from `reward_funcs`."
    )
