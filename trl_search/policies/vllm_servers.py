"""Several vLLM servers as one policy. A trajectory stays on the server that has its tokens (`homes.py`).

A request carries all tokens of its trajectory, so any server can continue it. A lost server gets no more trajectories
until the policy is opened again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Unpack

from trl_search.policies.base import Policy, Turn
from trl_search.policies.homes import Homes
from trl_search.policies.vllm_server import ServerLost, VLLMServerPolicy
from trl_search.types import Completion

logger = logging.getLogger(__name__)


class VLLMServersPolicy(Policy):
    """Spreads trajectories over several servers. It works as long as one of them answers.

    Args:
        servers (`Sequence[VLLMServerPolicy]`): One policy per server. Their `patience_s` is how long the trajectories
            of a lost server wait before they move to another one.

    Example:
        ```python
        urls = ["http://gpu-1:8000", "http://gpu-2:8000"]
        policy = VLLMServersPolicy([VLLMServerPolicy(url, patience_s=5) for url in urls])
        ```
    """

    def __init__(self, servers: Sequence[VLLMServerPolicy]) -> None:
        self._servers = list(servers)
        self._well: list[VLLMServerPolicy] = []
        self._last_loss: ServerLost
        self._homes: Homes[VLLMServerPolicy] = Homes()

    async def open(self) -> None:
        opened = await asyncio.gather(*(server.open() for server in self._servers), return_exceptions=True)
        self._well = []
        for server, error in zip(self._servers, opened, strict=True):
            if error is None:
                self._well.append(server)
            elif isinstance(error, ServerLost):
                logger.warning("Continuing without one server: %s.", error.said)
            else:
                await self.close()
                raise error
        if not self._well:
            await self.close()
            lost = [error.said for error in opened if isinstance(error, ServerLost)]
            raise ServerLost("; ".join(lost), "start them again, then resume from the last checkpoint")

    async def close(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers))

    async def interrupt(self) -> None:
        asked = [(server, asyncio.create_task(server.interrupt())) for server in self._well]
        for server, interruption in asked:
            try:
                await interruption
            except ServerLost as error:
                self._leave_out(server, error)
        if not self._well:
            raise self._last_loss

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        while self._well:
            server = self._homes.choose(self._well)
            try:
                return await server.generate(prompt_ids, **turn)
            except ServerLost as error:
                self._leave_out(server, error)
        raise self._last_loss

    def _leave_out(self, server: VLLMServerPolicy, error: ServerLost) -> None:
        if server in self._well:
            self._well.remove(server)
            self._last_loss = error
            if self._well:
                logger.warning("Continuing with %s: %s.", _counted(len(self._well)), error.said)


def _counted(servers: int) -> str:
    return "one server" if servers == 1 else f"{servers} servers"
