"""Small fakes: a scripted policy, and retrievers that are slow or broken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from trl_search.policies.base import Policy
from trl_search.retrieval.base import RetrievalError, Retriever
from trl_search.types import Completion, FinishReason, Passage, Sampling


class ScriptedPolicy(Policy):
    """Generates the turns of `script(question)`, one per call; respects stop strings and budgets like an engine."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        script: Callable[[str], Sequence[str]],
        *,
        seconds: float = 0.0,
        extra_tokens_after_stop: str = "",
    ) -> None:
        self.tokenizer, self.script, self.seconds = tokenizer, script, seconds
        self.extra = extra_tokens_after_stop
        self.prompts: list[list[int]] = []
        self.budgets: list[int] = []

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> Completion:
        await asyncio.sleep(self.seconds)
        self.prompts.append(list(prompt_ids))
        self.budgets.append(max_tokens)
        text = self.tokenizer.decode(list(prompt_ids))
        said = self.script(text)
        spoken = sum(1 for turn in said if turn.strip() and turn.strip() in text)
        turn = said[min(spoken, len(said) - 1)]
        ids = self.tokenizer.encode(
            turn + (self.extra if any(s in turn for s in stop) else ""), add_special_tokens=False
        )
        reason = FinishReason.STOP if any(s in turn for s in stop) else FinishReason.EOS
        if reason is FinishReason.EOS:
            ids.append(self.tokenizer.eos_token_id)
        if len(ids) > max_tokens:
            ids, reason = ids[:max_tokens], FinishReason.LENGTH
        return Completion(tuple(ids), tuple(-0.5 - 0.001 * i for i in range(len(ids))), reason)


class FixedRetriever(Retriever):
    """Returns the same passages for every query, after a delay; raises for queries that contain `poison`."""

    def __init__(self, passages: Sequence[Passage], *, seconds: float = 0.0, poison: str | None = None) -> None:
        self.passages, self.seconds, self.poison = list(passages), seconds, poison
        self.batches: list[list[str]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.batches.append(list(queries))
        time.sleep(self.seconds)
        if self.poison is not None and any(self.poison in query for query in queries):
            raise RetrievalError("the index is on fire")
        return [self.passages[:k] for _ in queries]
