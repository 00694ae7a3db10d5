"""Groups without a gradient are replaced by other questions while the batch runs (`refill_groups`).

    place   group 0          group 1                         refill_groups: 2
            1 0 0 1  keep    0 0 0 0  no gradient
                             └─► round 1: 1 1 1 1  no gradient
                                          └─► round 2: 0 1 1 0  keep

This is the dynamic sampling of DAPO (arXiv:2503.14476), with two differences. Each place in the batch draws for itself
as soon as its group has ended, while other groups still run, so no rank waits for another. And the number of rounds is
bounded: after the last one the group stays, whatever its rewards are. Which question a place draws in a round is
settled before the batch begins (`question_choice.py`), so a resumed run draws the same ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from trl_search.rewards.weighted import weighted_rewards
from trl_search.rollout import Job
from trl_search.trainer.batch import Rollout
from trl_search.trainer.groups.group_rewards import Group
from trl_search.types import Trajectory

Score = Callable[[Sequence[Mapping[str, Any]], Sequence[Trajectory]], Group]


class Refill:
    """
    The groups of one batch on this rank, each in its place, replaced until one has a gradient.

    The trajectory at place `p` of round `r` is number `r * len(batch.rows) + p` of the rollout.

    Args:
        batch ([`Rollout`]): With its rows and prompts, and the spare ones that replace them.
        group_size (`int`): Trajectories per group.
        score (`Callable`): Makes a [`Group`] of the rows and trajectories of one that has ended; runs on a thread.
        finished (`Mapping[int, Trajectory]`): By number, what an earlier process finished.
    """

    def __init__(self, batch: Rollout, *, group_size: int, score: Score, finished: Mapping[int, Trajectory]) -> None:
        self.batch, self.group_size, self._score, self._finished = batch, group_size, score, finished
        places = range(len(batch.rows) // group_size)
        self.rounds: list[list[Group]] = [[] for _ in places]  # by place: the groups that were tried
        self._ended: list[dict[int, Trajectory]] = [{} for _ in places]  # by place, of the group that runs
        self._scoring = asyncio.Lock()  # reward functions are not asked to be safe on several threads

    async def more(self, number: int, trajectory: Trajectory) -> dict[int, Job]:
        """`more` of [`run_batch`]: the trajectories that replace the group that this one has completed."""
        size, total = self.group_size, len(self.batch.rows)
        tried, place = number // total, number % total // size
        ended = self._ended[place]
        ended[number % size] = trajectory
        if len(ended) < size:
            return {}
        self._ended[place] = {}
        rows: Sequence[Mapping[str, Any]] = self.batch.rows[place * size : (place + 1) * size]
        if tried:
            rows = [self.batch.spare[tried - 1][place].row] * size
        async with self._scoring:
            group = await asyncio.to_thread(self._score, rows, [ended[member] for member in range(size)])
        self.rounds[place].append(group)
        if group.has_gradient or tried == len(self.batch.spare):
            return {}
        question = self.batch.spare[tried][place]
        first = (tried + 1) * total + place * size
        return {
            n: Job(question.prompt_ids, question.row, key=str(n), finished=self._finished.get(n))
            for n in range(first, first + size)
        }

    def settle(self) -> None:
        """Once the rollout is over, puts the groups that are trained on into the batch, and sets the others aside."""
        batch, size = self.batch, self.group_size
        for place, groups in enumerate(self.rounds):
            here = slice(place * size, (place + 1) * size)
            batch.rows[here] = [dict(row) for row in groups[-1].rows]
            batch.trajectories[here] = groups[-1].trajectories
            batch.prompt_ids[here] = [trajectory.prompt_ids for trajectory in groups[-1].trajectories]
            batch.groups.append(groups[-1])
            batch.replaced[place] = groups[:-1]
            batch.asked_first.extend(groups[0].trajectories)

    def metrics(self, accelerator: Accelerator, weights_F: torch.Tensor) -> dict[str, float]:
        """What refilling did, over the groups of all ranks. Every rank calls it.

        `reward_before` is the mean reward of the questions that were drawn first: the reward of the batch is that of
        groups chosen for their rewards.
        """
        rows = []
        for groups in self.rounds:
            first, kept, rounds = groups[0], groups[-1], len(groups) - 1
            reward = weighted_rewards(first.rewards_GF, weights_F).nanmean().item()
            rows.append([float(first.has_gradient), float(kept.has_gradient), float(rounds), reward])
        table = accelerator.gather(torch.tensor(rows, device=accelerator.device))  # (groups, 4)
        before, after, rounds, reward = table.T
        return {
            "refill/gradient_before": before.mean().item(),
            "refill/gradient_after": after.mean().item(),
            "refill/extra_trajectories": rounds.sum().item() * self.group_size,
            "refill/rounds": rounds.max().item(),
            "refill/reward_before": reward.nanmean().item(),
        }
