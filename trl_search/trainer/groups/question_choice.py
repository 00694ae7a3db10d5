"""Draws questions beyond those of TRL's sampler, for the curriculum and for refill.

    TRL's sampler             q1 q2 q3 q4                      in the order of the epoch
    curriculum: pass_rate     q1 d1 q3 q4                      q2 was never solved: d1 replaces it
    spare, refill_groups: 2   d4 d5 d6 d7 | d8 d9 d10 d11      the replacements of each group in rounds 1 and 2

The draws d0, d1, … are all questions in a random order that depends on the seed, the step and the pass rates. Every
rank computes the same order and takes the draws of its own groups, so ranks need not communicate, and a resumed run
draws the same questions.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import PreTrainedModel, Trainer

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.thread_device import use_device
from trl_search.protocols import Protocol
from trl_search.trainer.batch import Question, Rollout
from trl_search.trainer.groups.group_rewards import Group, score_group
from trl_search.trainer.groups.pass_rates import PassRates
from trl_search.trainer.groups.refill import Refill
from trl_search.trainer.loss.mask import loss_mask
from trl_search.trainer.prompts import encode_prompts
from trl_search.trainer.resume import checkpoint_folder
from trl_search.types import Trajectory


class QuestionChoice:
    """Chooses the questions of each generation batch.

    Raises:
        UserError: if there are no other questions to draw, or they cannot be drawn.
    """

    def __init__(self, args: SearchGRPOConfig, dataset: Any, protocol: Protocol, accelerator: Accelerator) -> None:
        check_dataset(args, dataset)
        self.size = args.num_generations or 1
        self.args, self.dataset, self.protocol, self.accelerator = args, dataset, protocol, accelerator
        self._batches: Counter[int] = Counter()  # by step
        # None: all questions are drawn equally often.
        self.pass_rates = PassRates(dataset) if args.curriculum == "pass_rate" else None

    def choose(self, batch: Rollout, step: int) -> None:
        """Replaces some questions by the curriculum, and sets the spare questions. Every rank must call it."""
        size = self.size
        self._batches[step] += 1
        name = f"{self.args.seed}/questions/{step}/{self._batches[step]}"  # a resumed run repeats it
        here = len(batch.rows) // size
        first, groups = here * self.accelerator.process_index, here * self.accelerator.num_processes
        random = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()))
        weights_N = np.ones(len(self.dataset)) if self.pass_rates is None else self.pass_rates.weights_N
        order_N = draw_order(weights_N, random)
        chances = random.random(groups)[first : first + here]

        def drawn(number: int) -> dict[str, Any]:
            return dict(self.dataset[int(order_N[number % len(order_N)])])

        put_back = 0
        for place, chance in enumerate(chances):
            if self.pass_rates is not None and chance >= self.pass_rates.weight_of(batch.rows[place * size]):
                row, put_back = drawn(first + place), put_back + 1
                batch.rows[place * size : (place + 1) * size] = [dict(row) for _ in range(size)]
        for tried in range(1, self.args.refill_groups + 1):
            rows = [drawn(tried * groups + first + place) for place in range(here)]
            prompts = encode_prompts([row["prompt"] for row in rows], self.protocol)
            batch.spare.append([Question(row, ids) for row, ids in zip(rows, prompts, strict=True)])
        if self.pass_rates is not None:
            share = torch.tensor([put_back / here], device=self.accelerator.device)
            batch.metrics["curriculum/put_back"] = self.accelerator.gather(share).mean().item()


def draw_order(weights_N: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """All questions, drawn without replacement with probability proportional to their weights (Efraimidis and
    Spirakis, doi:10.1016/j.ipl.2005.11.003).

    Example:
        >>> draw_order(np.array([1.0, 1.0, 1e-9]), np.random.default_rng(0))
        array([1, 0, 2])
    """
    keys_N = np.log(1 - random.random(len(weights_N))) / weights_N  # 1 - [0, 1): never log(0)
    return np.argsort(-keys_N, kind="stable")


class ChoosesQuestions(Trainer):
    """A mixin that replaces questions, and saves pass rates with checkpoints. List it before TRL's trainer."""

    args: SearchGRPOConfig
    model: PreTrainedModel
    reward_weights: torch.Tensor
    question_choice: QuestionChoice | None = None

    def choose_questions(self, batch: Rollout) -> None:
        """Chooses the questions of a training batch before its rollout. Every rank must call it."""
        if self.question_choice is not None and self.model.training:
            self.question_choice.choose(batch, self.state.global_step)

    def refill_of(self, batch: Rollout, finished: Mapping[int, Trajectory]) -> Refill | None:
        """The refill of a batch, or `None`; `finished` are trajectories of an earlier process."""
        if not batch.spare or self.question_choice is None:
            return None

        def score(rows: Sequence[Mapping[str, Any]], trajectories: Sequence[Trajectory]) -> Group:
            use_device(self.accelerator.device)  # TRL calls reward functions in the main thread
            trained = [any(loss_mask(trajectory, self.args)) for trajectory in trajectories]
            return score_group(self, rows, trajectories, trained)

        return Refill(batch, group_size=self.question_choice.size, score=score, finished=finished)

    def settle_questions(self, batch: Rollout, refill: Refill | None) -> None:
        """Sets the groups to train on after the rollout, and updates the pass rates. Every rank must call it."""
        if refill is not None:
            refill.settle()
            batch.metrics |= refill.metrics(self.accelerator, self.reward_weights)
        if self._pass_rates is not None and self.question_choice is not None and self.model.training:
            size = self.question_choice.size
            replaced = itertools.chain.from_iterable(batch.replaced.values())
            groups = [(group.rows[0], group.trajectories) for group in replaced]
            for first in range(0, len(batch.rows), size):
                groups.append((batch.rows[first], batch.trajectories[first : first + size]))
            batch.metrics |= self._pass_rates.learn(groups)

    @property
    def _pass_rates(self) -> PassRates | None:
        return self.question_choice.pass_rates if self.question_choice is not None else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._pass_rates is not None and self.args.should_save:
            self._pass_rates.save(checkpoint_folder(self, trial))
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._pass_rates is not None and checkpoint is not None:
            self._pass_rates.load(Path(checkpoint))


def question_choice_of(trainer: Any) -> QuestionChoice | None:
    """The [`QuestionChoice`] of a [`SearchGRPOTrainer`], if `refill_groups` or `curriculum` is set.

    Raises:
        UserError: for settings that are incompatible with it.
    """
    args = trainer.args
    asked = getattr(args, "chooses_questions", "")  # a plain GRPOConfig has no such key
    if not asked:
        return None
    if trainer.environment is None:
        raise UserError(f"{asked} needs our rollouts: give a retriever or an environment, or leave it out")
    sharded = trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    models = [function for function in trainer.reward_funcs if isinstance(function, torch.nn.Module)]
    if args.refill_groups and models and sharded:
        raise UserError(
            f"{asked} scores a different number of groups on each rank, but the forward pass of a sharded "
            "reward model waits for all ranks: serve the reward model and call it from a function, or leave "
            "refill_groups out"
        )
    return QuestionChoice(args, trainer.train_dataset, trainer.protocol, trainer.accelerator)


def check_dataset(args: SearchGRPOConfig, dataset: Any) -> None:
    """Raises `UserError` if the dataset cannot fill a batch, or has no further questions to draw.

    TRL's sampler skips incomplete batches, so a training without a full batch would end before its first step.
    """
    groups = (args.generation_batch_size or 1) // (args.num_generations or 1)
    found = len(dataset) if isinstance(dataset, Dataset) else sum(1 for _ in dataset.take(groups))
    if found < groups:
        raise UserError(
            f"a batch has {groups} questions (trajectories of all processes / num_generations), but there are only "
            f"{found}: give more questions, or make per_device_train_batch_size × steps_per_generation smaller"
        )
    asked = args.chooses_questions
    if not asked:
        return
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"{asked} draws questions at random, which {type(dataset).__name__} does not allow: load the "
            "questions with streaming=False, or leave it out"
        )
    if len(dataset) <= groups:
        raise UserError(
            f"{asked} needs more questions than the {groups} of a batch, but there are {len(dataset)}: "
            "give more, or leave it out"
        )
