"""Checks before the first step, on two random trajectories, that the log-probs of the loss equal those of the model.

`policies/probe.py` checks the sampling engine in the same way, against a plain forward.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies import probe
from trl_search.trainer.loss.logprobs import LogProbs

logger = logging.getLogger(__name__)

_PROMPT, _COMPLETION = 3, 8


@torch.no_grad()
def probed(
    logprobs: LogProbs, wrapped: Any, model: Any, tokenizer: PreTrainedTokenizerBase, args: SearchGRPOConfig
) -> LogProbs:
    """Compares the log-probs of two trajectories, one of them longer than the model's window, with a plain forward.
    Returns the given ones or, with `packed_attention="auto"`, the padded ones if only packs are wrong.

    Raises:
        UserError: if the log-probs differ by more than rounding.
    """
    was_training = model.training
    model.eval()
    try:
        problem = _difference(logprobs, wrapped, model, tokenizer, args)
        if problem and args.packed_attention == "auto" and logprobs.attention != "padded":
            padded = dataclasses.replace(logprobs, attention="padded")
            if not _difference(padded, wrapped, model, tokenizer, args):
                logger.warning("log-probs: padded instead of %s, whose %s", logprobs.attention, problem)
                return padded
    finally:
        model.train(was_training)
    if problem:
        name = type(probe.bare_model(model)).__name__
        remedy = "set packed_attention: padded"
        if logprobs.attention == "padded":
            remedy = "padding does not work with this model: set per_device_train_batch_size: 1, or use another model"
        raise UserError(
            f"packed_attention={logprobs.attention!r} computes log-probs that differ from {name}'s: {problem}; "
            f"{remedy}"
        )
    return logprobs


def _difference(
    logprobs: LogProbs, wrapped: Any, model: Any, tokenizer: PreTrainedTokenizerBase, args: SearchGRPOConfig
) -> str:
    device = next(model.parameters()).device
    lengths = probe.probe_length(model, device), _PROMPT
    prompts = [probe.random_ids(tokenizer, model, length, seed=i) for i, length in enumerate(lengths)]
    completions = [probe.random_ids(tokenizer, model, _COMPLETION - 3 * i, seed=2 + i) for i in range(2)]
    width = max(lengths)
    ids_BT, mask_BT = torch.zeros(2, 2, width + _COMPLETION, dtype=torch.long, device=device)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        columns = slice(width - len(prompt), width + len(completion))
        ids_BT[row, columns] = torch.tensor([*prompt, *completion], device=device)
        mask_BT[row, columns] = 1
    expected = [
        _alone(logprobs, wrapped, prompt, completion, device)
        if is_deepspeed_zero3_enabled()
        else probe.plain_logprobs(wrapped, prompt, completion, model=model, temperature=args.temperature)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    try:
        found_BC = logprobs(wrapped, ids_BT, mask_BT, _COMPLETION, None)[0].float().cpu()
    # An architecture may raise any exception when it runs packed or padded.
    except Exception as error:
        return f"forward raises {type(error).__name__}: {error}"
    found = [found_BC[row, : len(completion)] for row, completion in enumerate(completions)]
    float32 = probe.computes_in_float32(model) and not torch.is_autocast_enabled(device.type)
    return probe.differ(torch.cat(found), torch.cat(expected), float32=float32)


def _alone(logprobs: LogProbs, wrapped: Any, prompt: list[int], completion: list[int], device: Any) -> torch.Tensor:
    """Log-probs of a completion in a batch of one, so without padding, but from TRL's fused head.

    Under ZeRO-3, a plain forward makes DeepSpeed prefetch the head's weights from then on. The fused head, which runs
    next, fetches them itself, and fails if the prefetch has begun.
    """
    ids_BT = torch.tensor([[*prompt, *completion]], device=device)
    padded = dataclasses.replace(logprobs, attention="padded")
    return padded(wrapped, ids_BT, torch.ones_like(ids_BT), len(completion), None)[0][0].float().cpu()
