"""A key-value cache with one slot per running conversation, for continuous batching on any `transformers` decoder.

Without a paged kernel, `transformers`' own continuous batching attends over all sequences of a batch at once, so its
cost on a CPU grows much faster with the batch (`benchmarks/engine.py` measures it). Here a slot is one row of a
(slots, heads, capacity, head_dim) tensor per layer, and one padded SDPA call serves the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

# The name under which `slot_attention` is registered with transformers.
SLOT_ATTENTION = "trl_search_slots"
# Rows grow in steps of this many tokens.
_CAPACITY_STEP = 256


class SlotCache(Cache):
    """Keys and values of up to `slots` conversations. `select` sets the rows and positions of the next forward.

    The last position of every row is scratch space: padding is written there and never read.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.slots = slots
        self.capacity = 0
        self.length = 0
        self.keys: list[torch.Tensor] = []  # one per layer: (slots, key-value heads, capacity, head_dim)
        self.values: list[torch.Tensor] = []

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` tokens per row and keeps the content."""
        if tokens < self.capacity:  # the last position is scratch space
            return
        self.capacity = (tokens // _CAPACITY_STEP + 1) * _CAPACITY_STEP
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                new = old.new_zeros(self.slots, old.shape[1], self.capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                store[layer] = new

    def select(self, rows_B: torch.Tensor, positions_BT: torch.Tensor, length: int) -> torch.Tensor:
        """Sets where the next forward writes, and returns its attention mask.

        Args:
            rows_B: The slots of the batch.
            positions_BT: The position of each new token; -1 for padding.
            length: Number of positions that are read: one more than the highest of `positions_BT`.

        Returns:
            (B, 1, T, length) booleans: each token attends to its row up to and including itself.
        """
        self.rows_B, self.length = rows_B, length
        self.write_BT = positions_BT.where(positions_BT >= 0, self.capacity - 1)
        # Rows 0, 1, 2, ... can be read in place; other rows must be copied.
        self.in_place = bool((rows_B == torch.arange(len(rows_B), device=rows_B.device)).all())
        visible = torch.arange(length, device=rows_B.device) <= positions_BT.clamp(min=0).unsqueeze(-1)
        return visible.unsqueeze(1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values, (B, heads, T, head_dim), and returns the rows' whole history."""
        if layer_idx == len(self.keys):
            for states, kept in ((key_states, self.keys), (value_states, self.values)):
                kept.append(states.new_zeros(self.slots, states.shape[1], self.capacity, states.shape[3]))
        history = []
        for store, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            store[self.rows_B.unsqueeze(1), :, self.write_BT] = new.transpose(1, 2)
            used = store[:, :, : self.length]  # cut first, so that less is copied
            history.append(used[: len(self.rows_B)] if self.in_place else used.index_select(0, self.rows_B))
        return history[0], history[1]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of `source` to `target`, so that a group's prompt is computed once."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA that reads grouped keys and values in place. With a mask, transformers' own SDPA repeats them for every
    query head, which copies the whole cache in every step: on a CPU, six times the cost of the attention itself.

    Args:
        query: (B, heads, T, head_dim).
        key, value: (B, key-value heads, length, head_dim).
        attention_mask: (B, 1, T, length), True where a token attends: its row from position 0 up to itself.
        sliding_window: The layer's window: a token attends to itself and the `sliding_window - 1` tokens before it.

    Raises:
        NotImplementedError: if the model's attention uses a feature that this cache does not support.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"its attention uses {', '.join(unknown)}")
    if attention_mask is not None and sliding_window is not None and attention_mask.shape[-1] > sliding_window:
        first_BT1 = attention_mask.sum(dim=-1, keepdim=True) - sliding_window
        attention_mask = attention_mask & (torch.arange(key.shape[2], device=key.device) >= first_BT1)
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
