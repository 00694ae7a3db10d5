"""Runs groups of trajectories on an event loop, across batches.

    rollout 7   in progress: groups 1 2 3 4 5 6      complete first: 1 2 4 6  ─► the batch
                3 5 are parked: their searches continue while the trainer computes; their turns wait for new weights
    rollout 8   in progress: 3 5 and, new, 7 8 9 10  complete first: 3 7 8 10 ─► the batch

A batch takes the oldest complete groups. Each group taken is replaced by a new one, so the pool keeps its size. A slow
group becomes one of the oldest, so it is taken as soon as it is complete; none is starved.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from trl_search.common.event_loop import BackgroundLoop, LoopClosed
from trl_search.environment import Environment
from trl_search.policies.base import Policy
from trl_search.policies.relay import RelayPolicy
from trl_search.policies.thread_device import use_device
from trl_search.protocols import Protocol
from trl_search.rollout import Job, Limits, run_job
from trl_search.types import Sampling, Trajectory

Row = Mapping[str, Any]


@dataclass(eq=False)
class PooledGroup:
    """The trajectories of one question, which started together in rollout number `born`."""

    row: Row
    born: int
    members: list[asyncio.Task[Trajectory]]

    @property
    def whole(self) -> bool:
        return all(member.done() for member in self.members)

    @property
    def trajectories(self) -> list[Trajectory]:
        return [member.result() for member in self.members]


class TrajectoryPool:
    """Runs groups of trajectories across rollouts. Call its methods from the trainer's thread, one at a time. It opens
    and closes a copy of the environment, because evaluations between rollouts open and close the original.
    """

    def __init__(
        self,
        environment: Environment,
        protocol: Protocol,
        limits: Limits,
        *,
        group_size: int,
        max_staleness: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.environment = copy.copy(environment)
        self.groups: list[PooledGroup] = []  # in progress, or complete and not yet taken; oldest first
        self.rollout = 0  # the number of the current one
        self._protocol, self._limits = protocol, limits
        self._group_size, self._max_staleness, self._device = group_size, max_staleness, device
        self._loop = BackgroundLoop("carried-over trajectories")
        self._relay = RelayPolicy()
        self._ended = asyncio.Event()  # a trajectory has ended since `_take` last checked
        self._failure: BaseException | None = None
        self._started = 0
        self._open = False

    def attach(self, policy: Policy, version: int) -> None:
        """Lets trajectories generate with `policy`, which has the weights of optimizer step `version`."""
        self._loop.run(self._attach(policy, version))

    def detach(self) -> None:
        """Interrupts generation and closes the policy. Searches continue. Safe to call twice."""
        self._loop.run(self._relay.detach())

    def start(self, rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> None:
        """Starts one group per row."""
        self._loop.run(self._start(rows, prompts, sampling))

    def take(self, count: int, progress: str | None = None) -> list[PooledGroup]:
        """Waits until a batch of `count` complete groups can be taken, and removes it from the pool.

        Raises:
            Exception: the exception that ended a trajectory, such as that of a broken engine.
        """
        return self._loop.run(self._take(count, progress))

    def close(self) -> None:
        """Cancels all trajectories. Safe to call twice."""
        with contextlib.suppress(LoopClosed):
            self._loop.run(self._end())
        self._loop.close()

    # On the pool's event loop

    async def _attach(self, policy: Policy, version: int) -> None:
        if not self._open:
            if self._device is not None:
                use_device(self._device)
            await self.environment.open()
            self._open = True
        await self._relay.attach(policy, version)

    async def _start(self, rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> None:
        for row, prompt in zip(rows, prompts, strict=True):
            members = []
            for member in range(self._group_size):
                job = Job(prompt, row, key=f"{self._started}/{member}")
                running = run_job(job, self._relay, self.environment, self._protocol, self._limits, sampling)
                members.append(asyncio.create_task(running))
                members[-1].add_done_callback(self._note_end)
            self.groups.append(PooledGroup(row, self.rollout, members))
            self._started += 1

    def _note_end(self, member: asyncio.Task[Trajectory]) -> None:
        if not member.cancelled() and member.exception() is not None:
            self._failure = member.exception()
        self._ended.set()

    async def _take(self, count: int, progress: str | None) -> list[PooledGroup]:
        with tqdm(total=count, desc=progress, unit="group", delay=2, leave=False, disable=not progress or None) as bar:
            while True:
                if self._failure is not None:
                    raise self._failure
                taken = self.takeable(count)
                if taken is not None:
                    break
                bar.n = min(count, sum(group.whole for group in self.groups))
                bar.refresh()
                self._ended.clear()
                await self._ended.wait()
        self.groups = [group for group in self.groups if group not in taken]
        self.rollout += 1
        return taken

    def takeable(self, count: int) -> list[PooledGroup] | None:
        """The oldest `count` complete groups; None if there are fewer, or if an old group must be waited for."""
        taken = [group for group in self.groups if group.whole][:count]
        if len(taken) < count:
            return None
        if self._max_staleness is not None:
            left = [group for group in self.groups if group not in taken]
            for later in range(self._max_staleness):
                # The groups due within `later` rollouts must fit into those rollouts' batches.
                due = sum(group.born + self._max_staleness <= self.rollout + later for group in left)
                if due > later * count:
                    return None
        return taken

    async def _end(self) -> None:
        members = [member for group in self.groups for member in group.members]
        for member in members:
            member.cancel()
        await asyncio.gather(*members, return_exceptions=True)
        await self._relay.detach()
        if self._open:
            self._open = False
            await self.environment.close()
