"""Keeps a resumed cold start at the same place in its trajectories, or refuses to train.

transformers skips as many batches as the checkpoint was trained on. A larger collection, or scripts for another
`max_steps`, are shuffled into another order, so the run would train on some trajectories twice and on others never.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainingArguments

from trl_search.common.files import write_json
from trl_search.trainer.groups.question_order import check_order
from trl_search.trainer.resume import checkpoint_folder

FILE = "trajectory_order.json"


class KeepsTrajectoryOrder(Trainer):
    """A mixin that compares the trajectories of a resumed run with its checkpoint's. List it before TRL's trainer, and
    set `order` before the training."""

    order: dict[str, Any]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A resumed training calls it before its first batch.

        Raises:
            UserError: if the checkpoint was trained in another order.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.args.ignore_data_skip:
            check_order(Path(checkpoint, FILE), self.order, "trajectories")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            write_json(checkpoint_folder(self, trial) / FILE, self.order)
        super()._save_checkpoint(model, trial)


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
