"""Adapts TRL's rewards that read the first message of a completion, so that they read the last one.

A search agent's completion has several messages: call, reply, call, reply, answer. `think_format_reward` and similar
rewards read `completion[0]`, which is the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

FIRST_MESSAGE_REWARDS = ("think_format_reward", "accuracy_reward", "reasoning_accuracy_reward")


def reads_first_message(reward: Any) -> bool:
    """Whether the reward is one of TRL's that read only the first message."""
    module = getattr(reward, "__module__", None) or ""
    return module.startswith("trl.rewards") and getattr(reward, "__name__", "") in FIRST_MESSAGE_REWARDS


def of_last_message(reward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a reward so that it reads only the last message that the policy wrote.

    Example:
        >>> from trl.rewards import think_format_reward
        >>> SearchGRPOTrainer(..., reward_funcs=["em", of_last_message(think_format_reward)])
    """

    @functools.wraps(reward)
    def last(completions: Sequence[Any], **kwargs: Any) -> Any:
        spoken = [[one for one in completion if one.get("role") == "assistant"][-1:] for completion in completions]
        return reward(
            completions=[messages or [{"role": "assistant", "content": ""}] for messages in spoken], **kwargs
        )

    last.__module__ = __name__
    return last
