"""The weighted sum of a trajectory's rewards, and its deviation from the mean of the group.

    rewards_RF    weights_F     weighted_rewards    deviations, in groups of 2
     1.0   0.3    1.0   0.5      1.15                0.075
     1.0    -                    1.0                -0.075
     0.7   0.6                   1.0                 0        the sums differ in their last digit
     0.9   0.2                   1.0                 0

TRL computes advantages from these deviations; `scale_rewards` sets the divisor. A dash is NaN, a reward without a
score. Suffixes: R trajectories, F reward functions, G groups, B trajectories of a group.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Sums and means in float32 agree to six digits of their terms. The bound is relative because rewards have any scale,
# and TRL turns differences of any size into advantages, although it logs a standard deviation below 1e-8 as zero.
ROUNDING = 1e-6


def weighted_rewards(rewards_RF: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """(R,) weighted sums, ignoring NaN; NaN if all rewards are NaN. Accepts (F,) for a single trajectory, too."""
    sums_R = (rewards_RF * weights_F.to(rewards_RF)).nansum(dim=-1)
    return sums_R.masked_fill(rewards_RF.isnan().all(dim=-1), math.nan)


def deviations(rewards_RF: torch.Tensor, weights_F: torch.Tensor, group_size: int) -> torch.Tensor:
    """(R,) weighted rewards minus the mean of their group, with rounding errors set to exactly 0. NaN for a trajectory
    without a reward.

    Otherwise TRL would divide a rounding error by a standard deviation of the same size and make it an advantage:
    eight rewards of 1.3 can get advantages of 1e-3.

    Example:
        >>> deviations(torch.tensor([[1.0], [0.0], [0.1 + 0.2], [0.3]]), torch.ones(1), 2)
        tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    rewards_GB = weighted_rewards(rewards_RF, weights_F).view(-1, group_size)
    terms_GB = (rewards_RF * weights_F.to(rewards_RF)).abs().nansum(dim=-1).view(-1, group_size)
    deviations_GB = rewards_GB - rewards_GB.nanmean(dim=1, keepdim=True)
    rounding_G1 = ROUNDING * terms_GB.amax(dim=1, keepdim=True)
    return deviations_GB.masked_fill(deviations_GB.abs() <= rounding_G1, 0.0).view(-1)
