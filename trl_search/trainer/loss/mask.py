"""Which tokens of a batch are in the loss.

    Trajectory.mask  ──►  loss_mask: 0 for a failed trajectory  ──►  TRL's env_mask  ──►  loss_mask_of a scored batch
    1 sampled, 0 read     (mask_truncated_completions: also for a truncated one)

`Trajectory.act` and `Trajectory.observe` in `types.py` set the mask of each token when they write it.
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
    # TRL treats a completion without a final EOS as truncated. It misses trajectories whose last observation did not
    # fit, because these end in a sampled EOS.
    truncated = args.mask_truncated_completions and trajectory.stop_reason is StopReason.TOKEN_BUDGET
    if trajectory.failed or truncated:
        return [0] * len(trajectory.ids)
    return trajectory.mask if args.mask_observations else [1] * len(trajectory.ids)


def sampling_logprobs(trajectory: Trajectory, args: SearchGRPOConfig) -> list[float]:
    """The log-probs at sampling time, for TRL's importance ratio."""
    if args.mask_observations:
        return trajectory.logprobs
    # Observation tokens were never sampled. NaN gives them importance weight 1; the stored 0.0 would give p(token).
    pairs = zip(trajectory.logprobs, trajectory.mask, strict=True)
    return [logprob if sampled else math.nan for logprob, sampled in pairs]


def loss_mask_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The loss mask (B, C) of a batch that TRL has scored, where it is the product of two masks."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)
