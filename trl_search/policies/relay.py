"""`RelayPolicy`: one policy for trajectories that continue over several rollout batches and weight updates.

    batch 7   attach(engine, version=7)     "<think> the author of"            version 7 7 7 7
              detach() ─► interrupts the engine; new requests wait
              … the trainer takes a step, and the weights change …
    batch 8   attach(engine, version=8)     "<think> the author of Quiet …"    version 7 7 7 7 8 8 …

`rollout.py` continues an interrupted turn from its tokens so far. Each token keeps the log-prob and the version of the
weights with which it was sampled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from trl_search.policies.base import Policy, Turn
from trl_search.types import Completion


class RelayPolicy(Policy):
    """Passes requests on to the attached policy. While none is attached, requests wait. For use in one event loop."""

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._version = 0
        self._attached = asyncio.Event()
        self._under_way = 0
        self._proved = False

    async def attach(self, policy: Policy, version: int) -> None:
        """Opens `policy`, whose weights are of the optimizer step `version`, and passes requests on to it.

        Raises:
            UserError: if the policy cannot be interrupted. The first one is tested before it has any requests.
        """
        await policy.open()
        self._policy, self._version = policy, version
        if not self._proved:
            await policy.interrupt()
            self._proved = True
        self._attached.set()

    async def detach(self) -> None:
        """Stops passing requests on, interrupts those in flight, and closes the policy. Safe to call twice."""
        self._attached.clear()
        if self._policy is None:
            return
        try:
            while self._under_way:  # a request may reach the server after the first interruption
                await self._policy.interrupt()
        finally:
            policy, self._policy = self._policy, None
            await policy.close()

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        while not self._attached.is_set():
            await self._attached.wait()
        policy, version = self._policy, self._version
        assert policy is not None
        self._under_way += 1
        try:
            completion = await policy.generate(prompt_ids, **turn)
        finally:
            self._under_way -= 1
        return replace(completion, versions=(version,) * len(completion.ids))
