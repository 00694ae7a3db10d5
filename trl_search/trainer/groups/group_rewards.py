"""Computes the rewards of a group as soon as its trajectories have ended, and whether they give a gradient.

    rows, trajectories of a group ─► score_group ─► Group ─► has_gradient: keep it, or draw another question
    groups that were kept         ─► rewards_of ─► the rewards that TRL would compute over the whole batch

TRL's code calls the reward functions, so a function gets the usual arguments, but for the rows of one group instead of
the whole batch. What a function logs is stored with the group, and passed to TRL in the order of the rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import nanstd

from trl_search.rewards.weighted import deviations
from trl_search.trainer.replaced import replaced
from trl_search.types import Trajectory


@dataclass(frozen=True)
class Group:
    """The trajectories of one question, with their rewards. G: trajectories of the group; F: reward functions."""

    rows: Sequence[Mapping[str, Any]]
    trajectories: Sequence[Trajectory]
    rewards_GF: torch.Tensor  # NaN: no reward
    has_gradient: bool
    columns: Mapping[str, list[Any]]  # from the functions' calls of `log_extra`
    metrics: Mapping[str, list[float]]  # from their calls of `log_metric`


def score_group(
    trainer: Any, rows: Sequence[Mapping[str, Any]], trajectories: Sequence[Trajectory], trained: Sequence[bool]
) -> Group:
    """Calls the reward functions of a [`SearchGRPOTrainer`] on one group of this rank, without other ranks. `trained`:
    whether any token of each trajectory is in the loss."""
    columns: dict[str, list[Any]] = defaultdict(list)
    metrics: dict[str, list[float]] = defaultdict(list)
    with (
        replaced(grpo_trainer, "gather", lambda rewards_GF: rewards_GF),
        replaced(trainer, "_pending_extra_logs", columns),
        replaced(trainer, "_pending_metrics", metrics),
    ):
        rewards_GF: torch.Tensor = GRPOTrainer._calculate_rewards(
            trainer,
            rows,
            [row["prompt"] for row in rows],
            [trajectory.messages for trajectory in trajectories],
            [trajectory.ids for trajectory in trajectories],
        )
    adjust_rewards(rewards_GF, exceptions(trajectories), trainer)
    useful = has_gradient(rewards_GF, trainer.reward_weights, trainer.multi_objective_aggregation, trained)
    return Group(rows, trajectories, rewards_GF, useful, columns, metrics)


def exceptions(trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """(B, 2) booleans: whether a trajectory failed, and whether it called no tool."""
    return torch.tensor([[trajectory.failed, trajectory.calls == 0] for trajectory in trajectories])


def adjust_rewards(rewards_RF: torch.Tensor, exceptions_R2: torch.Tensor, trainer: Any) -> None:
    """In place: sets failed trajectories to NaN and, during `search_floor_steps`, caps those without a call at 0."""
    failed_R, unsearched_R = exceptions_R2.to(rewards_RF.device).T
    rewards_RF[failed_R] = torch.nan
    if trainer.model.training and trainer.state.global_step < trainer.args.search_floor_steps:
        rewards_RF[unsearched_R] = rewards_RF[unsearched_R].clamp(max=0)  # NaN stays


def has_gradient(rewards_GF: torch.Tensor, weights_F: torch.Tensor, aggregation: str, trained: Sequence[bool]) -> bool:
    """Whether any trajectory in the loss has a non-zero advantage, computed as TRL does.

    Example:
        >>> has_gradient(torch.tensor([[1.0], [0.0]]), torch.ones(1), "sum_then_normalize", [True, True])
        True
        >>> has_gradient(torch.tensor([[1.0], [1.0]]), torch.ones(1), "sum_then_normalize", [True, True])
        False
    """
    size = len(rewards_GF)
    if aggregation == "normalize_then_sum":  # normalised per function, so two that cancel still have a gradient
        one_by_one = deviations(rewards_GF.T.reshape(-1, 1), torch.ones(1), size)
        deviations_GF = one_by_one.view(-1, size).T
        rewards_GF = deviations_GF / (nanstd(deviations_GF, dim=0) + 1e-4)
    advantage_G = deviations(rewards_GF, weights_F, size).nan_to_num() != 0
    return bool((advantage_G & torch.tensor(trained, device=rewards_GF.device)).any())


def rewards_of(trainer: Any, groups: Sequence[Group]) -> torch.Tensor:
    """The rewards (R, F) of the kept groups of all ranks, as TRL's `_calculate_rewards` returns them.

    Every rank must call it. It also passes to TRL what the reward functions logged for these groups.
    """
    for name in sorted({name for group in groups for name in group.columns}):
        for group in groups:
            trainer._pending_extra_logs[name].extend(group.columns.get(name) or [None] * len(group.rows))
    for group in groups:
        for name, values in group.metrics.items():
            trainer._pending_metrics[name].extend(values)
    gathered: torch.Tensor = trainer.accelerator.gather(torch.cat([group.rewards_GF for group in groups]))
    return gathered
