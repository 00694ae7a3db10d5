"""A random reward, as a control: if EM rises with it, the gain is not learning from the reward (arXiv:2506.10947).

PYTHONPATH=benchmarks trl-search train quickstart --reward_funcs random_reward.coin
"""

from __future__ import annotations

import random
from typing import Any


def coin(completions: list[Any], **columns: Any) -> list[float]:
    """0 or 1 with equal probability, independent of the completion."""
    return [float(random.random() < 0.5) for _ in completions]
