"""Per-token log-probs of ragged trajectories without most of their padding.

TRL pads a whole generation batch to its longest trajectory, and every micro-batch runs at that width. A search agent's
are ragged: one answers at once, another reads nine passages. Here the rows of a micro-batch are sorted by length and
run in a few chunks, each cut to its own width. The numbers are those of the padded forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# A chunk has at least this many rows, and a micro-batch at most so many chunks. The number of chunks depends on the
# number of rows alone: ranks that shard a model must all run the same number of forwards.
MIN_ROWS, MAX_CHUNKS = 4, 4

# (input_ids, attention_mask, logits_to_keep) -> log-probs, entropies or None, auxiliary loss or None
Forward = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]


def logps_by_length(
    forward: Forward, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor, logits_to_keep: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Calls `forward` on chunks of rows of like length, and puts their results together as one call would.

    Args:
        forward (`Callable`): TRL's own `_get_per_token_logps_and_entropies`, for one chunk.
        input_ids_BT, attention_mask_BT: Prompts padded on the left, completions padded on the right.
        logits_to_keep (`int`): Columns of the completion, C.

    Returns:
        Log-probs (B, C), 0 where a row is padded; entropies (B, C) or None; the auxiliary loss or None.
    """
    rows, width = input_ids_BT.shape
    count = max(1, min(MAX_CHUNKS, rows // MIN_ROWS))
    order_B = attention_mask_BT.sum(dim=1).argsort(stable=True) if count > 1 else torch.arange(rows)
    chunks = order_B.to(input_ids_BT.device).chunk(count)
    logps, entropies, aux_losses = [], [], []
    for chunk in chunks:
        used = attention_mask_BT[chunk].any(dim=0).nonzero()
        prompt = width - logits_to_keep
        # One column of prompt and one of completion always stay: a row may be masked out altogether.
        start = min(int(used[0]) if len(used) else 0, prompt - 1)
        end = max(int(used[-1]) + 1 if len(used) else 0, prompt + 1)
        logps_bc, entropies_bc, aux_loss = forward(
            input_ids_BT[chunk, start:end], attention_mask_BT[chunk, start:end], end - prompt
        )
        missing = width - end
        logps.append(torch.nn.functional.pad(logps_bc, (0, missing)))
        if entropies_bc is not None:
            entropies.append(torch.nn.functional.pad(entropies_bc, (0, missing)))
        if aux_loss is not None:
            aux_losses.append(aux_loss * (len(chunk) / rows))
    back_B = order_B.argsort()
    return (
        torch.cat(logps)[back_B],
        torch.cat(entropies)[back_B] if entropies else None,
        torch.stack(aux_losses).sum() if aux_losses else None,
    )
