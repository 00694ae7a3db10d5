"""Checks values of TRL's own keys that TRL would refuse after the first rollout, or would train on without a word.

temperature: -1      samples the least likely tokens
loss_type: gspo      an error at the first loss
"""

from __future__ import annotations

import math
from typing import Any

from trl_search.common.errors import UserError, unknown_name
from trl_search.config.recipe_values import check_least

CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}


def check_trls_keys(args: Any) -> None:
    """Checks a [`~trl.GRPOConfig`].

    Raises:
        UserError: for the first wrong value; the message names its key.
    """
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise unknown_name(name, getattr(args, name), choices)
    check_least(args, num_iterations=1, beta=0, epsilon=0, epsilon_high=0)
    if not 0 < args.temperature < math.inf:
        raise UserError(
            f"temperature={args.temperature} must be more than 0: GRPO compares the different trajectories of a group"
        )
    if not 0 < args.top_p <= 1:
        raise UserError(f"top_p={args.top_p} must be more than 0 and at most 1, which considers all tokens")
    if args.min_p is not None and not 0 <= args.min_p <= 1:
        raise UserError(f"min_p={args.min_p} must be a number from 0 to 1")
    if args.reward_weights is not None and not all(map(math.isfinite, args.reward_weights)):
        raise UserError(f"reward_weights={args.reward_weights} must be finite numbers")
    # The default with load_best_model_at_end and with lr_scheduler_type: reduce_lr_on_plateau.
    if args.metric_for_best_model in ("loss", "eval_loss"):
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model} is the loss of an evaluation, which in GRPO does not "
            "say how good a policy is: set it to reward"
        )
