"""Checks values of TRL's own keys that TRL would refuse after the first rollout, or would train on without a word.

temperature: -1        samples the least likely tokens
loss_type: gspo        an error at the first loss
max_grad_norm: .nan    clips nothing
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from trl_search.common.bounds import check_minima, check_positive_share, check_share
from trl_search.common.errors import UserError, unknown_name

CHOICES = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}

SFT_LOSSES = ("nll", "dft")
# Keys of SFT that have no effect on trajectories, or fail once they are collected, and what holds instead.
_NOT_OF_SFT = {
    "packing": "trajectories are concatenated without padding anyway (padding_free)",
    "assistant_only_loss": "the loss always covers just what the policy writes",
    "completion_only_loss": "the loss always covers just what the policy writes",
    "chat_template_path": "the chat template is the tokenizer's",
    "dataset_kwargs": "the trajectories are tokenized already",
}


def check_training_keys(args: Any) -> None:
    """Checks the keys of a [`~transformers.TrainingArguments`], which GRPO and SFT share.

    Raises:
        UserError: for the first wrong value; the message names its key.
    """
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{field.name}=nan is not a number: give one, or leave it out")
    if args.learning_rate is None or not 0 <= args.learning_rate < math.inf:
        raise UserError(f"learning_rate={args.learning_rate} must be a finite number, at least 0")
    check_minima(args, weight_decay=0, max_grad_norm=0, adam_epsilon=0, data_seed=0)
    check_minima(args, per_device_train_batch_size=1, gradient_accumulation_steps=1, per_device_eval_batch_size=1)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 0 and less than 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"seed={args.seed} must be a whole number from 0 to 4,294,967,295, as numpy needs")
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UserError(
            f"num_train_epochs={args.num_train_epochs} and max_steps={args.max_steps} train nothing: set one above 0"
        )
    check_schedule(args)


def check_schedule(args: Any) -> None:
    """Builds the learning-rate schedule as transformers does once the model is loaded.

    Raises:
        UserError: if `lr_scheduler_kwargs` lacks what the schedule needs, or has what it does not take.
    """
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else 10**6  # the number of epochs is not known in steps yet
    options = {"num_warmup_steps": args.get_warmup_steps(steps), "num_training_steps": steps}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **options, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"lr_scheduler_type={args.lr_scheduler_type.value} with lr_scheduler_kwargs={args.lr_scheduler_kwargs}: "
            f"{error}. Set what is missing in lr_scheduler_kwargs, or choose another schedule"
        ) from error


def check_sft_keys(args: Any) -> None:
    """Checks an [`~trl.SFTConfig`], before trajectories are collected.

    Raises:
        UserError: for the first wrong value; the message names its key.
    """
    check_training_keys(args)
    if args.loss_type not in SFT_LOSSES:
        raise unknown_name("loss_type", args.loss_type, SFT_LOSSES)
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, instead in _NOT_OF_SFT.items():
        if getattr(args, name) != defaults[name]:
            raise UserError(f"{name}={getattr(args, name)!r}: {instead}, so leave it out")
    if args.eval_strategy != "no":
        raise UserError(
            f"eval_strategy={args.eval_strategy.value}: a cold start has no evaluation set, so leave it out, and run "
            "`trl-search eval` on the result"
        )


def check_trls_keys(args: Any) -> None:
    """Checks a [`~trl.GRPOConfig`].

    Raises:
        UserError: for the first wrong value; the message names its key.
    """
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise unknown_name(name, getattr(args, name), choices)
    check_training_keys(args)
    check_minima(args, num_iterations=1, beta=0, epsilon=0, epsilon_high=0, delta=0, top_k=0, num_generations_eval=1)
    check_minima(args, vllm_importance_sampling_clip_min=0, off_policy_mask_threshold=0)
    if args.vllm_importance_sampling_clip_max is not None and args.vllm_importance_sampling_clip_max <= 0:
        raise UserError(
            f"vllm_importance_sampling_clip_max={args.vllm_importance_sampling_clip_max} must be more than 0: at 0, "
            "no token would be trained on"
        )
    check_positive_share(top_entropy_quantile=args.top_entropy_quantile, top_p=args.top_p)
    if not 0 < args.temperature < math.inf:
        raise UserError(
            f"temperature={args.temperature} must be more than 0: GRPO compares the different trajectories of a group"
        )
    check_share(min_p=args.min_p)
    if args.reward_weights is not None and not all(map(math.isfinite, args.reward_weights)):
        raise UserError(f"reward_weights={args.reward_weights} must be finite numbers")
    # The default with load_best_model_at_end and with lr_scheduler_type: reduce_lr_on_plateau.
    if args.metric_for_best_model in ("loss", "eval_loss"):
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model} is the loss of an evaluation, which in GRPO does not "
            "say how good a policy is: set it to reward"
        )
