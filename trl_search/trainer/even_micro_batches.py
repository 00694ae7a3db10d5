"""Deals the trajectories of all ranks to micro-batches that take equally long.

The ranks wait for each other in every micro-batch: TRL gathers its metrics there, and FSDP2 and ZeRO gather weights.
Trajectories differ in length, and those without an advantage do not run at all (`loss/without_gradient.py`). In TRL's
random order, each micro-batch therefore takes as long as that of the slowest rank:

    tokens that run    micro-batch 1    2    3          as dealt    1    2    3
    rank 0                       900  200  700                    500  500  600
    rank 1                       100  600  500                    500  500  400
    all wait for                 900  600  700                    500  500  600

Rows change places after everything about them is known (rewards, advantages, log-probs), before the first micro-batch.
The terms of the loss stay the same, so its gradient does too, except for terms that are means within a micro-batch and
so depend on the order, as in TRL: `loss_type: bnpo`, LLDS, the entropy bonus and `top_entropy_quantile`.

If a batch has several optimizer steps, each of them gets rows of all lengths. Otherwise, with few rows per
micro-batch, a step would have only long rows, which are wrong more often than short ones, or none that runs.

Suffixes: B trajectories of this rank, R trajectories of all ranks, C completion tokens.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import pad_across_processes
from trl import GRPOTrainer

from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import Environment
from trl_search.trainer.loss.mask import loss_mask_of
from trl_search.trainer.loss.without_gradient import tokens_with_gradient

# TRL's entries of a batch. All but the first have one row per trajectory; prompts are padded on the left.
OF_THE_BATCH = "num_items_in_batch"
PROMPTS = ("prompt_ids", "prompt_mask")
OTHERS = (
    "completion_ids", "completion_mask", "tool_mask", "advantages", "old_per_token_logps", "ref_per_token_logps",
    "sampling_per_token_logps", "importance_sampling_ratio",
)  # fmt: skip


class EvenMicroBatches(GRPOTrainer):
    """A mixin that deals each generation batch of several ranks. List it before TRL's trainer."""

    args: SearchGRPOConfig
    environment: Environment | None
    all_run: bool
    _buffered_inputs: Any  # the micro-batches of this rank

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.environment is None or self.accelerator.num_processes == 1 or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = self._dealt(self._buffered_inputs)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    def _dealt(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of this rank, with rows of all ranks."""
        batch = joined(micro_batches)
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        costs_R = self.accelerator.gather(tokens_to_run(batch, all_run=self.all_run)).tolist()
        # The same on all ranks.
        draw = random.Random(f"{self.args.seed}/{self.state.global_step}")
        steps = len(micro_batches) // math.gcd(len(micro_batches), self.args.gradient_accumulation_steps)
        places = deal(costs_R, ranks, len(micro_batches), steps, draw)[rank]
        of_the_batch = batch.pop(OF_THE_BATCH)
        mine = [{OF_THE_BATCH: of_the_batch} for _ in places]
        for name, tensor in batch.items():  # one entry after the other, because the rows of all ranks may be many
            everywhere = self.accelerator.gather(pad_across_processes(tensor, dim=1, pad_first=name in PROMPTS))
            for micro_batch, rows in zip(mine, places, strict=True):
                micro_batch[name] = everywhere[rows]
        return mine


def joined(micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The batch that TRL has split into these micro-batches.

    Raises:
        ValueError: for an entry that is not known to have one row per trajectory.
    """
    known = {OF_THE_BATCH, *PROMPTS, *OTHERS}
    if unknown := micro_batches[0].keys() - known:
        raise ValueError(f"TRL's batch has entries that trl-search cannot move between ranks: {sorted(unknown)}")
    return {
        name: value if name == OF_THE_BATCH else torch.cat([micro_batch[name] for micro_batch in micro_batches])
        for name, value in micro_batches[0].items()
    }


def tokens_to_run(batch: Mapping[str, torch.Tensor], *, all_run: bool) -> torch.Tensor:
    """The tokens that the loss runs for each trajectory, (B,): 0 for one that cannot change the weights."""
    mask_BC = loss_mask_of(batch)
    runs_BC = mask_BC if all_run else tokens_with_gradient(batch["advantages"], mask_BC)
    return (batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)) * runs_BC.any(dim=1)


def deal(
    costs_R: Sequence[int], ranks: int, micro_batches: int, steps: int, draw: random.Random
) -> list[list[list[int]]]:
    """Deals rows to `ranks` x `micro_batches` places of equal size. Returns the rows of each rank, by micro-batch.

    The rows of each optimizer step are drawn, as many of each length for every step. Within a step, the longest row
    goes first, to the place that has least, and places of similar length get the same number on all ranks.

    Example:
        >>> deal([9, 1, 5, 5, 2, 8, 3, 7], ranks=2, micro_batches=2, steps=1, draw=random.Random(0))
        [[[0, 1], [7, 6]], [[5, 4], [2, 3]]]
    """
    longest_first = sorted(range(len(costs_R)), key=lambda row: -costs_R[row])
    rows_of_step: list[list[int]] = [[] for _ in range(steps)]
    for first in range(0, len(longest_first), steps):
        for rows, row in zip(rows_of_step, draw.sample(longest_first[first : first + steps], steps), strict=True):
            rows.append(row)
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for rows in rows_of_step:
        places = even_places(rows, costs_R, ranks * micro_batches // steps)
        for place, its_rows in enumerate(places):
            dealt[place % ranks].append(its_rows)
    return dealt


def even_places(longest_first: Sequence[int], costs_R: Sequence[int], count: int) -> list[list[int]]:
    """Deals rows to `count` places of equal size and about equal cost, and sorts the places by it."""
    size = len(longest_first) // count
    places: list[list[int]] = [[] for _ in range(count)]
    least = [(0, place) for place in range(count)]
    for row in longest_first:
        cost, place = heapq.heappop(least)
        places[place].append(row)
        if len(places[place]) < size:
            heapq.heappush(least, (cost + costs_R[row], place))
    return sorted(places, key=lambda rows: sum(costs_R[row] for row in rows))
