"""What a user gives the trainer, checked and completed before TRL sees it: rewards, tokenizer, prompts, settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.loading import load_tokenizer
from trl_search.protocols import Protocol
from trl_search.rewards import check_columns, resolve_rewards
from trl_search.trainer.vllm_backend import refuse_what_vllm_cannot_do

RewardSpec = str | Callable[..., Any]


def resolve_specs(specs: RewardSpec | Sequence[RewardSpec]) -> list[Any]:
    """Functions in place of names. A hub id or a folder, told by its slash, is a reward model: TRL loads it."""
    listed = [specs] if isinstance(specs, str) or callable(specs) else list(specs)
    is_model = [isinstance(spec, str) and "/" in spec for spec in listed]
    others = [spec for spec, model in zip(listed, is_model, strict=True) if not model]
    functions = iter(resolve_rewards(others) if others or not listed else [])
    return [spec if model else next(functions) for spec, model in zip(listed, is_model, strict=True)]


def tokenizer_of(model: str | PreTrainedModel, args: SearchGRPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder or repository, of the same revision."""
    name = model if isinstance(model, str) else model.config._name_or_path
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return load_tokenizer(
        name,
        revision=options.get("revision"),
        trust_remote_code=args.trust_remote_code,
        eos_token=args.eos_token,
    )


def refuse_what_rollouts_cannot_do(args: SearchGRPOConfig, kwargs: dict[str, Any]) -> None:
    """Says at start what would otherwise be ignored in silence."""
    taken = [name for name in ("tools", "environment_factory", "rollout_func") if kwargs.get(name)]
    if taken:
        raise UserError(f"{taken[0]} is TRL's way to multi-turn rollouts and does not go with ours: leave it out")
    if args.use_vllm:
        refuse_what_vllm_cannot_do(args)
    refuse_what_fsdp_cannot_do(args)
    if args.repetition_penalty != 1.0 or args.generation_kwargs:
        raise UserError("repetition_penalty and generation_kwargs do not reach our policy: leave them out")


def refuse_what_fsdp_cannot_do(args: SearchGRPOConfig) -> None:
    """FSDP comes from `accelerate launch`, which names its settings in the environment, or from `args.fsdp`."""
    if args.fsdp_plugin_args is not None:
        version, saved = args.fsdp_plugin_args["fsdp_version"], args.fsdp_plugin_args["state_dict_type"]
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        version = int(os.environ.get("FSDP_VERSION", "1"))
        saved = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    else:
        return
    if version != 2:
        raise UserError("FSDP version 1 is not supported: set fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)")
    if not args.use_vllm:
        raise UserError(
            "FSDP without vLLM: each token of a rollout would gather the whole model, and the ranks, whose rollouts "
            "differ, would wait for each other's gathers without end. Set use_vllm: true, or use DDP or DeepSpeed ZeRO"
        )
    if str(saved) != "FULL_STATE_DICT":
        raise UserError(
            f"fsdp_state_dict_type: {saved} would save no model that transformers can load: set it to FULL_STATE_DICT "
            "(recipes/accelerate/fsdp2.yaml)"
        )


def refuse_quantization(model_config: ModelConfig) -> None:
    """TRL's `ModelConfig` has keys for a quantized base, which is not loaded here; nobody shall think that it was."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_config, key):
            raise UserError(
                f"{key}: quantized models are not supported; leave it out. What saves memory instead is LoRA on a "
                f"bfloat16 base (use_peft: true, dtype: bfloat16), or gradient_checkpointing: true"
            )


def with_prompts(dataset: Any, protocol: Protocol, rewards: Sequence[Callable[..., Any]], name: str) -> Any:
    """The dataset with a conversational `prompt` column, which the protocol writes from `question` if need be."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: with_prompts(one, protocol, rewards, f"{name}[{key!r}]") for key, one in dataset.items()}
    first = next(iter(dataset), None)
    if first is None:
        raise UserError(f"{name} is empty")
    columns = list(first)
    check_columns(rewards, columns)
    if "prompt" in columns:
        return dataset.map(lambda row: {"prompt": _conversation(row["prompt"], protocol)})
    if "question" not in columns:
        raise UserError(f"{name} needs a column 'question' (or 'prompt'); it has: {', '.join(columns)}")
    return dataset.map(lambda row: {"prompt": protocol.messages(row["question"])})


def _conversation(prompt: Any, protocol: Protocol) -> Any:
    return protocol.messages(prompt) if isinstance(prompt, str) else prompt
