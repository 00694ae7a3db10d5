"""Keeps all ranks, and a resumed run, at the same place in the training questions, or refuses to train.

    checkpoint-40/question_order.json    {"seed": 42, "shuffle_dataset": true, "number of questions": 90447,
                                          "questions": "3f1c…", "questions per batch": 64, "steps per batch": 1.0}

`resumed_order.py` compares it with the order of a resumed run. Every rank takes its rows of a batch by their number in
the dataset, so if ranks had other questions, a group that is spread over ranks would mix them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import Trainer

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import Environment
from trl_search.records.trajectory_log import question_text
from trl_search.trainer.resumed_order import ResumesInOrder


class EpochOrder(Sampler[int]):
    """The order of TRL's sampler for the trainer's current epoch.

    TRL's sampler counts the epochs of this process, so a run that resumes in its second epoch would get the order of
    the first.
    """

    def __init__(self, sampler: Any, trainer: Trainer) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(int((self.trainer.state.epoch or 0) + 1e-6)):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)


class KeepsOrder(ResumesInOrder):
    """A mixin that asks each question once per epoch, also if the run is resumed. List it before TRL's trainer."""

    args: SearchGRPOConfig
    environment: Environment | None
    train_dataset: Any

    def note_order(self) -> None:
        """Notes the order of the questions when a training begins. Every rank must call it.

        Raises:
            UserError: if the ranks have different questions, or the same in another order.
        """
        self.order = order_of(self.args, self.train_dataset)
        if self.accelerator.num_processes == 1:
            return
        digest = self.order["questions"] or digest_of(self.train_dataset.take(self.args.generation_batch_size))
        if len(set(gather_object([digest]))) > 1:
            raise UserError(
                "the processes have different training questions, or the same in another order: load and shuffle them "
                "in each process in the same way, with a fixed seed"
            )

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return EpochOrder(super()._get_train_sampler(dataset), self)


def order_of(args: SearchGRPOConfig, dataset: Any) -> dict[str, Any]:
    """Everything that determines which questions the n-th optimizer step trains on; of a stream, which cannot be read
    twice, without its questions."""
    known = isinstance(dataset, Dataset)
    return {
        "seed": args.seed,
        "shuffle_dataset": args.shuffle_dataset,
        "number of questions": len(dataset) if known else None,
        "questions": digest_of(dataset) if known else None,
        "questions per batch": (args.generation_batch_size or 1) // (args.num_generations or 1),
        "steps per batch": (args.steps_per_generation or 1) * args.num_iterations / args.gradient_accumulation_steps,
    }


def digest_of(dataset: Dataset | IterableDataset) -> str:
    """A digest of the questions of a dataset in their order."""
    digest = hashlib.sha256()
    if isinstance(dataset, Dataset):  # reads only one column
        dataset = dataset.select_columns("question" if "question" in dataset.column_names else "prompt")
    for rows in dataset.iter(batch_size=1000):
        column = "question" if "question" in rows else "prompt"
        for value in rows[column]:
            digest.update(f"{question_text({column: value})}\n".encode(errors="replace"))
    return digest.hexdigest()
