"""Keeps a resumed cold start at the same place in its trajectories, or refuses to train.

transformers skips as many batches as the checkpoint was trained on. A larger collection, or scripts for another
`max_steps`, are shuffled into another order, so the run would train on some trajectories twice and on others never.
"""

from __future__ import annotations

import hashlib
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from trl_search.trainer.resumed_order import ResumesInOrder


class KeepsTrajectoryOrder(ResumesInOrder):
    """A mixin that trains on each trajectory once per epoch, also if the run is resumed. List it before TRL's trainer,
    and set `order` before the training."""

    order_of_what = "trajectories"
    order_file = "trajectory_order.json"


def order_of(args: TrainingArguments, rows: Dataset) -> dict[str, Any]:
    """Everything that determines on which trajectories (`input_ids`) the n-th optimizer step trains."""
    digest = hashlib.sha256()
    for table in rows.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
        ids = table["input_ids"].combine_chunks()
        for numbers in (ids.value_lengths(), ids.flatten()):
            digest.update(numbers.to_numpy(zero_copy_only=False).tobytes())
    return {
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "number of trajectories": len(rows),
        "trajectories": digest.hexdigest(),
        "trajectories per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
