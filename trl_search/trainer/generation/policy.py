"""Chooses the engine that generates for a trainer: vLLM (in process or on a server), or the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from trl.models import unwrap_model_for_generation

from trl_search.policies.base import Policy
from trl_search.policies.transformers_policy import TransformersPolicy


@contextlib.contextmanager
def policy_of(trainer: Any, context_length: int) -> Iterator[Policy]:
    """The policy of a [`SearchGRPOTrainer`], with the weights of its current step. All ranks must enter together.

    Args:
        context_length (`int`): Maximum tokens of a trajectory, including its prompt.
    """
    if trainer.use_vllm:
        if trainer.state.global_step != trainer._last_loaded_step:  # before a rollout, TRL has already synced
            trainer.vllm_generation.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step
        with trainer.vllm_generation.policy(context_length) as policy:
            yield policy
        return
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        torch.no_grad(),
    ):
        yield TransformersPolicy(model, trainer.protocol.tokenizer, max_sequences=trainer.args.rollout_batch_size)
