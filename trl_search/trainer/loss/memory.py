"""Estimates how many tokens fit in a pack, from the GPU's free memory and the model's shape (`max_packed_tokens: 0`).

    free memory, minus what optimizer and gradients will still allocate            48.0 GB
    × 0.8, for kernels and fragmentation                                           38.4 GB
    activations of one token of a 3B model, all 36 layers: 36 × 146 kB              5.3 MB
    tokens of a pack                                                                  7,284

A layer keeps for its backward, in numbers per token (h hidden, i intermediate, q and k the widths of queries and
keys): 12 h for two norms, which compute in float32, 2 q + 2 k for attention, 4 i for the MLP. With gradient
checkpointing, every layer keeps only its input, for all packs of the micro-batch, and one layer at a time keeps the
rest twice, as values and gradients.

With `gradient_checkpointing: false`, a micro-batch that fits is one pack, and nothing is computed twice. If it does
not fit, all packs except the last run twice.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

FALLBACK = 16384  # if memory is unknown: on a CPU, and without a backward
MOST = 65536  # kernels do not get faster with more tokens
USABLE = 0.8


class RoomForPacks:
    """The maximum tokens per pack. Memory is measured once, at the first forward with gradients."""

    def __init__(self, model: torch.nn.Module, config: Any, number_bytes: int) -> None:
        self.model, self.config, self.number_bytes = model, config, number_bytes
        self._usable: float | None = None

    def __call__(self, micro_batch_tokens: int, *, checkpointing: bool) -> int:
        """The maximum tokens per pack, for a micro-batch of this many tokens."""
        device = next(self.model.parameters()).device
        if device.type != "cuda" or not torch.is_grad_enabled():
            return FALLBACK
        first, checkpointed_tokens = self._usable is None, micro_batch_tokens if checkpointing else None
        if self._usable is None:
            self._usable = USABLE * (free_bytes(device) - bytes_to_come(self.model))
        tokens = tokens_that_fit(self._usable, self.config, self.number_bytes, checkpointed_tokens)
        if first:
            logger.info("packs of up to %d tokens, in %.1f GB of memory", tokens, self._usable / 1e9)
        return tokens


def tokens_that_fit(usable_bytes: float, config: Any, number_bytes: int, checkpointed_tokens: int | None) -> int:
    """The number of tokens whose activations fit in memory, from 1 to `MOST`."""
    layers, layer_bytes = config.num_hidden_layers, number_bytes * numbers_per_token(config)
    if checkpointed_tokens is None:
        return max(1, min(MOST, int(usable_bytes / (layers * layer_bytes))))
    kept = checkpointed_tokens * layers * config.hidden_size * number_bytes
    return max(1, min(MOST, int((usable_bytes - kept) / (2 * layer_bytes))))


def numbers_per_token(config: Any) -> int:
    """How many numbers one layer keeps per token for its backward."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // heads
    keys = head * (getattr(config, "num_key_value_heads", None) or heads)
    experts = getattr(config, "num_experts_per_tok", None) or 0
    intermediate = max(config.intermediate_size, experts * (getattr(config, "moe_intermediate_size", None) or 0))
    return int(12 * hidden + 2 * head * heads + 2 * keys + 4 * intermediate)


def free_bytes(device: torch.device) -> int:
    """Free memory, including what PyTorch has reserved but does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bytes_to_come(model: torch.nn.Module) -> int:
    """Bytes of gradients not yet allocated, and of AdamW's two numbers per weight, allocated in the first step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [(p.to_local() if hasattr(p, "to_local") else p).nbytes for p in trained]
    return 2 * sum(sizes) + sum(size for p, size in zip(trained, sizes, strict=True) if p.grad is None)
