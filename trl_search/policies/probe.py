"""Checks before training, with a few random tokens, that an engine computes the model that it was given.

Engines and kernels replace parts of a model: its cache, its attention, its positions. If an architecture does not
permit that, an engine may sample from another distribution without an error. So the log-probs of a few tokens, past
the sliding window if there is one, are compared with those of one plain forward.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens of the longest probe. A longer window is not crossed, because that would take minutes on a CPU.
_MAX_TOKENS = {"cpu": 1024}
_MAX_TOKENS_GPU = 8192
_SHORT, _PAST_WINDOW = 9, 12
# The largest mean difference that rounding explains. Two correct computations of a real 0.5B model differed by 0.10 on
# average over such tokens in bfloat16, and by 2e-5 in float32. Wrong positions or windows differ by 1 and more.
_TOLERANCE_FLOAT32, _TOLERANCE_HALF = 5e-3, 0.4


def bare_model(model: Any) -> PreTrainedModel:
    """The causal language model inside a PEFT wrapper."""
    bare: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    return bare


def window_of(model: Any) -> int | None:
    """The sliding window of a model's layers, in tokens. Some families have one but no `layer_types`."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return window if window and (kinds is None or "sliding_attention" in kinds) else None


def positions_of_model(model: Any) -> int | None:
    """The tokens of the longest conversation that a model can read; `None` if it has no limit."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def probe_length(model: Any, device: torch.device) -> int:
    """The number of tokens of a probe, past the model's window unless that takes too long on this device."""
    window = window_of(model) or 0
    length = window + _PAST_WINDOW if window < _MAX_TOKENS.get(device.type, _MAX_TOKENS_GPU) else 2 * _PAST_WINDOW
    room = positions_of_model(model) or length + _SHORT
    return max(_SHORT, min(max(length, 2 * _PAST_WINDOW), room - _SHORT))


def random_ids(tokenizer: PreTrainedTokenizerBase | None, model: Any, count: int, *, seed: int) -> list[int]:
    """Random ordinary tokens, without image and control tokens."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    special: set[int] = set()
    if tokenizer is not None:
        vocabulary = min(vocabulary, len(tokenizer.get_vocab()))
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    draw = random.Random(seed)
    ordinary = [token for token in (draw.randrange(vocabulary) for _ in range(4 * count + 64)) if token not in special]
    return (ordinary * count)[:count] if ordinary else [0] * count


@torch.no_grad()
def plain_logprobs(
    called: Any, prompt_ids: Sequence[int], ids: Sequence[int], *, model: Any = None, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of `ids` after `prompt_ids` by one forward without cache, padding or other sequences. (len(ids))
    `called` computes it: `model`, or its wrapper."""
    model = called if model is None else model
    ids_BT = torch.tensor([[*prompt_ids, *ids]], device=next(model.parameters()).device)
    options = {"output_router_logits": False} if has_router_logits(model) else {}
    logits_TV = called(input_ids=ids_BT, use_cache=False, **options).logits[0, -len(ids) - 1 : -1].float()
    logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
    return logprobs_TV.gather(-1, ids_BT[0, -len(ids) :].unsqueeze(-1)).squeeze(-1).cpu()


def has_router_logits(model: Any) -> bool:
    """Whether a forward may compute a load-balancing loss of experts, which expects a mask of shape (B, T)."""
    return hasattr(model.config.get_text_config(), "output_router_logits")


def differ(found_N: torch.Tensor, expected_N: torch.Tensor, *, float32: bool) -> str:
    """How two computations of the same log-probs differ, in words; empty if rounding explains the difference."""
    gaps_N = (found_N - expected_N).abs()
    mean = float(gaps_N.mean())
    if mean <= (_TOLERANCE_FLOAT32 if float32 else _TOLERANCE_HALF):
        return ""
    return f"log-probs of the same {len(gaps_N)} tokens differ by {mean:.2g} on average and {gaps_N.max():.2g} at most"


def computes_in_float32(model: Any) -> bool:
    # accelerate sets `_original_forward` when it wraps the forward in autocast.
    return bare_model(model).dtype == torch.float32 and not hasattr(model, "_original_forward")
