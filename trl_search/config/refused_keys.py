"""Refuses keys whose fault shows in the recipe alone, so that `trl-search doctor` names them, too.

repetition_penalty: 1.1        TRL's generation reads it, our rollouts do not
on_collapse: rollback          without evaluate_every there is no checkpoint to go back to
load_in_4bit: true             the command line does not load quantized models
optim: galore_adamw            its package is not installed
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.searched import WORLD
from trl_search.config.task import TaskArguments
from trl_search.environment.registry import SEARCH
from trl_search.rewards import default_weight, resolve_rewards
from trl_search.rewards.registry import names_a_model

# Keys of TRL that only its own generation reads, and what to do instead.
_NOT_OURS = {
    "max_tool_calling_iterations": "use max_searches, which bounds the calls of a trajectory",
    "cache_implementation": "leave it out; rollouts have their own cache",
    "use_transformers_continuous_batching": "leave it out; rollouts always batch continuously (rollout_batch_size)",
    "transformers_continuous_batching_config": "use rollout_batch_size, the number of concurrent trajectories",
}


def refuse_keys(arguments: Any, config: Any, model_config: ModelConfig) -> None:
    """Refuses what the three parts of a recipe of `train` or `sft` show.

    Raises:
        UserError: names the key to change.
    """
    refuse_quantization(model_config)
    refuse_push(config.push_to_hub, config.output_dir)
    if not getattr(arguments, "collect_only", False):
        refuse_optimizer(config)
    if isinstance(config, SearchGRPOConfig):
        refuse_ignored_keys(config)
    if isinstance(arguments, TaskArguments):
        _refuse_without_evaluations(arguments, config)
        refuse_weightless_rewards(arguments.reward_funcs, _weights(arguments, config), config)
        if config.environment != SEARCH and arguments.warm_start_steps:
            raise UserError(
                f"warm_start_steps shows searches, but the environment is {config.environment}: "
                "set warm_start_steps: 0"
            )


def _refuse_without_evaluations(arguments: TaskArguments, config: SearchGRPOConfig) -> None:
    if arguments.evaluate_every and arguments.questions != WORLD and not arguments.eval_questions:
        raise UserError(f"evaluate_every={arguments.evaluate_every} needs eval_questions to measure on")
    if config.on_collapse == "rollback" and not arguments.evaluate_every:
        raise UserError("on_collapse=rollback needs a best checkpoint: set evaluate_every, which keeps one")
    if arguments.evaluate_every:
        refuse_two_best(config)


def refuse_two_best(args: SearchGRPOConfig) -> None:
    """Refuses transformers' best checkpoint beside that of `evaluate_every`."""
    if args.metric_for_best_model is not None or args.load_best_model_at_end:
        raise UserError(
            "evaluate_every and metric_for_best_model (or load_best_model_at_end) both choose the best checkpoint: "
            "leave the latter out; output_dir/best is the one with the highest eval/em"
        )


def _weights(arguments: TaskArguments, config: SearchGRPOConfig) -> Sequence[float]:
    if config.reward_weights is not None:
        return config.reward_weights
    names = arguments.reward_funcs
    return [1.0 if names_a_model(name) else default_weight(resolve_rewards([name])[0]) for name in names]


def refuse_weightless_rewards(names: Sequence[str], weights: Sequence[float], args: SearchGRPOConfig) -> None:
    """Refuses rewards that all have the weight 0, with which nothing would be learnt but from credit per turn.

    Raises:
        UserError: names the rewards.
    """
    if not any(weights) and args.turn_credit == "none":
        raise UserError(
            f"the weights of all rewards ({', '.join(names)}) are 0, so nothing would be learnt: add a reward, or set "
            "reward_weights"
        )


def refuse_ignored_keys(args: SearchGRPOConfig) -> None:
    """Refuses keys of TRL that would have no effect on rollouts, or would break them.

    Raises:
        UserError: names the key to change.
    """
    if args.torch_compile and not args.use_vllm:
        raise UserError(
            "torch_compile wraps the model in a module from which rollouts cannot sample: leave it out, or generate "
            "with vLLM (use_vllm: true)"
        )
    if args.repetition_penalty != 1.0 or args.generation_kwargs:
        raise UserError("repetition_penalty and generation_kwargs have no effect on our rollouts: leave them out")
    if args.vllm_structured_outputs_regex:
        raise UserError("vllm_structured_outputs_regex has no effect on our rollouts: leave it out")
    for name, instead in _NOT_OURS.items():
        if getattr(args, name, None):
            raise UserError(f"{name} configures TRL's generation, which is not used here: {instead}")
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise UserError(
                f"accelerator_config {name}: true gives processes other rows than GRPO's groups need: leave it out"
            )
    if args.data_seed not in (None, args.seed):
        raise UserError(
            f"data_seed={args.data_seed} has no effect, as TRL draws the questions of GRPO with seed={args.seed}: "
            "leave it out, or set seed"
        )
    if args.remove_unused_columns:
        raise UserError(
            "remove_unused_columns=True removes columns that the environment and the rewards read: set it to false"
        )


def refuse_optimizer(args: TrainingArguments) -> None:
    """Refuses what transformers refuses when it makes the optimizer, after the model is loaded.

    Raises:
        UserError: if the optimizer is not installed, or does not take `optim_args`.
    """
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except Exception as error:  # each optimizer raises its own
        if isinstance(error, ValueError) and "need to pass a" in str(error):  # GaLore, Apollo and LOMO need the model
            return
        name = OptimizerNames(args.optim).value
        if args.optim_args:
            bare = copy.copy(args)
            bare.optim_args = None
            refuse_optimizer(bare)  # what is not the fault of optim_args
            raise UserError(
                f"optim: {name} does not take optim_args: {args.optim_args} ({error}); write name=value,name=value"
            ) from error
        raise UserError(f"optim: {name}: {error}") from error


def refuse_push(asked: bool, folder: str | None) -> None:
    """Refuses transformers' upload, which takes every file of the run's folder but checkpoints.

    Raises:
        UserError: if it is asked for.
    """
    if asked:
        raise UserError(
            "push_to_hub uploads the whole folder of the run, with the questions, passages and texts of its "
            f"trajectories: leave it out, and afterwards run `trl-search push {folder} owner/name`, which uploads the "
            "model and its card"
        )


def refuse_quantization(model_config: ModelConfig) -> None:
    """Refuses the keys of TRL's `ModelConfig` for a quantized base model, which the command line does not support.

    Raises:
        UserError: if one of them is set.
    """
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_config, key):
            raise UserError(
                f"{key}: the command line does not load quantized models; leave it out. To save memory, use LoRA on a "
                "bfloat16 base (use_peft: true, dtype: bfloat16), or gradient_checkpointing: true. In Python, pass a "
                "model loaded with a quantization_config, and a peft_config"
            )
