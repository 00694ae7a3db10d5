"""Answers one request, from its queries to the bytes of the response: cache, bounded queue, batches across requests.

    queries ──► in the cache? ──► bytes ─────────────────────────────┐
                    └─ no ──► room in the queue? ──► SearchBatcher ──┴─► {"result":[ , , ]}
                                  └─ no ──► Refused(503)

A search that fails raises a `Refused` with its cause, and never returns an empty result: a trainer must distinguish
"found nothing" from "search failed". The status tells the client what to do: 503, the server has a problem, so try
another; 422, the query has one, so drop it; 500, unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from trl_search.common.event_loop import all_of
from trl_search.retrieval.base import RetrievalError, Retriever, Unavailable
from trl_search.retrieval.batching import Crashed, SearchBatcher, SearchStats
from trl_search.retrieval.remote.wire import RetrieveRequest, format_passages
from trl_search.retrieval.server.cache import ResultCache
from trl_search.retrieval.server.config import ServerConfig
from trl_search.types import Passage

RETRY_AFTER_S = 1


class Refused(Exception):
    """A valid request cannot be answered. With `retry_after_s` it may be sent again."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


class SearchService:
    """Answers requests. `open` it with a retriever in the event loop, `aclose` it at the end."""

    def __init__(self, config: ServerConfig) -> None:
        self.cache = ResultCache(config.cache_bytes)
        self.queued = 0  # queries that are waiting or being searched
        self.refused = 0  # queries refused because the queue was full
        self._config = config
        self._batcher: SearchBatcher | None = None
        self._draining = False

    @property
    def ready(self) -> bool:
        return self._batcher is not None and not self._draining

    @property
    def stats(self) -> SearchStats:
        return self._batcher.stats if self._batcher is not None else SearchStats()

    def open(self, retriever: Retriever) -> None:
        """Starts answering requests. The caller closes the retriever."""
        self._batcher = SearchBatcher(
            retriever, timeout_s=self._config.search_timeout_s, max_batch=self._config.max_batch
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuses new requests; returns when the open ones are done, or after `timeout_s`."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.queued:
                    await asyncio.sleep(0.02)

    async def aclose(self) -> None:
        if self._batcher is not None:
            await self._batcher.aclose()

    async def answer(self, request: RetrieveRequest) -> tuple[bytes, int]:
        """Searches the queries of one request.

        Returns:
            `tuple`: the body of the response, and how many of its queries were answered from the cache.

        Raises:
            Refused: if the index is loading, the server is stopping, the queue is full, or a search failed.
        """
        if self._batcher is None:
            raise Refused(503, "the index is still loading; /ready says when it is there", RETRY_AFTER_S)
        if self._draining:
            raise Refused(503, "the server is being stopped", RETRY_AFTER_S)
        k, scores = request.k, request.return_scores
        found = {query: self.cache.get(query, k, scores) for query in request.queries}
        missing = [query for query, result in found.items() if result is None]
        cached = sum(found[query] is not None for query in request.queries)
        searched = await self._search(self._batcher, missing, k) if missing else []
        for query, passages in zip(missing, searched, strict=True):
            found[query] = result = _dumps(passages, scores)
            self.cache.put(query, k, scores, result)
        return _joined([found[query] for query in request.queries]), cached

    async def _search(self, batcher: SearchBatcher, queries: list[str], k: int) -> list[list[Passage]]:
        # All queries of a request or none: partial answers would be discarded.
        if self.queued + len(queries) > self._config.max_queued:
            self.refused += len(queries)
            raise Refused(
                503,
                f"the queue is full: {self.queued} queries are under way, {self._config.max_queued} may be",
                RETRY_AFTER_S,
            )
        self.queued += len(queries)
        try:
            if len(queries) == 1:
                return [await batcher.search(queries[0], k)]
            # Waits for every search, even after one has failed, because `queued` counts all open ones.
            return await all_of(batcher.search(query, k) for query in queries)
        except RetrievalError as error:
            status = 503 if isinstance(error, Unavailable) else 500 if isinstance(error, Crashed) else 422
            raise Refused(status, f"the search failed: {error}") from error
        finally:
            self.queued -= len(queries)


def _dumps(passages: Sequence[Passage], return_scores: bool) -> bytes:
    import json

    import orjson

    items = format_passages(passages, return_scores)
    try:
        return orjson.dumps(items)
    except orjson.JSONEncodeError:  # a lone surrogate in a web page, which JSON can escape
        return json.dumps(items).encode()


def _joined(results: Sequence[bytes | None]) -> bytes:
    return b'{"result":[' + b",".join(result for result in results if result is not None) + b"]}"
