"""Checks that a reward returned one score per completion, each a finite number or `None`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.rewards.declaration import Reward
from trl_search.rewards.logs import checked_logs

LARGEST = 3e38  # TRL computes advantages in float32, where more is infinite


def checked(reward: Reward) -> Reward:
    """Wraps a reward so that its scores are checked at each call.

    Without the check, TRL silently treats NaN as "no score" and lets infinity into the advantages.
    """
    name = reward_name(reward)

    async def score_later(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        count = len(completions)
        scores = await reward(*args, completions=completions, **checked_logs(name, count, kwargs))
        return check_scores(name, scores, count)

    def score(*args: Any, completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        count = len(completions)
        scores = reward(*args, completions=completions, **checked_logs(name, count, kwargs))
        return check_scores(name, scores, count)

    later = inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__)
    wrapped = functools.update_wrapper(score_later if later else score, reward)
    wrapped.__name__ = name
    return wrapped


def reward_name(reward: Reward) -> str:
    """The name in the logs. A `functools.partial` without one has that of its function."""
    while isinstance(reward, functools.partial) and not hasattr(reward, "__name__"):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def check_scores(name: str, scores: Any, count: int) -> list[float | None]:
    """The scores as a list of numbers; `None` gives a completion no score.

    Raises:
        UserError: if there are not `count` scores, or a score is not a finite number.

    Example:
        >>> check_scores("brevity", [0.5, None, float("nan")], 3)
        UserError: reward 'brevity' returned nan for completion 2: return a finite number, or None to leave it out
    """
    listed = scores.tolist() if hasattr(scores, "tolist") else scores  # a tensor, or an array
    if not isinstance(listed, list | tuple):
        raise UserError(
            f"reward {name!r} returned {scores!r:.60}: return a list with one score per completion, {count} here"
        )
    if len(listed) != count:
        raise UserError(
            f"reward {name!r} returned {len(listed)} scores for {count} completions: return one per completion"
        )
    return [_number(name, index, score) for index, score in enumerate(listed)]


def _number(name: str, index: int, score: Any) -> float | None:
    if score is None:
        return None
    value = score.item() if hasattr(score, "item") else score
    if isinstance(value, int | float) and abs(value) < LARGEST:  # NaN is not
        return float(value)
    raise UserError(
        f"reward {name!r} returned {score!r:.60} for completion {index}: return a finite number, or None to leave "
        "it out"
    )
