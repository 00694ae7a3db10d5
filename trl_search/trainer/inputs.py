"""Checks and completes the trainer's arguments before TRL sees them: rewards, tokenizer, environment, settings."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from trl_search.common.errors import UserError
from trl_search.config.agent import build_environment, settings_in
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.refused_keys import refuse_ignored_keys, refuse_optimizer, refuse_push
from trl_search.environment import Environment, check_environment
from trl_search.environment.registry import SEARCH, name_of
from trl_search.policies.adapters import check_adapter, refuse_adapter_folder
from trl_search.policies.loading import load_tokenizer, read_config
from trl_search.records.tracker_checks import refuse_trackers
from trl_search.retrieval import as_retriever
from trl_search.rewards import resolve_rewards
from trl_search.rewards.declaration import with_settings
from trl_search.rewards.last_message import reads_first_message
from trl_search.rewards.registry import listed_rewards, names_a_model
from trl_search.rewards.scores import checked
from trl_search.trainer.generation.vllm_backend import refuse_what_vllm_cannot_do

logger = logging.getLogger(__name__)

RewardSpec = str | Callable[..., Any]


def environment_of(args: Any, retriever: Any, environment: Any) -> Environment | None:
    """The environment of a run; `None` for a plain GRPOTrainer. Copies the budgets of an instance to `args`.

    Raises:
        UserError: if an argument is not a retriever or not an environment, or if both are given.
    """
    if retriever is None and environment is None and getattr(args, "environment", SEARCH) == SEARCH:
        return None
    if not isinstance(args, SearchGRPOConfig):
        raise UserError(f"args must be a SearchGRPOConfig, not a {type(args).__name__}")
    if environment is None:
        return build_environment(args.agent, None if retriever is None else as_retriever(retriever))
    if isinstance(environment, str):
        more = "" if retriever is None else ", retriever=..."
        raise UserError(f'environment is a name: give environment=load_environment("{environment}"{more}) alone')
    if retriever is not None:
        name = getattr(environment, "__name__", type(environment).__name__)
        raise UserError(
            f"give a retriever or an environment, not both: give it to {name} (as in SearchEnvironment(retriever)), "
            "and the trainer only the environment"
        )
    made = check_environment(environment)
    if args.environment not in (SEARCH, name_of(made)):
        raise UserError(
            f"environment is given twice, as an instance and as args.environment={args.environment!r}: leave one out"
        )
    for name, value in dataclasses.asdict(settings_in(made, args.agent)).items():
        setattr(args, name, value)
    return made


def resolve_specs(specs: RewardSpec | Sequence[RewardSpec], args: SearchGRPOConfig) -> list[Any]:
    """Replaces names with functions, which get the settings they declare. A reward model is left to TRL: a loaded one,
    or a name with a slash, a hub id or a folder."""
    listed = listed_rewards(specs)
    models = [spec for spec in listed if isinstance(spec, torch.nn.Module) or names_a_model(spec)]
    others = [spec for spec in listed if spec not in models]
    functions = resolve_rewards(others) if others or not listed else []
    for model in models:
        if isinstance(model, str):
            read_config(model, trust_remote_code=args.trust_remote_code)
    for reward in filter(reads_first_message, functions):
        logger.warning(
            "%s reads only the first message of a completion, which is a search agent's first call. To score the last "
            "message, use trl_search.rewards.of_last_message(%s)",
            reward.__name__,
            reward.__name__,
        )
    left = (checked(with_settings(reward, args)) for reward in functions)
    return [spec if spec in models else next(left) for spec in listed]


def tokenizer_of(model: str | PreTrainedModel, args: SearchGRPOConfig, given: Any = None) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one in the model's folder or repository, at the same revision. Of a processor, only
    the tokenizer is used, because rollouts are text only.

    Raises:
        UserError: if an argument is not a model or not a tokenizer, or if there is no tokenizer to load.
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise UserError(f"model must be a name, a folder or a PreTrainedModel, not {type(model).__name__}")
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    if isinstance(model, str):
        refuse_adapter_folder(model)
        read_config(model, revision=options.get("revision"), trust_remote_code=args.trust_remote_code)
    tokenizer = getattr(given, "tokenizer", given)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is not None:
        raise UserError(
            f"processing_class must be a tokenizer, AutoTokenizer.from_pretrained(...), not {tokenizer!r:.60}"
        )
    name = model if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise UserError("the model has no name from which to load a tokenizer: give processing_class=tokenizer")
    return load_tokenizer(
        name, revision=options.get("revision"), trust_remote_code=args.trust_remote_code, eos_token=args.eos_token
    )


def refuse_what_rollouts_cannot_do(
    args: SearchGRPOConfig, model: Any, environment: Environment, kwargs: Mapping[str, Any]
) -> None:
    """Refuses options that would have no effect or would fail in the first rollout."""
    if args.search_floor_steps and not environment.tools:
        raise UserError(
            f"search_floor_steps={args.search_floor_steps} gives no reward without a tool call, but "
            f"{type(environment).__name__} has no tools: leave it out"
        )
    taken = [name for name in ("tools", "environment_factory", "rollout_func") if kwargs.get(name)]
    if taken:
        raise UserError(
            f"{taken[0]} configures TRL's multi-turn rollouts, which trl-search replaces: leave it out. An "
            "Environment declares your tools and runs them: environment=YourEnvironment(...) (docs/extending.md)"
        )
    if args.use_vllm:
        refuse_what_vllm_cannot_do(args)
    refuse_what_fsdp_cannot_do(args)
    refuse_push(args.push_to_hub, args.output_dir)
    if args.process_index == 0:
        refuse_trackers(args.report_to or [], args.trackio_space_id)
    refuse_ignored_keys(args)
    optimizer, _ = kwargs.get("optimizers") or (None, None)
    if optimizer is None and not kwargs.get("optimizer_cls_and_kwargs"):
        refuse_optimizer(args)
    adapter = kwargs.get("peft_config")
    check_adapter(model, adapter, args.beta)
    whole = isinstance(model, PreTrainedModel) and adapter is None
    if args.beta and whole and not model.config._name_or_path:
        raise UserError(
            f"beta={args.beta} needs a reference model, which TRL loads by the name of the model, but this model has "
            "none: save it (model.save_pretrained(folder)) and give the folder, or set beta: 0"
        )


def refuse_one_process_for_several_gpus(args: TrainingArguments) -> None:
    """Refuses several GPUs in one process, as TRL's trainers do, but before the model is loaded and warmed up."""
    if args.n_gpu > 1:
        raise UserError(
            f"one process cannot train on the {args.n_gpu} GPUs that it sees: start one per GPU, `accelerate launch "
            f"--num_processes {args.n_gpu} -m trl_search ...`, or show it one, CUDA_VISIBLE_DEVICES=0"
        )


def refuse_what_fsdp_cannot_do(args: SearchGRPOConfig) -> None:
    """Refuses what does not work of FSDP's settings, from the environment variables of `accelerate launch` or from
    `args.fsdp`."""
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
            "FSDP needs vLLM: without it, each token of a rollout gathers the whole model, and ranks with rollouts of "
            "different lengths wait for each other forever. Set use_vllm: true, or use DDP or DeepSpeed ZeRO"
        )
    if str(saved) != "FULL_STATE_DICT":
        raise UserError(
            f"fsdp_state_dict_type: {saved} saves a model that transformers cannot load: set it to FULL_STATE_DICT "
            "(recipes/accelerate/fsdp2.yaml)"
        )
