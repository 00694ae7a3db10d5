"""A trainer whose rollouts follow a script, so that a test knows every token; mask, loss and gradients are real."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from tests.support.fakes import FixedRetriever
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.base import Policy
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.types import Completion, FinishReason, Passage, Sampling

Script = Callable[[int, str], Sequence[str | Sequence[int]]]

GOLD = "Mira Talvane"
PASSAGES = [Passage(str(i), f"Title {i}", f"Quiet Raven is a novel by {GOLD}, part {i}.") for i in range(3)]
ROWS = [{"question": f"Who wrote book {i}?", "golden_answers": [GOLD]} for i in range(8)]
DATA = Dataset.from_list(ROWS)


def search(query: str) -> str:
    call = f'{{"name": "search", "arguments": {{"query_list": ["{query}"]}}}}'
    return f"<think> hm </think>\n<tool_call>\n{call}\n</tool_call>"


def answer(text: str) -> str:
    return f"<think> so </think>\n<answer> {text} </answer>"


def four_ways(number: int, prompt: str) -> Sequence[str | Sequence[int]]:
    """One search and correct; two searches and wrong; wrong at once; a malformed call, then correct."""
    return (
        [search("author of the book"), answer(GOLD)],
        [search("the book"), search("its author"), answer("Nobody")],
        [answer("Nobody")],
        ["<tool_call>\n{oops\n</tool_call>", answer(GOLD)],
    )[number % 4]


class Actor(Policy):
    """Generates the turns of `script(i, prompt)` for trajectory `i` of a rollout, one per call, as text or ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        script: Script,
        *,
        logprob: float = -0.5,
        seconds: Callable[[int], float] = lambda number: 0.0,
    ) -> None:
        self.tokenizer, self.script, self.logprob, self.seconds = tokenizer, script, logprob, seconds
        self.rollouts = 0

    async def interrupt(self) -> None:
        await asyncio.sleep(0)  # its turns take no time, so there is nothing to interrupt

    async def open(self) -> None:
        self.rollouts += 1
        self.numbers: dict[Any, int] = {}  # one coroutine per trajectory; they start in order
        self.asked: list[list[list[int]]] = []  # of trajectory i, the context ids of each turn
        self.said: list[list[list[int]]] = []  # of trajectory i, the ids of each turn

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> Completion:
        number = self.numbers.setdefault(asyncio.current_task(), len(self.numbers))
        if number == len(self.said):
            self.asked.append([])
            self.said.append([])
        self.asked[number].append(list(prompt_ids))
        await asyncio.sleep(self.seconds(number))
        turn = self.script(number, self.tokenizer.decode(list(prompt_ids)))[len(self.said[number])]
        ids = self.tokenizer.encode(turn, add_special_tokens=False) if isinstance(turn, str) else turn
        ids = [*ids, self.tokenizer.eos_token_id]
        self.said[number].append(ids)
        assert len(ids) <= max_tokens, "the script does not fit the budget"
        return Completion(tuple(ids), (self.logprob,) * len(ids), FinishReason.EOS)


class ScriptedTrainer(SearchGRPOTrainer):
    """Takes rollouts from `actor`, and keeps the log-probs of the loss after `tamper` has changed them."""

    actor: Actor
    tamper: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    @contextlib.contextmanager
    def generation_policy(self, prompt_ids: Sequence[Sequence[int]]) -> Iterator[Any]:
        yield self.actor

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.tamper is not None and entropies is not None:
            logps, entropies = self.tamper(logps, entropies)
        if logps.requires_grad:
            self.logps, self.entropies = logps, entropies
            logps.retain_grad()
        return logps, entropies, aux_loss

    def score(self, rows: Sequence[dict[str, Any]] | None = None) -> dict[str, torch.Tensor]:
        """One generation batch as in the training loop: a rollout with its mask and advantages."""
        self.model.train()
        self.current_gradient_accumulation_steps = 1
        rows = [next(iter(self.train_dataset))] * 4 if rows is None else rows
        return self._generate_and_score_completions([dict(row) for row in rows])

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of a batch and its logs."""
        self._metrics["train"].clear()
        loss = self.compute_loss(self.model, batch)
        return loss, self.logged

    @property
    def logged(self) -> dict[str, float]:
        """The latest value of each metric that the next log entry will hold."""
        return {name: values[-1] for name, values in self._metrics["train"].items()}


def config(folder: Path, **options: Any) -> SearchGRPOConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "max_completion_length": 600,
        "max_observation_length": 200,
        "instruction": "",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    return SearchGRPOConfig(str(folder), **{**defaults, **options})


def scripted_trainer(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    script: Script = four_ways,
    *,
    rewards: Any = "em",
    retriever: Any = None,
    data: Any = DATA,
    logprob: float = -0.5,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> ScriptedTrainer:
    trainer = {"retriever": retriever or FixedRetriever(PASSAGES), **(trainer or {})}
    made = ScriptedTrainer(model, rewards, config(folder, **options), data, processing_class=tokenizer, **trainer)
    made.remove_callback(PrinterCallback)
    made.actor = Actor(tokenizer, script, logprob=logprob)
    return made


def later_is_better(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """A reward that differs within every group, so that there is always a gradient."""
    return [float(i) for i in range(len(completions))]


def real_trainer(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    rewards: Any = later_is_better,
    data: Any = DATA,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> SearchGRPOTrainer:
    """A trainer with the transformers policy and random weights: short random text, hardly ever a search."""
    arguments = config(folder, **{"max_completion_length": 24, "max_turn_length": 8, **options})
    trainer = {"retriever": FixedRetriever(PASSAGES), **(trainer or {})}
    made = SearchGRPOTrainer(model, rewards, arguments, data, processing_class=tokenizer, **trainer)
    made.remove_callback(PrinterCallback)
    return made


def steps(trainer: SearchGRPOTrainer) -> list[dict[str, Any]]:
    """The log of each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]
