"""Leaves trajectories that cannot change the weights out of the training forward and backward.

Each of TRL's losses multiplies the term of a token by its advantage. If all rewards of a group are equal, every
advantage is 0, and neither loss nor gradient depends on its tokens. These tokens do not run; loss and gradients do not
change (`tests/trainer/loss/test_without_gradient.py`):

    group     rewards      advantages        runs    counted by num_items_in_batch and by the mean over trajectories
    1         1 0 0 1      .9 -.9 -.9 .9     yes     yes
    2         0 0 0 0       0   0   0  0     no      yes

All trajectories run if a term of the loss needs those without an advantage (`must_all_run`). The ratios of tokens that
did not run are 1. `entropy`, `vespo/phi_seq_mean` and `sampling/*` are logged as means over what ran, and
`loss/without_gradient` is the share of trajectories that did not run.

Suffixes: B trajectories of this rank, C completion tokens, R trajectories of all ranks, F reward functions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from trl_search.rewards.weighted import deviations
from trl_search.trainer.batch import MicroBatch
from trl_search.trainer.loss.mask import loss_mask_of

logger = logging.getLogger(__name__)

METRIC = "loss/without_gradient"
# TRL's losses in which every term is a multiple of the token's advantage.
MULTIPLIED_BY_ADVANTAGE = frozenset({"grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"})


def must_all_run(trainer: Any) -> bool:
    """Whether trajectories without an advantage can change the weights; logs the result."""
    needed = {
        "TRL's own forward computes the log-probs": trainer.logprobs is None or trainer.aux_loss_enabled,
        f"loss_type={trainer.loss_type} is unknown to trl-search": trainer.loss_type not in MULTIPLIED_BY_ADVANTAGE,
        "beta pulls every trajectory towards the reference": trainer.beta != 0,
        "the entropy bonus is a mean over all tokens": trainer._entropy_bonus_enabled,
        "top_entropy_quantile is a quantile over all tokens": trainer.top_entropy_quantile < 1,
        "llds_coef acts on trajectories whose advantage is 0": trainer.args.llds_coef != 0,
    }
    reason = next((reason for reason, holds in needed.items() if holds), None)
    logger.info("trajectories without an advantage %s", f"run: {reason}" if reason else "are not run")
    return reason is not None


def micro_batch_of(inputs: Mapping[str, Any], *, all_run: bool) -> MicroBatch:
    """The micro-batch of TRL's `inputs`; with `all_run`, it runs all trajectories."""
    mask_BC = loss_mask_of(inputs)
    runs_BC = mask_BC if all_run else tokens_with_gradient(inputs["advantages"], mask_BC)
    return MicroBatch(dict(inputs), mask_BC, runs_BC)


def tokens_with_gradient(advantages: torch.Tensor, loss_mask_BC: torch.Tensor) -> torch.Tensor:
    """The loss mask (B, C), set to 0 for trajectories in which no token of the loss has an advantage."""
    advantages_BC = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    has_gradient_B1 = ((advantages_BC != 0) & loss_mask_BC.bool()).any(dim=1, keepdim=True)
    return loss_mask_BC * has_gradient_B1


def drop_rounding(advantages_B: torch.Tensor, rewards_RF: torch.Tensor, trainer: Any) -> None:
    """Sets advantages of this rank to exactly 0, in place, if the reward differs from its group's mean only by a
    rounding error."""
    if trainer.multi_objective_aggregation == "sum_then_normalize":  # the other mode also normalises across groups
        deviations_R = deviations(rewards_RF, trainer.reward_weights, trainer.num_generations)
        start = trainer.accelerator.process_index * len(advantages_B)
        advantages_B.masked_fill_(deviations_R[start : start + len(advantages_B)] == 0, 0.0)


def log_what_ran(metrics: dict[str, list[float]], micro_batch: MicroBatch, accelerator: Accelerator) -> None:
    """Logs `METRIC`, and converts TRL's latest means over all tokens in the loss to means over what ran on all ranks.

    A mean over nothing is removed: any number would be wrong, and NaN would raise an alarm.
    """
    ran_BC, loss_mask_BC = micro_batch.runs_BC, micro_batch.loss_mask_BC
    counts = torch.stack([ran_BC.any(dim=1).sum(), ran_BC.sum(), loss_mask_BC.sum()]).float()
    rows, tokens, all_tokens = accelerator.reduce(counts, "sum").tolist()
    all_rows = len(ran_BC) * accelerator.num_processes
    metrics[METRIC].append(1 - rows / all_rows)
    over_what_ran = {
        # In TRL's means, what did not run has entropy 0 and a VESPO weight of 1.
        "entropy": lambda mean: mean * all_tokens / tokens,
        "vespo/phi_seq_mean": lambda mean: (mean * all_rows - (all_rows - rows)) / rows,
    }
    for name in over_what_ran.keys() & metrics.keys():
        mean = metrics[name].pop()
        if tokens:
            metrics[name].append(over_what_ran[name](mean))
        elif not metrics[name]:
            del metrics[name]
