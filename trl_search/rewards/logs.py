"""Checks what a reward logs with TRL's `log_extra` and `log_metric`, whose mistakes would end or distort the log.

log_extra("judge", ["good", "bad"])     a column of the table of completions: one value per completion
log_metric("judge/length", 12.5)        a metric of the step
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trl_search.common.errors import UserError

# Columns of the table of completions, by TRL and by the rollout.
_COLUMNS = frozenset({"step", "prompt", "completion", "advantage", "stop_reason", "searches"})
# Metrics that alarms and reports read.
_METRICS = frozenset(
    {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "step_time", "kl", "entropy"}
    | {"reward", "reward_std", "frac_reward_zero_std"}
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
