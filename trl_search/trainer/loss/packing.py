"""Which tokens of a batch run, in which pack, and which of them are scored.

TRL gives a padded batch: prompts on the right of their columns, completions on the left of theirs. Here two
trajectories, P prompt and C completion tokens, w the world's:

    . P P C C w w C .        pack    P P C C w w P C C C     no padding; positions restart with each trajectory
    . . P C C C w w w        scored    * *     *   * * *     hidden states whose next token the policy wrote

Only what a scored token depends on runs: neither a trajectory's last token, which nothing follows, nor what comes
after the last scored one (an observation that the budget cut off), nor a trajectory that has none (a failed search).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pack:
    """Trajectories one after the other, T tokens, N of whose hidden states are scored. Indices, on the CPU.

    Args:
        tokens_T: The tokens, as indices of the flattened (B, P + C) batch.
        positions_T: The position of each token in its own trajectory.
        lengths (`list[int]`): Tokens of each trajectory.
        scored_N: The hidden states that are projected, as indices of T.
        targets_N: The tokens they predict, as indices of the flattened (B, P + C) batch.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    lengths: list[int]
    scored_N: torch.Tensor
    targets_N: torch.Tensor


def scored_tokens(attention_mask_BT: torch.Tensor, loss_mask_BC: torch.Tensor) -> torch.Tensor:
    """(B, T) booleans: completion tokens that are in the loss and have a token before them to be predicted from."""
    attended_BT = attention_mask_BT.bool()
    scored_BT = torch.zeros_like(attended_BT)
    columns = loss_mask_BC.shape[1]
    scored_BT[:, -columns:] = loss_mask_BC.bool() & attended_BT[:, -columns:]
    scored_BT[:, 1:] &= attended_BT[:, :-1]
    scored_BT[:, 0] = False
    return scored_BT


def needed_tokens(attention_mask_BT: torch.Tensor, scored_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) booleans: tokens that stand before a scored token of their row."""
    later_BT = scored_BT.flip(1).cumsum(1).flip(1) - scored_BT.long()  # scored tokens after each column
    return attention_mask_BT.bool() & (later_BT > 0)


def assign(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """As few packs of at most `max_tokens` as possible, of similar size. A longer trajectory gets a pack of its own.

    Trajectories are assigned longest first, each to the emptiest pack, with one more pack until all fit.
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    alone = [[i] for i in order if lengths[i] >= max_tokens]
    order = order[len(alone) :]
    count = -(-sum(lengths[i] for i in order) // max_tokens)
    while True:
        packs: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for i in order:
            lightest = min(range(count), key=loads.__getitem__)
            packs[lightest].append(i)
            loads[lightest] += lengths[i]
        if all(load <= max_tokens for load in loads):
            return alone + packs
        count += 1


def make_packs(attention_mask_BT: torch.Tensor, scored_BT: torch.Tensor, max_tokens: int) -> list[Pack]:
    """Packs of at most `max_tokens` tokens that hold every needed token once, and every scored token as a target."""
    scored_BT = scored_BT.cpu()
    needed_BT = needed_tokens(attention_mask_BT.cpu(), scored_BT)
    rows = [row.nonzero().squeeze(1) for row in needed_BT]  # columns of each row's tokens
    width = needed_BT.shape[1]
    packs = []
    for members in assign([len(columns) for columns in rows], max_tokens):
        tokens_T = torch.cat([row * width + rows[row] for row in members])
        followed_T = scored_BT.flatten()[tokens_T + 1]  # a row's last column is never needed: + 1 stays within the row
        scored_N = followed_T.nonzero().squeeze(1)
        packs.append(
            Pack(
                tokens_T=tokens_T,
                positions_T=torch.cat([torch.arange(len(rows[row])) for row in members]),
                lengths=[len(rows[row]) for row in members],
                scored_N=scored_N,
                targets_N=tokens_T[scored_N] + 1,
            )
        )
    return packs


def idle_pack() -> Pack:
    """One token, nothing scored: for a rank that has nothing (more) to run while others do."""
    none = torch.zeros(0, dtype=torch.long)
    one = torch.zeros(1, dtype=torch.long)
    return Pack(tokens_T=one, positions_T=one, lengths=[1], scored_N=none, targets_N=none)
