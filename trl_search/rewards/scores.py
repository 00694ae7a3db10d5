"""Checks what a reward returns and logs.

scores                                  one per completion, each a finite number or `None`
log_extra("judge", ["good", "bad"])     a column of the table of completions: one value per completion
log_metric("judge/length", 12.5)        a metric of the step
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.rewards.declaration import Reward

LARGEST = 3e38  # TRL computes advantages in float32, where more is infinite
# Columns of the table of completions, by TRL and by the rollout.
_COLUMNS = frozenset({"step", "prompt", "completion", "advantage", "stop_reason", "searches"})
# Metrics that alarms and reports read.
_METRICS = frozenset(
    {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "step_time", "kl", "entropy"}
    | {"reward", "reward_std", "frac_reward_zero_std"}
)


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


def checked_logs(reward: str, count: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a reward for `count` completions, whose log functions check what they get.

    Raises:
        UserError: from the log functions; it names the reward.
    """
    wrappers = {"log_extra": _extra, "log_metric": _metric}
    found = {name: wrap(reward, count, arguments[name]) for name, wrap in wrappers.items() if name in arguments}
    return {**arguments, **found}


def _extra(reward: str, count: int, log: Callable[[str, list[Any]], None]) -> Callable[[str, Any], None]:
    def log_extra(column: str, values: Any) -> None:
        if column in _COLUMNS:
            raise UserError(f"reward {reward!r} logs the column {column!r}, which exists: choose another name")
        listed = values.tolist() if hasattr(values, "tolist") else values  # a tensor, or an array
        if not isinstance(listed, list | tuple) or len(listed) != count:
            raise UserError(
                f"reward {reward!r} logs {listed!r:.60} as the column {column!r}: give a list with one value per "
                f"completion, {count} here"
            )
        log(column, [value.item() if hasattr(value, "item") else value for value in listed])

    return log_extra


def _metric(reward: str, count: int, log: Callable[[str, float], None]) -> Callable[[str, Any], None]:
    def log_metric(name: str, value: Any) -> None:
        if name in _METRICS or name.startswith("rewards/"):
            raise UserError(f"reward {reward!r} logs the metric {name!r}, which exists: choose another name")
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, int | float):
            raise UserError(f"reward {reward!r} logs {value!r:.60} as the metric {name!r}: give a number")
        log(name, float(number))

    return log_metric
