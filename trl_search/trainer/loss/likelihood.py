"""LLDS: a penalty where the likelihood of good actions falls while the policy is trained (arXiv:2512.04220).

GRPO can lower the likelihood of right and wrong trajectories alike, because they share most of their tokens. Then the
policy gets unsure, gradients grow, and training collapses. The penalty acts on actions (turns between observations)
whose advantage is not negative and whose likelihood fell, and within them on the tokens that fell.

    action          old log-probs      new log-probs      fell as a whole?   penalty
    search          -0.2 -0.1          -0.3 -0.1          yes                0.1 + 0
    answer          -0.5 -0.5          -0.6 -0.2          no                 0

Suffixes: B trajectories, C completion tokens.
"""

from __future__ import annotations

import torch

from trl_search.trainer.batch import MicroBatch


def llds_of(micro_batch: MicroBatch) -> torch.Tensor:
    """[`llds_penalty`] of a micro-batch whose log-probs are known."""
    assert micro_batch.logps_BC is not None
    inputs, mask_BC = micro_batch.inputs, micro_batch.loss_mask_BC
    return llds_penalty(micro_batch.logps_BC, micro_batch.old_logps_BC, mask_BC, inputs["advantages"])


def llds_penalty(
    logps_BC: torch.Tensor, old_logps_BC: torch.Tensor, mask_BC: torch.Tensor, advantages_B: torch.Tensor
) -> torch.Tensor:
    """The mean fall of log-likelihood per token in the loss; a scalar with gradients towards `logps_BC`.

    Args:
        logps_BC, old_logps_BC: Log-probs of the policy in training, and of the policy at sampling time.
        mask_BC: 1 for tokens in the loss. What stands between two of its gaps is one action.
        advantages_B: Trajectories with a negative advantage are left alone.
    """
    advantages_B1 = advantages_B.unsqueeze(1) if advantages_B.dim() == 1 else advantages_B
    mask_BC = mask_BC.to(logps_BC.dtype)
    fall_BC = (old_logps_BC - logps_BC) * mask_BC
    actions_BC = action_numbers(mask_BC)
    total_BA = fall_BC.new_zeros(len(fall_BC), int(actions_BC.max()) + 1)
    total_BA.scatter_add_(1, actions_BC, fall_BC.detach())
    fell_BC = (total_BA.gather(1, actions_BC) > 0) & (advantages_B1 >= 0)
    return (fall_BC.relu() * fell_BC).sum() / mask_BC.sum().clamp(min=1)


def action_numbers(mask_BC: torch.Tensor) -> torch.Tensor:
    """(B, C): which action of its trajectory a token belongs to; a gap has the number of the action before it."""
    before_BC = torch.nn.functional.pad(mask_BC[:, :-1], (1, 0))
    return ((mask_BC > 0) & (before_BC == 0)).cumsum(dim=1)
