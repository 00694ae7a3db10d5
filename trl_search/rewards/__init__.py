"""Reward functions and their registry (`registry.py` explains how to add your own)."""

from trl_search.rewards.built_in import (
    BUILT_IN,
    REFLECTION_CAP,
    em,
    f1,
    format,
    reflection,
    retrieval,
    soft_overlong_punishment,
)
from trl_search.rewards.declaration import Reward, check_columns, declare, default_weight, required_columns
from trl_search.rewards.last_message import of_last_message
from trl_search.rewards.registry import resolve_rewards

__all__ = [
    "BUILT_IN",
    "REFLECTION_CAP",
    "Reward",
    "check_columns",
    "declare",
    "default_weight",
    "em",
    "f1",
    "format",
    "of_last_message",
    "reflection",
    "required_columns",
    "resolve_rewards",
    "retrieval",
    "soft_overlong_punishment",
]
