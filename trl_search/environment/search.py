"""`SearchEnvironment`: the environment of a search agent. It answers searches from a retriever."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.environment.base import Environment
from trl_search.protocols import SEARCH_TOOL
from trl_search.retrieval import as_retriever
from trl_search.retrieval.base import RetrievalError, Retriever
from trl_search.retrieval.batching import SearchBatcher, SearchStats
from trl_search.retrieval.threads import DaemonCalls
from trl_search.types import Action, Answer, Invalid, Observation, Passage, Search, StopReason

# The format of Search-R1 and verl; reproducing them needs exactly the same text.
PASSAGE_TEMPLATE = 'Doc {rank}(Title: "{title}") {text}'
NO_SEARCHES_LEFT = "You have no searches left: answer now."
_FIELD = re.compile(r"\{(rank|title|text)\}")


class SearchEnvironment(Environment):
    """Answers searches from a retriever until the search budget is spent, then lets the policy answer.

    Args:
        retriever (`Retriever` or `str`): The retriever; searches of concurrent trajectories reach it in batches. A
            string is opened with [`open_retriever`]: an index folder, the address of a server, or a kind.
        passages_per_query (`int`, *optional*, defaults to `3`): Passages shown per query.
        max_searches (`int`, *optional*, defaults to `4`): Calls per trajectory. After the last one the policy is told
            that none are left, and generates one final turn. With 0 the environment acts like [`AnswerOnly`].
        max_queries (`int`, *optional*, defaults to `4`): Queries per call. Further queries are not run, and the policy
            is told so.
        max_invalid (`int`, *optional*, defaults to `2`): Malformed calls that are answered with a correction; the next
            one ends the trajectory.
        timeout_s (`float`, *optional*, defaults to `30.0`): Time limit of one retriever call in seconds, without its
            time in the queue.
        passage_template (`str`, *optional*): The format of a passage; its fields are `{rank}`, `{title}` and `{text}`.

    Raises:
        UserError: if a value is out of range, or `retriever` is not a retriever.
    """

    tools: Sequence[dict[str, Any]] = (SEARCH_TOOL,)
    _set_by_init = ("retriever", "batcher")

    def __init__(
        self,
        retriever: Retriever | str | Path,
        *,
        passages_per_query: int = 3,
        max_searches: int = 4,
        max_queries: int = 4,
        max_invalid: int = 2,
        timeout_s: float = 30.0,
        passage_template: str = PASSAGE_TEMPLATE,
    ) -> None:
        for name, value, least in (
            ("passages_per_query", passages_per_query, 1),
            ("max_searches", max_searches, 0),
            ("max_queries", max_queries, 1),
            ("max_invalid", max_invalid, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{type(self).__name__}({name}={value!r}): give a whole number, at least {least}")
        if not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
            raise UserError(f"{type(self).__name__}(timeout_s={timeout_s!r}): give seconds, more than 0")
        if not isinstance(passage_template, str):
            raise UserError(f"{type(self).__name__}(passage_template={passage_template!r}): give a string")
        self.retriever = as_retriever(retriever)
        self.passages_per_query = passages_per_query
        self.max_searches = max_searches
        if not max_searches:
            # Without searches, the policy is not shown the search tool.
            self.tools = tuple(tool for tool in self.tools if tool != SEARCH_TOOL)
        self.max_queries = max_queries
        self.max_invalid = max_invalid
        self.timeout_s = timeout_s
        self.passage_template = passage_template
        self.batcher: SearchBatcher | None = None
        # Kept across batches, so that a retriever that hangs in every batch is limited to `MAX_HUNG` threads in total.
        self._on_threads = DaemonCalls()
        self.searches_left = max_searches
        self.corrections_left = max_invalid

    async def open(self) -> None:
        self.batcher = SearchBatcher(self.retriever, timeout_s=self.timeout_s, on_threads=self._on_threads)

    async def close(self) -> None:
        if self.batcher is not None:
            await self.batcher.aclose()

    def take_metrics(self) -> dict[str, float]:
        stats = SearchStats() if self.batcher is None else self.batcher.take_stats()
        return {
            "retrieval/queries": float(stats.queries),
            "retrieval/failed_queries": float(stats.failures),
            "retrieval/batches": float(stats.batches),
            "retrieval/search_s": stats.seconds,
            **self.retriever.take_metrics(),
        }

    async def step(self, action: Action) -> Observation:
        if isinstance(action, Answer):
            return Observation(done=StopReason.ANSWER)
        if not self.max_searches:
            return Observation(done=StopReason.END_OF_TURN)
        if isinstance(action, Invalid):
            if self.corrections_left == 0:
                return Observation(done=StopReason.TURN_BUDGET)
            self.corrections_left -= 1
            return Observation(notice=f"Your call was not run: {action.problem}. Call again or answer.")
        if not isinstance(action, Search):
            return Observation(done=StopReason.END_OF_TURN)
        if self.searches_left == 0:
            return Observation(done=StopReason.SEARCH_BUDGET)
        self.searches_left -= 1
        return await self._search(action.queries)

    async def _search(self, queries: Sequence[str]) -> Observation:
        assert self.batcher is not None, "SearchEnvironment.open() was not awaited"
        batcher, run = self.batcher, queries[: self.max_queries]
        try:
            results = await asyncio.gather(*(batcher.search(query, self.passages_per_query) for query in run))
        except RetrievalError as error:
            return Observation(done=StopReason.RETRIEVAL_FAILED, error=str(error))
        notices = []
        if not any(results):
            notices.append("Nothing was found.")
        if len(run) < len(queries):
            notices.append(f"Only the first {self.max_queries} queries were run.")
        if self.searches_left == 0:
            notices.append(NO_SEARCHES_LEFT)
        return Observation(
            documents=tuple(document for passages in results for document in self.show(passages)),
            notice=" ".join(notices),
            passages=tuple(passage for passages in results for passage in passages),
        )

    def show(self, passages: Sequence[Passage]) -> list[str]:
        """Formats each passage for the policy, numbered from 1."""

        def show_one(rank: int, passage: Passage) -> str:
            fields = {"rank": str(rank), "title": passage.title, "text": passage.text}
            return _FIELD.sub(lambda match: fields[match[1]], self.passage_template)

        return [show_one(rank, passage) for rank, passage in enumerate(passages, start=1)]
