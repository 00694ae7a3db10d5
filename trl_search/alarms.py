"""Alarms on collapse: a run that stopped searching, stopped being rewarded or lost its language is named in the log.

Each rule compares the last few logs of a run with what the same run has been, so none needs to know the task. They
were set on recorded runs (`tests/data/histories.json`): silent on three healthy seeds, loud on a learning rate ten
times too high and on a format reward alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

WINDOW = 5  # logs that are averaged before anything is compared


def find_collapse(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What has collapsed in a run, by metric, in words. `history` holds its training logs, oldest first.

    Example:
        >>> find_collapse(trainer.state.log_history)
        {'search/searches': 'searches a trajectory fell from 1.7 to 0.1'}
    """
    found: dict[str, str] = {}
    for metric, name in (("search/searches", "searches a trajectory"), ("reward", "the reward")):
        means = _moving_means(history, metric)
        best = max(means, default=0.0)
        if best >= 0.1 and means[-1] < 0.3 * best:
            found[metric] = f"{name} fell from {best:.2g} to {means[-1]:.2g}"
    malformed = _moving_means(history, "search/malformed_calls")
    if malformed and malformed[-1] > 0.5:
        found["search/malformed_calls"] = f"{malformed[-1]:.2g} malformed calls a trajectory"
    entropy = _moving_means(history, "entropy")
    if entropy and entropy[-1] > max(0.3, 2 * min(entropy)):
        found["entropy"] = f"the policy's entropy rose from {min(entropy):.2g} to {entropy[-1]:.2g}"
    kl = _moving_means(history, "kl")
    if kl and kl[-1] > 1.0:
        found["kl"] = f"the policy is {kl[-1]:.2g} nats a token away from its reference"
    silent, reward = _moving_means(history, "frac_reward_zero_std"), _moving_means(history, "reward")
    if silent and silent[-1] > 0.99 and reward[-1] < 0.05:
        found["frac_reward_zero_std"] = "no group has two different rewards and none is rewarded: there is no gradient"
    return found


def _moving_means(history: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    values = [row[metric] for row in history if row.get(metric) is not None]
    return [sum(values[i : i + WINDOW]) / WINDOW for i in range(len(values) - WINDOW + 1)]


class CollapseAlarm(TrainerCallback):
    """Warns in the log, once for each thing that collapses."""

    def __init__(self) -> None:
        self.history: list[Mapping[str, Any]] = []
        self.told: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        self.history.append(dict(logs))
        for metric, what in find_collapse(self.history).items():
            if metric not in self.told and state.is_world_process_zero:
                self.told.add(metric)
                logger.warning("step %d: %s. Is the run collapsing? Look at its completions", state.global_step, what)
