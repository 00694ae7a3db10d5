"""`CarriesOver`: a batch closes when enough groups are complete; unfinished trajectories continue in later batches.

    carry_over: 1.5     one process: generation pauses while the trainer computes; searches continue
    max_staleness: 1    a server: generation continues while the trainer computes

Each token keeps its log-prob at sampling time and the version of the weights that sampled it. The loss applies an
importance ratio per token (`loss/importance.py`). A batch has only complete groups, so advantages are relative to all
members of a group. docs/grpo.md describes the effect on the estimator.

A checkpoint stores the questions of the groups in progress, and a resumed run starts them again: continuing a partial
trajectory would need the state of the user's environment, and its tokens come from older weights.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from pyarrow import parquet
from transformers import Trainer

from trl_search.common.errors import UserError
from trl_search.common.files import written_whole
from trl_search.config.carry_over import carries_over, groups_under_way
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import Environment
from trl_search.policies.metered import MeteredPolicy
from trl_search.protocols import Protocol
from trl_search.trainer.batch import Rollout
from trl_search.trainer.groups.trajectory_pool import PooledGroup, Row, TrajectoryPool
from trl_search.trainer.prompts import encode_prompts
from trl_search.trainer.resume import checkpoint_folder
from trl_search.types import Sampling

FILE = "unfinished_questions.parquet"
# The metrics distinguish token ages up to this one; it includes older tokens.
OLDEST_AGE = 3


class CarriesOver(Trainer):
    """A mixin whose trajectories may continue after their batch. List it before TRL's trainer."""

    args: SearchGRPOConfig
    environment: Environment | None
    protocol: Protocol
    model: Any
    train_dataset: Any
    pool: TrajectoryPool | None = None
    _asked_again: Sequence[Row] = ()  # the questions in progress in the checkpoint that is resumed
    _engine: contextlib.ExitStack | None = None  # set while an engine serves the pool

    @property
    def carries_over(self) -> bool:
        """Whether training batches are rolled out by [`carry_over_rollout`]."""
        return self.environment is not None and carries_over(self.args)

    @property
    def acting_environment(self) -> Environment | None:
        """The environment of the trajectories of the latest rollout."""
        return self.pool.environment if self.pool is not None and self.model.training else self.environment

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.end_pool()

    def carry_over_rollout(self, batch: Rollout, sampling: Sampling) -> None:
        """Fills the batch with complete groups: replaces `batch.rows` in place, and sets `batch.trajectories`.

        Every rank must call it. The groups in `batch.rows` start now.
        """
        size = self.args.num_generations or 1
        pool = self.pool = self.pool or TrajectoryPool(
            self.environment,  # type: ignore[arg-type]
            self.protocol,
            self.args.agent.limits,
            group_size=size,
            max_staleness=self.args.max_staleness or None,
            device=self.accelerator.device,
        )
        rows = [*self._asked_again, *batch.rows[::size]]
        rows += self._drawn(groups_under_way(self.args) - len(pool.groups) - len(rows))
        self._asked_again = ()
        prompts = encode_prompts([row["prompt"] for row in rows], self.protocol)
        self.release_engine()
        engine = contextlib.ExitStack()
        longest = [*prompts, *encode_prompts([group.row["prompt"] for group in pool.groups], self.protocol)]
        policy = engine.enter_context(self.generation_policy(longest))  # type: ignore[attr-defined]
        self._engine = engine
        metered = MeteredPolicy(policy, slots=size * groups_under_way(self.args))
        step = self.state.global_step
        pool.attach(metered, step)
        pool.start(rows, prompts, sampling)
        taken = pool.take(len(batch.rows) // size, f"Rollout, train step {step}")
        if not self.args.max_staleness:
            self.release_engine()
        batch.rows[:] = [dict(group.row) for group in taken for _ in range(size)]
        batch.trajectories = [trajectory for group in taken for trajectory in group.trajectories]
        batch.prompt_ids = [trajectory.prompt_ids for trajectory in batch.trajectories]
        batch.metrics |= {"rollout/bubble": metered.bubble, **carry_over_metrics(taken, pool, step)}

    def release_engine(self) -> None:
        """Detaches the engine from the pool before its weights change or others use it. Every rank must call it."""
        if self._engine is None:
            return
        assert self.pool is not None
        self.pool.detach()
        self.accelerator.wait_for_everyone()  # no weight may change while another rank generates
        engine, self._engine = self._engine, None
        engine.close()

    def _drawn(self, count: int) -> list[Row]:
        """Random questions that fill the pool beyond those of the batch."""
        name = f"{self.args.seed}/carry-over/{self.state.global_step}/{self.accelerator.process_index}"
        draw, questions = random.Random(name), len(self.train_dataset)
        return [self.train_dataset[draw.randrange(questions)] for _ in range(count)]

    def end_pool(self) -> None:
        pool, self.pool = self.pool, None
        engine, self._engine = self._engine, None
        try:
            if pool is not None:
                pool.close()
        finally:
            if engine is not None:
                engine.close()

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.pool is not None:
            rows = gather_object([group.row for group in self.pool.groups])  # rank by rank
            if self.args.should_save:
                table = Dataset.from_list([dict(row) for row in rows], features=self.train_dataset.features)
                with written_whole(checkpoint_folder(self, trial) / FILE) as path:
                    parquet.write_table(table.data.table, path)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._asked_again = ()
        if checkpoint is not None and self.carries_over and (path := Path(checkpoint, FILE)).is_file():
            rows = parquet.read_table(path).to_pylist()
            rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
            self._asked_again = rows[len(rows) * rank // ranks : len(rows) * (rank + 1) // ranks]


def carry_over_metrics(taken: Sequence[PooledGroup], pool: TrajectoryPool, step: int) -> dict[str, float]:
    """The metrics of a batch on this rank."""
    ages = [
        min(step - version, OLDEST_AGE)
        for group in taken
        for trajectory in group.trajectories
        for version, sampled in zip(trajectory.versions, trajectory.mask, strict=True)
        if sampled
    ]
    return {
        "carry_over/parked": float(sum(not member.done() for group in pool.groups for member in group.members)),
        "carry_over/batches_waited": sum(pool.rollout - 1 - group.born for group in taken) / len(taken),
        **{f"carry_over/tokens_age_{age}": ages.count(age) / max(1, len(ages)) for age in range(OLDEST_AGE + 1)},
    }


def refuse_streams(dataset: Any) -> None:
    """Raises `UserError` for a streamed dataset, from which carry-over cannot draw further questions."""
    if isinstance(dataset, IterableDataset):
        raise UserError(
            "carry_over and max_staleness draw more questions than a batch has, but train_dataset is a stream: load "
            "it without streaming"
        )
