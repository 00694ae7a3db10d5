"""LLDS: a penalty on good actions whose likelihood falls during training (arXiv:2512.04220).

GRPO can lower the likelihood of right and wrong trajectories alike, because they share most of their tokens. Then the
policy becomes uncertain, gradients grow, and training collapses. The penalty applies to actions (turns between
observations) with a non-negative advantage whose likelihood fell, and within them to the tokens whose likelihood fell.

    action          old log-probs      new log-probs      fell as a whole?   penalty
    search          -0.2 -0.1          -0.3 -0.1          yes                0.1 + 0
    answer          -0.5 -0.5          -0.6 -0.2          no                 0

Suffixes: B trajectories, C completion tokens.
"""

from __future__ import annotations

import torch


def llds_penalty(
    logps_BC: torch.Tensor, old_logps_BC: torch.Tensor, mask_BC: torch.Tensor, advantages_B: torch.Tensor
) -> torch.Tensor:
    """The mean decrease of log-likelihood per token in the loss; a scalar with gradients to `logps_BC`. Each run of
    ones in the mask is an action; trajectories with a negative advantage get no penalty."""
    advantages_B1 = advantages_B.unsqueeze(1) if advantages_B.dim() == 1 else advantages_B
    mask_BC = mask_BC.to(logps_BC.dtype)
    fall_BC = (old_logps_BC - logps_BC) * mask_BC
    actions_BC = action_numbers(mask_BC)
    total_BA = fall_BC.new_zeros(len(fall_BC), int(actions_BC.max()) + 1)
    total_BA.scatter_add_(1, actions_BC, fall_BC.detach())
    fell_BC = (total_BA.gather(1, actions_BC) > 0) & (advantages_B1 >= 0)
    return (fall_BC.relu() * fell_BC).sum() / mask_BC.sum().clamp(min=1)


def action_numbers(mask_BC: torch.Tensor) -> torch.Tensor:
    """(B, C): the number of the action that each token belongs to; masked tokens have that of the action before."""
    before_BC = torch.nn.functional.pad(mask_BC[:, :-1], (1, 0))
    return ((mask_BC > 0) & (before_BC == 0)).cumsum(dim=1)
