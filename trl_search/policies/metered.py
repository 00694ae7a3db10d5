"""`MeteredPolicy`: wraps a policy and measures the bubble, the share of rollout time with most slots idle.

    requests in flight   64 64 63 … 17 | 15 9 3 1 1 1
                                       └── bubble: a few long trajectories delay the batch while the engine idles

With a bubble of 0.05, the engine is nearly always busy. With 0.5, half of the rollout waits for the last
trajectories, and carrying them over to the next batch saves time (docs/grpo.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Unpack

from trl_search.policies.base import Policy, Turn
from trl_search.types import Completion

# An engine counts as idle if a smaller share of its slots is busy.
BUSY_SHARE = 0.25


class MeteredPolicy(Policy):
    """Passes every request on to `policy`, and counts the requests in flight."""

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
        """The share of the time from `open` to `close` with fewer than a quarter of the slots busy."""
        return self._idle_s / self._total_s if self._total_s else 0.0

    def _change(self, more: int) -> None:
        """Adds up the time since the last change, then updates the number of requests."""
        now = self._clock()
        self._total_s += now - self._since
        if self._under_way < self._needed:
            self._idle_s += now - self._since
        self._since = now
        self._under_way += more
