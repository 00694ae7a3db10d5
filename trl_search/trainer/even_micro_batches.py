"""Deals the trajectories of all ranks to micro-batches that take equally long.

The ranks wait for each other in every micro-batch: TRL gathers its metrics there, and FSDP2 and ZeRO gather weights.
Trajectories differ in length, and those without an advantage do not run at all (`loss/without_gradient.py`). In TRL's
random order, each micro-batch therefore takes as long as that of the slowest rank:

    tokens that run    micro-batch 1    2    3          as dealt    1    2    3
    rank 0                       900  200  700                    500  500  600
    rank 1                       100  600  500                    500  500  400
    all wait for                 900  600  700                    500  500  600

Rows change places after everything about them is known (rewards, advantages, log-probs), before the first micro-batch.
The terms of the loss stay the same, so its gradient does too (`loss_type: bnpo` is a mean within each micro-batch, and
depends on the order as it does in TRL).

Suffixes: B trajectories of this rank, R trajectories of all ranks, C completion tokens.
"""

from __future__ import annotations

import heapq
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
        places = deal(costs_R, ranks, len(micro_batches), draw)[rank]
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
    tokens_B = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
    if all_run:
        return tokens_B
    return tokens_B * tokens_with_gradient(batch["advantages"], loss_mask_of(batch)).any(dim=1)


def deal(costs_R: Sequence[int], ranks: int, micro_batches: int, draw: random.Random) -> list[list[list[int]]]:
    """
    Deals rows to `ranks` x `micro_batches` places of equal size: the longest row first, to the place that has least.

    Places of similar length get the same number on all ranks, and the numbers are drawn, so that no optimizer step of
    a batch has the longest trajectories.

    Args:
        costs_R (`Sequence[int]`): The cost of each row; their number is a multiple of the number of places.
        ranks, micro_batches (`int`): The places.
        draw (`random.Random`): In the same state on all ranks.

    Returns:
        The rows of each rank, by micro-batch.

    Example:
        >>> deal([9, 1, 5, 5, 2, 8, 3, 7], ranks=2, micro_batches=2, draw=random.Random(0))
        [[[0, 1], [7, 6]], [[5, 4], [2, 3]]]
    """
    size = len(costs_R) // (ranks * micro_batches)
    places: list[list[int]] = [[] for _ in range(ranks * micro_batches)]
    least = [(0, place) for place in range(len(places))]
    for row in sorted(range(len(costs_R)), key=lambda row: -costs_R[row]):
        cost, place = heapq.heappop(least)
        places[place].append(row)
        if len(places[place]) < size:
            heapq.heappush(least, (cost + costs_R[row], place))
    places.sort(key=lambda rows: sum(costs_R[row] for row in rows))
    together = [places[first : first + ranks] for first in range(0, len(places), ranks)]
    draw.shuffle(together)
    return [[rank_places[rank] for rank_places in together] for rank in range(ranks)]
