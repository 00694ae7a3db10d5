"""`MeteredPolicy`: another policy, and the share of the rollout in which most of its slots were idle (the bubble).

    requests under way   64 64 63 … 17 | 15 9 3 1 1 1
                                       └── bubble: a few trajectories hold the batch while the engine idles

A bubble of 0.05 says that the engine is nearly always busy. At 0.5, half of the rollout waits for its last
trajectories, and carrying those over to the next batch pays (docs/grpo.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Unpack

from trl_search.policies.base import Policy, Turn
from trl_search.types import Completion

# Below this share of its slots an engine counts as idle.
BUSY_SHARE = 0.25


class MeteredPolicy(Policy):
    """Passes every request on to `policy`, and measures how many are under way.

    Args:
        policy (`Policy`): What generates.
        slots (`int`): Requests that can be under way at once.
        clock (`Callable`, *optional*): Seconds; only differences count.

    Attributes:
        bubble (`float`): From `open` to `close`, the share of the time with fewer than a quarter of the slots busy.
    """

    def __init__(self, policy: Policy, *, slots: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._policy, self._clock = policy, clock
        self._needed = BUSY_SHARE * min(slots, policy.slots or slots)
        self._under_way = 0
        self._since = self._idle_s = self._total_s = 0.0

    async def open(self) -> None:
        await self._policy.open()
        self._since = self._clock()

    async def close(self) -> None:
        self._change(0)
        await self._policy.close()

    async def interrupt(self) -> None:
        await self._policy.interrupt()

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        self._change(1)
        try:
            return await self._policy.generate(prompt_ids, **turn)
        finally:
            self._change(-1)

    @property
    def bubble(self) -> float:
        return self._idle_s / self._total_s if self._total_s else 0.0

    def _change(self, more: int) -> None:
        """Counts the time since the last change, then the requests that came or went."""
        now = self._clock()
        self._total_s += now - self._since
        if self._under_way < self._needed:
            self._idle_s += now - self._since
        self._since = now
        self._under_way += more
