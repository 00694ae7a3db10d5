"""Replaces groups without a gradient by other questions while the batch runs (`refill_groups`).

    index   group 0          group 1                         refill_groups: 2
            1 0 0 1  keep    0 0 0 0  no gradient
                             └─► round 1: 1 1 1 1  no gradient
                                          └─► round 2: 0 1 1 0  keep

This is DAPO's dynamic sampling (arXiv:2503.14476), with two differences. A group is replaced as soon as it has ended,
while other groups still run, so no rank waits for another. The number of rounds is bounded: after the last one, the
group is kept whatever its rewards. The replacement of each group in each round is drawn before the batch begins
(`question_choice.py`), so a resumed run uses the same ones.
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
    """Replaces each group of one batch on this rank until it has a gradient.

    The trajectory at index `p` in round `r` has the number `r * len(batch.rows) + p`.
    """

    def __init__(self, batch: Rollout, *, group_size: int, score: Score, finished: Mapping[int, Trajectory]) -> None:
        self.batch, self.group_size, self._score, self._finished = batch, group_size, score, finished
        places = range(len(batch.rows) // group_size)
        self.rounds: list[list[Group]] = [[] for _ in places]  # per place: the groups that were tried
        self._ended: list[dict[int, Trajectory]] = [{} for _ in places]  # per place: of the group that runs
        self._scoring = asyncio.Lock()  # reward functions need not be thread-safe

    async def more(self, number: int, trajectory: Trajectory) -> dict[int, Job]:
        """`more` of [`run_batch`]: the replacement, if this trajectory completes a group without a gradient."""
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
        """After the rollout, puts the kept groups into the batch and the others into `batch.replaced`."""
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
        """The metrics of refill, over the groups of all ranks. Every rank must call it.

        `reward_before` is the mean reward before replacement; the reward of the batch is biased by the selection.
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
