"""A reward that knows nothing: what GRPO does with it is not learning (arXiv:2506.10947).

PYTHONPATH=benchmarks trl-search train quickstart --reward_funcs random_reward.coin
"""

from __future__ import annotations

import random
from typing import Any


def coin(completions: list[Any], **columns: Any) -> list[float]:
    """0 or 1 with equal chances, whatever was written."""
    return [float(random.random() < 0.5) for _ in completions]
