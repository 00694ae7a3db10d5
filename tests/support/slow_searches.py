"""Searches that last until a test releases them, and a policy that makes them, to test carry-over."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tests.support.fakes import ScriptedPolicy
from tests.support.scripted_trainer import ScriptedTrainer, answer, scripted_trainer, search
from trl_search.environment import Environment
from trl_search.protocols import SEARCH_TOOL
from trl_search.trainer.batch import Rollout
from trl_search.types import Action, Observation, Search, StopReason

BOOKS = Dataset.from_list([{"question": f"Who wrote book {i}?", "golden_answers": [f"author {i}"]} for i in range(24)])
Gates = dict[str, "Future[None]"]


class Library(Environment):
    """Finds the author of a book. A search for a book in `gates` lasts until the test sets that future's result."""

    tools = (SEARCH_TOOL,)

    def __init__(self, gates: Gates) -> None:
        self.gates = gates
        self.searched: list[str] = []  # shared by all copies
        self.log: list[str] = []

    async def open(self) -> None:
        self.log.append("open")

    async def close(self) -> None:
        self.log.append("close")

    async def step(self, action: Action) -> Observation:
        if not isinstance(action, Search):
            return Observation(done=StopReason.ANSWER)
        (book,) = action.queries
        self.searched.append(book)
        if book in self.gates:
            await asyncio.wrap_future(self.gates[book])
        return Observation(documents=(f"{book} is by author {book.split()[-1]}",))


class Reader(ScriptedPolicy):
    """Searches for the book of its question, then answers. Its turns take no time: there is nothing to interrupt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, lambda prompt: [search(book_in(prompt)), answer(f"author {book_in(prompt)[5:]}")])

    async def interrupt(self) -> None:
        await asyncio.sleep(0)


def book_in(text: str) -> str:
    return re.search(r"book \d+", text)[0]  # type: ignore[index]


def gates_of(books: Collection[int]) -> Gates:
    return {f"book {number}": Future() for number in books}


def library_trainer(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    gates: Gates,
    *,
    trainer_options: Any = None,
    **options: Any,
) -> Any:
    """A trainer with two groups of two per batch, in the order of `BOOKS`, and rollouts by a `Reader`."""
    trainer: ScriptedTrainer = scripted_trainer(
        folder,
        model,
        tokenizer,
        data=BOOKS,
        trainer={"retriever": None, "environment": Library(gates), **(trainer_options or {})},
        **{"num_generations": 2, "carry_over": 1.5, "shuffle_dataset": False, **options},
    )
    trainer.actor = Reader(tokenizer)  # type: ignore[assignment]
    return trainer


def recorded(trainer: Any) -> list[tuple[Rollout, dict[str, Any]]]:
    """Records the batches of a later training: the rollout of each, and TRL's output for it."""
    batches: list[tuple[Rollout, dict[str, Any]]] = []
    score = trainer._generate_and_score_completions

    def scoring(inputs: Any) -> Any:
        output = score(inputs)
        batches.append((trainer.last_rollout, {name: copy.copy(value) for name, value in output.items()}))
        return output

    trainer._generate_and_score_completions = scoring
    return batches


def release_after(trainer: Any, gate: Future[None], *, rollouts: int) -> None:
    """Ends the search of a gate while the trainer computes on the batch of rollout number `rollouts`."""
    compute_loss = trainer.compute_loss
    losses: list[int] = []

    def computing(*args: Any, **kwargs: Any) -> Any:
        losses.append(1)
        if len(losses) == rollouts:
            gate.set_result(None)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = computing


def trained_books(batch: Rollout) -> list[int]:
    return [int(row["question"].split()[-1][:-1]) for row in batch.rows]
