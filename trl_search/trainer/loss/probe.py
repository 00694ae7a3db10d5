"""Are the log-probs of the loss those of the model itself? Two random trajectories tell, before the first step.

The same question is asked of the engine that samples (`policies/probe.py`): both are held to one plain forward.
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

    Args:
        logprobs ([`LogProbs`]): As `make_logprobs` made it.
        wrapped: The policy as the loss calls it.
        model: The policy without wrappers of distribution.
        args ([`SearchGRPOConfig`]): `packed_attention` and `temperature` are read.

    Returns:
        `LogProbs`: The one given; with `packed_attention="auto"` that of the padded path if only packs are wrong.

    Raises:
        UserError: if they differ by more than rounding explains.
    """
    was_training = model.training
    model.eval()
    try:
        problem = _difference(logprobs, wrapped, model, tokenizer, args)
        if problem and args.packed_attention == "auto" and logprobs.attention != "padded":
            padded = dataclasses.replace(logprobs, attention="padded")
            if not _difference(padded, wrapped, model, tokenizer, args):
                logger.warning("log-probs: padded in place of %s, whose %s", logprobs.attention, problem)
                return padded
    finally:
        model.train(was_training)
    if problem:
        name = type(probe.bare_model(model)).__name__
        remedy = "set packed_attention: padded"
        if logprobs.attention == "padded":
            remedy = "this model cannot be trained with padding; set per_device_train_batch_size: 1, or take another"
        raise UserError(
            f"packed_attention={logprobs.attention!r} computes other log-probs than {name} itself: {problem}; {remedy}"
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
    # Whatever an architecture raises when it is run in packs, or padded.
    except Exception as error:
        return f"forward raises {type(error).__name__}: {error}"
    found = [found_BC[row, : len(completion)] for row, completion in enumerate(completions)]
    float32 = probe.computes_in_float32(model) and not torch.is_autocast_enabled(device.type)
    return probe.differ(torch.cat(found), torch.cat(expected), float32=float32)


def _alone(logprobs: LogProbs, wrapped: Any, prompt: list[int], completion: list[int], device: Any) -> torch.Tensor:
    """Log-probs of a completion in a batch of its own, so without padding, but by TRL's fused head.

    Under ZeRO-3 a plain forward teaches DeepSpeed to fetch the head's weights ahead of time. The fused head, which
    comes next, fetches them itself, and fails when they are on their way already.
    """
    ids_BT = torch.tensor([[*prompt, *completion]], device=device)
    padded = dataclasses.replace(logprobs, attention="padded")
    return padded(wrapped, ids_BT, torch.ones_like(ids_BT), len(completion), None)[0][0].float().cpu()
