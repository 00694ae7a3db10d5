"""How long ranks wait for each other in the loss, in TRL's random order and as `trl_search` deals the trajectories.

    python benchmarks/even_micro_batches.py

512 trajectories in groups of 8, whose lengths follow the plans of `vllm_shape.py`, in micro-batches of up to 8 rows. A
given share of the groups has equal rewards; their trajectories do not run. All ranks wait for the one with most tokens
in each micro-batch; a value of 1 is a batch that is spread evenly. A batch is one optimizer step. Values are means
over 50 batches. Nothing is trained: `scaling_gpus.py` measures whole steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import mean

import vllm_shape

from trl_search.trainer.even_micro_batches import deal

TRAJECTORIES, GROUP, ROWS, BATCHES, PROMPT = 512, vllm_shape.GROUP, 8, 50, 60


def a_batch(silent_share: float, seed: int) -> list[int]:
    """The tokens that run of each trajectory, group after group."""
    draw = random.Random(seed)
    plans = vllm_shape.make_plans(TRAJECTORIES, seed=seed)
    tokens = [PROMPT + sum(plan.turns) + sum(plan.observations) for plan in plans]
    for first in range(0, TRAJECTORIES, GROUP):
        if draw.random() < silent_share:
            tokens[first : first + GROUP] = [0] * GROUP
    return tokens


def shuffled(ranks: int, micro_batches: int, draw: random.Random) -> list[list[list[int]]]:
    """TRL's order: each rank keeps its rows, in random order."""
    size, own = TRAJECTORIES // (ranks * micro_batches), TRAJECTORIES // ranks
    dealt = []
    for rank in range(ranks):
        rows = list(range(own * rank, own * (rank + 1)))
        draw.shuffle(rows)
        dealt.append([rows[first : first + size] for first in range(0, own, size)])
    return dealt


def waited_for(tokens: Sequence[int], dealt: Sequence[Sequence[Sequence[int]]]) -> float:
    """Tokens of the slowest rank in each micro-batch, as a multiple of an even share."""
    together = zip(*dealt, strict=True)
    slowest = sum(max(sum(tokens[row] for row in rows) for rows in ranks) for ranks in together)
    return slowest / (sum(tokens) / len(dealt))


def main() -> None:
    print("| GPUs | groups of equal rewards | TRL's order | dealt |\n|---|---|---|---|")
    for ranks in (2, 4, 8, 32):
        micro_batches = TRAJECTORIES // ranks // ROWS
        for silent_share in (0.0, 0.4):
            theirs, ours = [], []
            for seed in range(BATCHES):
                tokens, draw = a_batch(silent_share, seed), random.Random(seed)
                theirs.append(waited_for(tokens, shuffled(ranks, micro_batches, draw)))
                ours.append(waited_for(tokens, deal(tokens, ranks, micro_batches, 1, draw)))
            print(f"| {ranks} | {silent_share:.0%} | {mean(theirs):.2f} | {mean(ours):.2f} |")


if __name__ == "__main__":
    main()
