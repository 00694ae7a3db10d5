"""`Rollout`: the state of one generation batch, passed from one seam of the trainer to the next.

TRL calls the seams in turn and gives each only a part of the batch. An earlier seam stores here what a later one
needs; nothing else is kept between them. `trainer.last_rollout` is the latest batch, for callers to read.
`MicroBatch` is the same for one call of the loss. The functions sample, check and measure a whole batch.

Suffixes of tensors: B trajectories of this rank, C completion tokens, R trajectories of all ranks, F reward functions.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from trl_search.common.errors import UserError
from trl_search.config.agent import AgentSettings
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.protocols.instructions import tool_names
from trl_search.records.trajectory_log import Replaced
from trl_search.records.trajectory_metrics import idle_metrics, trajectory_metrics
from trl_search.retrieval.base import RetrievalError, merge_metrics
from trl_search.types import Sampling, StopReason, Trajectory

if TYPE_CHECKING:
    from trl_search.trainer.groups.group_rewards import Group

logger = logging.getLogger(__name__)

# Keys of the agent that are read for every batch.
_LENGTHS = {"max_completion_length", "max_turn_length", "max_observation_length"}


@dataclass(frozen=True)
class Question:
    """A row of the dataset and its prompt."""

    row: Mapping[str, Any]
    prompt_ids: tuple[int, ...]


@dataclass
class Laps:
    """Seconds per part of a step; each part begins when the one before it ends. Repeated parts are summed."""

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def end(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._began
        self._began = now


@dataclass
class Rollout:
    """One generation batch on this rank. Lists have one entry per trajectory, in the order of the rows.

    `_rollout` sets each field, and TRL and later seams read it, unless said otherwise. When refill replaces questions,
    it also replaces `rows` and the fields that depend on them.
    """

    rows: list[dict[str, Any]]  # set by `_generate_and_score_completions`, as are counted_rows and spare
    counted_rows: int | None = None  # in an evaluation: rows of all ranks that do not only fill the batch; None: all
    prompt_ids: list[tuple[int, ...]] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    loss_masks: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)  # at sampling time
    metrics: dict[str, float] = field(default_factory=dict)  # `_generate` logs their means over all ranks
    laps: Laps = field(default_factory=Laps)  # every seam ends one; `_generate_and_score_completions` logs them
    rewards_RF: torch.Tensor | None = None  # set by `_calculate_rewards`, for the trajectory log; NaN: no reward
    spare: list[list[Question]] = field(default_factory=list)  # questions for refill, by round and group
    groups: list[Group] = field(default_factory=list)  # with refill, as are the next two
    replaced: dict[int, list[Group]] = field(default_factory=dict)  # by the index of their group
    # Before the selection by reward: metrics describe the policy, so `_generate` uses these.
    asked_first: list[Trajectory] = field(default_factory=list)

    @property
    def possible_prompts(self) -> list[tuple[int, ...]]:
        """The prompts of the batch and of the spare questions."""
        return [*self.prompt_ids, *(question.prompt_ids for questions in self.spare for question in questions)]

    @property
    def replaced_trajectories(self) -> list[Replaced]:
        """The trajectories that refill replaced: logged, but not in the loss."""
        return [
            Replaced(
                place * len(group.trajectories) + member, group.rows[member], trajectory, group.rewards_GF[member]
            )
            for place, groups in self.replaced.items()
            for group in groups
            for member, trajectory in enumerate(group.trajectories)
        ]

    @property
    def loss_mask_BC(self) -> torch.Tensor:
        """The loss masks as one tensor, padded with 0."""
        return pad_sequence([torch.tensor(mask) for mask in self.loss_masks], batch_first=True)

    def for_trl(self) -> dict[str, list[Any]]:
        """The result of `rollout_func`. TRL calls the loss mask `env_mask` here and `tool_mask` afterwards."""
        return {
            "prompt_ids": [list(ids) for ids in self.prompt_ids],
            "completion_ids": [trajectory.ids for trajectory in self.trajectories],
            "logprobs": self.logprobs,
            "env_mask": self.loss_masks,
        }


@dataclass
class MicroBatch:
    """The state of one call of the loss, shared by the seams that TRL calls in it.

    `inputs` is a copy of TRL's dictionary, to which a seam may add entries that TRL then reads. `runs_BC` is the loss
    mask with 0 for trajectories that are not run, because they cannot change the weights.
    """

    inputs: dict[str, Any]
    loss_mask_BC: torch.Tensor
    runs_BC: torch.Tensor
    logps_BC: torch.Tensor | None = None  # of the policy in training; None before the training forward

    @property
    def old_logps_BC(self) -> torch.Tensor:
        """Log-probs at sampling time. With one optimizer step per batch: the training log-probs, detached."""
        assert self.logps_BC is not None, "the training forward has not run"
        old_BC: torch.Tensor = self.inputs.get("old_per_token_logps", self.logps_BC.detach())
        return old_BC

    def with_old_logps(self, logps_BC: torch.Tensor) -> torch.Tensor:
        """`logps_BC`, with the old log-probs, if there are any, for trajectories that were not run: their ratio is
        1."""
        old_BC = self.inputs.get("old_per_token_logps")
        return logps_BC if old_BC is None else torch.where(self.runs_BC.any(dim=1, keepdim=True), logps_BC, old_BC)


def sampling_of(args: SearchGRPOConfig, name: str) -> Sampling:
    """The sampling parameters of one generation; its seed depends on `args.seed` and `name` only."""
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p or 0.0,
        seed=int.from_bytes(f"{args.seed}/{name}".encode(), "big"),
    )


def check_unchanged(args: SearchGRPOConfig, at_the_start: AgentSettings, temperature: float, environment: Any) -> None:
    """Checks that no key was changed that is read only when the trainer is built. Lengths may change.

    Raises:
        UserError: names the key.
    """
    if args.temperature != temperature:
        raise UserError(
            f"args.temperature was changed from {temperature} to {args.temperature} after the trainer was built, but "
            f"the loss would still compute log-probs at {temperature}: leave it as it is, or build another trainer"
        )
    for name, before in dataclasses.asdict(at_the_start).items():
        now = getattr(args, name)
        if now in (before, getattr(environment, name, before)) or name in _LENGTHS:
            continue
        remedy = f"set trainer.environment.{name}, too" if hasattr(environment, name) else "build another trainer"
        raise UserError(
            f"args.{name} was changed from {before!r:.60} to {now!r:.60} after the trainer was built, but its "
            f"environment and protocol have the first: leave it as it is, or {remedy}"
        )


def check_failures(trajectories: Sequence[Trajectory], max_failed_share: float) -> None:
    """Stops the run if too many trajectories failed, and warns of fewer. Every rank calls it, so all stop at the same
    step.

    Raises:
        RetrievalError: if more than `max_failed_share` of the trajectories of all ranks failed, most of them because
            of retrieval.
        UserError: the same, if most failed because of the environment.
    """
    local = [(trajectory.stop_reason, trajectory.error) if trajectory.failed else None for trajectory in trajectories]
    outcomes = gather_object(local)
    failed = [outcome for outcome in outcomes if outcome is not None]
    if len(failed) <= max_failed_share * len(outcomes):
        if failed and PartialState().is_main_process:
            logger.warning(
                "%d of %d trajectories failed and are left out of the loss; the first error: %s",
                len(failed), len(outcomes), failed[0][1],
            )  # fmt: skip
        return
    searches = [error for reason, error in failed if reason is StopReason.RETRIEVAL_FAILED]
    others = [error for reason, error in failed if reason is not StopReason.RETRIEVAL_FAILED]
    kinds = [("retrieval", searches, RetrievalError), ("the environment", others, UserError)]
    (what, errors, kind), (less, rarer, _) = sorted(kinds, key=lambda one: -len(one[1]))
    also = f" and {less} for {len(rarer)}, together" if rarer else ","
    raise kind(
        f"{what} failed for {len(errors)} of {len(outcomes)} trajectories{also} more than "
        f"max_failed_share={max_failed_share}; the first error: {errors[0]}"
    )


def rollout_metrics(batch: Rollout, environment: Any, accelerator: Accelerator) -> dict[str, float]:
    """The metrics of a batch: means over the trajectories of all ranks, and the merged metrics of retrieval."""
    rows = [
        {**trajectory_metrics(trajectory), **batch.metrics} for trajectory in batch.asked_first or batch.trajectories
    ]
    local = torch.tensor([list(row.values()) for row in rows], device=accelerator.device)  # (B, metrics)
    means = accelerator.gather(local)[: batch.counted_rows].mean(dim=0).tolist()
    found = dict(zip(rows[0], means, strict=True))
    for name in idle_metrics(tool_names(environment.tools)):
        del found[name]
    return {**found, **merge_metrics(gather_object([environment.take_metrics()]))}
