"""`Rollout`: everything known about one generation batch, in one value that the trainer's seams hand on.

TRL calls the seams one after the other and gives each only a part of the batch. What a later seam needs is set here by
an earlier one; nothing else is kept between them. `trainer.last_rollout` is the latest batch, for callers to read.

Suffixes of tensors: B trajectories of this rank, C completion tokens, R trajectories of all ranks, F reward functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.protocols import Protocol
from trl_search.protocols.instructions import tool_names
from trl_search.records.trajectory_log import Replaced
from trl_search.records.trajectory_metrics import idle_metrics, trajectory_metrics
from trl_search.retrieval.base import RetrievalError, merge_metrics
from trl_search.trainer.laps import Laps
from trl_search.types import Sampling, StopReason, Trajectory

if TYPE_CHECKING:
    from trl_search.trainer.groups.group_rewards import Group


@dataclass(frozen=True)
class Question:
    """A row of the dataset, and its prompt."""

    row: Mapping[str, Any]
    prompt_ids: tuple[int, ...]


@dataclass
class Rollout:
    """
    One generation batch on this rank; lists run over its trajectories, in the order of the rows.

    | field          | set by                            | read by                                                    |
    |----------------|-----------------------------------|------------------------------------------------------------|
    | `rows`         | `_generate_and_score_completions` | `_rollout` (starts environments), the trajectory log       |
    | `prompt_ids`   | `_rollout`                        | TRL                                                        |
    | `trajectories` | `_rollout`                        | TRL, `_generate`, `_calculate_rewards`, the trajectory log |
    | `loss_masks`   | `_rollout`                        | TRL, `_get_per_token_logps_and_entropies`                  |
    | `logprobs`     | `_rollout`                        | TRL, as those of the policy that sampled                   |
    | `metrics`      | `_rollout`                        | `_generate`, which logs their means over all ranks         |
    | `laps`         | every seam, at its end            | `_generate_and_score_completions`, which logs them         |
    | `rewards_RF`   | `_calculate_rewards`              | the trajectory log                                         |
    | `spare`        | `_generate_and_score_completions` | `_rollout`: by round and group, what refills the batch     |
    | `groups`       | `_rollout`, where it refills      | `_calculate_rewards`                                       |
    | `replaced`     | `_rollout`, where it refills      | pass rates, the trajectory log                             |
    | `asked_first`  | `_rollout`, where it refills      | `_generate`: metrics say what the policy does, and not     |
    |                |                                   | what was chosen for its rewards                            |

    Where a refill replaces questions, `rows` and what follows from them are the new ones from then on.

    Example:
        >>> trainer.train()
        >>> [trajectory.searches for trajectory in trainer.last_rollout.trajectories]
        [1, 2, 0, 1]
    """

    rows: list[dict[str, Any]]
    prompt_ids: list[tuple[int, ...]] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    loss_masks: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    laps: Laps = field(default_factory=Laps)
    rewards_RF: torch.Tensor | None = None  # NaN: not rewarded
    spare: list[list[Question]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    replaced: dict[int, list[Group]] = field(default_factory=dict)  # by the place of their group
    asked_first: list[Trajectory] = field(default_factory=list)

    @property
    def possible_prompts(self) -> list[tuple[int, ...]]:
        """The prompts of the batch, and of what may replace them."""
        return [*self.prompt_ids, *(question.prompt_ids for questions in self.spare for question in questions)]

    @property
    def replaced_trajectories(self) -> list[Replaced]:
        """Those that a refill set aside: counted, recorded, and in no loss."""
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
        """The loss masks as one tensor, 0 where a trajectory has ended."""
        return pad_sequence([torch.tensor(mask) for mask in self.loss_masks], batch_first=True)

    def for_trl(self) -> dict[str, list[Any]]:
        """What `rollout_func` returns. TRL's name for the loss mask is `env_mask` here, and `tool_mask` afterwards."""
        return {
            "prompt_ids": [list(ids) for ids in self.prompt_ids],
            "completion_ids": [trajectory.ids for trajectory in self.trajectories],
            "logprobs": self.logprobs,
            "env_mask": self.loss_masks,
        }


@dataclass
class MicroBatch:
    """What one call of the loss works on, between the seams that TRL calls in it.

    `inputs` is TRL's own dictionary, copied, so that a seam may add to it what TRL then reads. `runs_BC` is the loss
    mask without the trajectories that are not run, because they cannot change the weights.
    """

    inputs: dict[str, Any]
    loss_mask_BC: torch.Tensor
    runs_BC: torch.Tensor
    logps_BC: torch.Tensor | None = None  # of the policy in training, once they are known

    @property
    def old_logps_BC(self) -> torch.Tensor:
        """Log-probs at sampling time. With one optimizer step per batch they are those in training, detached."""
        assert self.logps_BC is not None, "the training forward has not run"
        old_BC: torch.Tensor = self.inputs.get("old_per_token_logps", self.logps_BC.detach())
        return old_BC

    def with_old_logps(self, logps_BC: torch.Tensor) -> torch.Tensor:
        """`logps_BC` with the old ones, where there are any, in trajectories that were not run: their ratio is 1."""
        old_BC = self.inputs.get("old_per_token_logps")
        return logps_BC if old_BC is None else torch.where(self.runs_BC.any(dim=1, keepdim=True), logps_BC, old_BC)


def sampling_of(args: SearchGRPOConfig, name: str) -> Sampling:
    """How the policy samples in the generation of that name: its own random numbers, the same ones when repeated."""
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p or 0.0,
        seed=int.from_bytes(f"{args.seed}/{name}".encode(), "big"),
    )


def encode_prompts(prompts: Sequence[Any], protocol: Protocol) -> list[tuple[int, ...]]:
    """The ids of each prompt. The prompt of a group is rendered once."""
    keys = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
    rendered = {key: protocol.prompt_ids(prompt) for key, prompt in dict(zip(keys, prompts, strict=True)).items()}
    return [rendered[key] for key in keys]


def positions_of(model: Any, args: SearchGRPOConfig) -> int | None:
    """Tokens that the model, and vLLM where its room is known, have room for. None: any number."""
    rooms = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    if args.use_vllm and args.vllm_mode == "colocate":
        rooms.append(args.vllm_max_model_length)
    return min((room for room in rooms if room is not None), default=None)


def longest_context(prompt_ids: Sequence[Sequence[int]], model: Any, args: SearchGRPOConfig) -> int:
    """Tokens of the longest prompt with a full completion.

    Raises:
        UserError: if there is no room for it.
    """
    longest = max(map(len, prompt_ids))
    needed = longest + args.max_completion_length
    positions = positions_of(model, args)
    if positions is not None and needed > positions:
        if args.use_vllm and positions == args.vllm_max_model_length:
            raise UserError(
                f"the longest prompt and max_completion_length need {needed} tokens, and the vLLM engine has room for "
                f"{positions}: set vllm_max_model_length={needed} or more, or lower max_completion_length"
            )
        remedy = f"lower max_completion_length to {positions - longest}, or leave such questions out"
        if longest >= positions:
            remedy = "leave such questions out"
        raise UserError(
            f"a prompt of {longest} tokens and max_completion_length={args.max_completion_length} need {needed} "
            f"positions, and the model has {positions}: {remedy}"
        )
    return needed


def check_failures(trajectories: Sequence[Trajectory], max_failed_share: float) -> None:
    """Stops the run when too many trajectories fail. Every rank calls it, so all stop at the same step.

    Raises:
        RetrievalError: if more than `max_failed_share` of the trajectories of all ranks have failed, and retrieval
            failed for most of them.
        UserError: if the environment did.
    """
    local = [(trajectory.stop_reason, trajectory.error) if trajectory.failed else None for trajectory in trajectories]
    outcomes = gather_object(local)
    failed = [outcome for outcome in outcomes if outcome is not None]
    if len(failed) <= max_failed_share * len(outcomes):
        return
    searches = [error for reason, error in failed if reason is StopReason.RETRIEVAL_FAILED]
    others = [error for reason, error in failed if reason is not StopReason.RETRIEVAL_FAILED]
    mostly, rarely = ("retrieval", searches), ("the environment", others)
    if len(others) > len(searches):
        mostly, rarely = rarely, mostly
    also = f" and {rarely[0]} for {len(rarely[1])}, together" if rarely[1] else ","
    raise (RetrievalError if mostly[1] is searches else UserError)(
        f"{mostly[0]} failed for {len(mostly[1])} of {len(outcomes)} trajectories{also} more than "
        f"max_failed_share={max_failed_share}; the first error: {mostly[1][0]}"
    )


def rollout_metrics(batch: Rollout, environment: Any, accelerator: Accelerator) -> dict[str, float]:
    """What is logged of a batch: means over the trajectories of all ranks, and what retrieval counted on them."""
    rows = [
        {**trajectory_metrics(trajectory), **batch.metrics} for trajectory in batch.asked_first or batch.trajectories
    ]
    local = torch.tensor([list(row.values()) for row in rows], device=accelerator.device)  # (B, metrics)
    means = accelerator.gather(local).mean(dim=0).tolist()
    found = dict(zip(rows[0], means, strict=True))
    for name in idle_metrics(tool_names(environment.tools)):
        del found[name]
    return {**found, **merge_metrics(gather_object([environment.take_metrics()]))}
