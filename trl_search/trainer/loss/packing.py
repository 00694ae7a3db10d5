"""Which tokens of a batch run, in which pack, and which of them are scored.

TRL's batch is padded on the left of the prompts and on the right of the completions. An example with two trajectories
(P prompt, C completion, w observation):

    . P P C C w w C .        pack    P P C C w w P C C C     no padding; positions restart with each trajectory
    . . P C C C w w w        scored    * *     *   * * *     hidden states whose next token the policy wrote

Only tokens that a scored token depends on run. This leaves out the last token of a trajectory, all tokens after the
last scored one (an observation that the budget cut off), and trajectories without a scored token (a failed search).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pack:
    """Concatenated trajectories of T tokens, with N scored hidden states. All tensors are indices, on the CPU."""

    tokens_T: torch.Tensor  # the tokens, as indices into the flattened (B, P + C) batch
    positions_T: torch.Tensor  # the position of each token in its own trajectory
    lengths: list[int]  # tokens per trajectory
    scored_N: torch.Tensor  # the hidden states that are projected, as indices into T
    targets_N: torch.Tensor  # the tokens that they predict, as indices into the flattened (B, P + C) batch


def scored_tokens(attention_mask_BT: torch.Tensor, loss_mask_BC: torch.Tensor) -> torch.Tensor:
    """(B, T) booleans: completion tokens that are in the loss and have a token before them."""
    attended_BT = attention_mask_BT.bool()
    scored_BT = torch.zeros_like(attended_BT)
    columns = loss_mask_BC.shape[1]
    scored_BT[:, -columns:] = loss_mask_BC.bool() & attended_BT[:, -columns:]
    scored_BT[:, 1:] &= attended_BT[:, :-1]
    scored_BT[:, 0] = False
    return scored_BT


def needed_tokens(attention_mask_BT: torch.Tensor, scored_BT: torch.Tensor) -> torch.Tensor:
    """(B, T) booleans: tokens before a scored token of their row."""
    later_BT = scored_BT.flip(1).cumsum(1).flip(1) - scored_BT.long()  # scored tokens after each column
    return attention_mask_BT.bool() & (later_BT > 0)


def assign(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Divides trajectories into few packs of at most `max_tokens`, of similar size. A longer one gets its own pack.

    Trajectories are assigned longest first, each to the emptiest pack; the number of packs grows until all fit.
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
    """Packs of at most `max_tokens` tokens, with every needed token once and every scored token as a target."""
    scored_BT = scored_BT.cpu()
    needed_BT = needed_tokens(attention_mask_BT.cpu(), scored_BT)
    rows = [row.nonzero().squeeze(1) for row in needed_BT]  # columns of each row's tokens
    width = needed_BT.shape[1]
    packs = []
    for members in assign([len(columns) for columns in rows], max_tokens):
        tokens_T = torch.cat([row * width + rows[row] for row in members])
        followed_T = scored_BT.flatten()[tokens_T + 1]  # within the row, because the last column is never needed
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
    """A pack of one token with nothing scored, for a rank with fewer packs than the others."""
    none = torch.zeros(0, dtype=torch.long)
    one = torch.zeros(1, dtype=torch.long)
    return Pack(tokens_T=one, positions_T=one, lengths=[1], scored_N=none, targets_N=none)
