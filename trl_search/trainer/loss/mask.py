"""Which tokens of a batch the loss is made of, on their way from trajectories to TRL and back.

    Trajectory.mask  ──►  loss_mask: none of a failed trajectory  ──►  TRL's env_mask  ──►  loss_mask_of a scored batch
    1 sampled, 0 read     (or of a truncated one, where asked for)

The mask of a single token is written with the token, by `Trajectory.act` and `Trajectory.observe` in `types.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trl_search.config.grpo import SearchGRPOConfig
from trl_search.types import StopReason, Trajectory

if TYPE_CHECKING:
    import torch


def loss_mask(trajectory: Trajectory, args: SearchGRPOConfig) -> list[int]:
    """1 for each token that is trained on: the sampled ones, unless the trajectory failed."""
    # TRL takes a completion for truncated if it does not end in EOS. Where the last observation found no room, a
    # sampled EOS comes last, so TRL would take that trajectory for a finished one.
    truncated = args.mask_truncated_completions and trajectory.stop_reason is StopReason.TOKEN_BUDGET
    if trajectory.failed or truncated:
        return [0] * len(trajectory.ids)
    return trajectory.mask if args.mask_observations else [1] * len(trajectory.ids)


def sampling_logprobs(trajectory: Trajectory, args: SearchGRPOConfig) -> list[float]:
    """The log-probs at sampling time, which TRL compares with the trainer's."""
    if args.mask_observations:
        return trajectory.logprobs
    # Observation tokens were never sampled. NaN gives them importance weight 1; the stored 0.0 would give p(token).
    pairs = zip(trajectory.logprobs, trajectory.mask, strict=True)
    return [logprob if sampled else math.nan for logprob, sampled in pairs]


def loss_mask_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The loss mask (B, C) of a batch that TRL has scored: there it is the product of two masks."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)
