"""Samples tokens from logits: temperature, top-k, top-p and min-p, with one uniform number per token."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_search.types import Sampling


def sample(logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one token per row by inverting the cumulative distribution at `uniforms_B` (in [0, 1)).

    Each request draws one number per token from its own generator, so its samples do not depend on the batch.

    Returns:
        The ids (B) and their logprobs (B) at this temperature, before top-p, top-k and min-p.
    """
    greedy = sampling.temperature == 0
    scaled_BV = logits_BV if greedy else logits_BV / sampling.temperature
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    if greedy:
        ids_B = scaled_BV.argmax(dim=-1)
    else:
        filters = LogitsProcessorList()
        if sampling.top_k > 0:
            filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            filters.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            filters.append(MinPLogitsWarper(sampling.min_p))
        # These filters do not read their first argument, the ids so far.
        kept_BV = filters(None, scaled_BV).softmax(dim=-1) if filters else logprobs_BV.exp()  # type: ignore[arg-type]
        cumulative_BV = kept_BV.cumsum(dim=-1)
        total_B1 = cumulative_BV[:, -1:]
        # A uniform just below 1 rounds to 1 in float32, which would select a token of probability 0.
        below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
        targets_B1 = (uniforms_B.to(cumulative_BV).unsqueeze(-1) * total_B1).minimum(below_B1)
        ids_B = torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)
        ids_B = ids_B.clamp(max=logits_BV.shape[-1] - 1)
    return ids_B, logprobs_BV.gather(-1, ids_B.unsqueeze(-1)).squeeze(-1)
