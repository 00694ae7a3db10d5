"""Batches the searches of many trajectories: call `await batcher.search(query, k)` from any number of coroutines.

There is no timer. While one batch is searched, the next one fills; it is sent as soon as the retriever is free:

    queries   a b c      d e        f g h i        j
    batches   [a]  [b c d]   [e f g h]   [i j]

A retriever with `max_concurrent_batches` above 1 gets several batches at a time. A query that several coroutines send
at once is searched once. When a batch raises, its queries are retried one by one, so that only the bad query fails.
`timeout_s` limits a call of the retriever, not the time in the queue. A call that hangs fails its own queries; its
daemon thread is abandoned and delays neither other searches nor the exit of the process.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from trl_search.common.bounds import check_at_least, check_positive
from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError, Retriever, Unavailable, check_search
from trl_search.retrieval.threads import DaemonCalls, start_search
from trl_search.types import Passage

Key = tuple[str, int]  # query, k
# Failures are passed as values: asyncio logs an exception of a future that no coroutine retrieves.
Result = Sequence[Passage] | RetrievalError


class Crashed(RetrievalError):
    """The retriever broke its contract, by an exception or by what it returned: a bug, or a failing machine. Another
    server may succeed."""


@dataclass
class SearchStats:
    """Of a batcher: `queries` received, `failures` among them, `batches` sent, `seconds` spent in the retriever."""

    queries: int = 0
    failures: int = 0
    batches: int = 0
    seconds: float = 0.0


class SearchBatcher:
    """Batches searches across the coroutines of one event loop. Create it inside the loop and `aclose` it at the end.
    Batchers of one retriever share `on_threads`, which counts calls that hang.

    Raises:
        UserError: if a limit is out of range.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        timeout_s: float,
        max_batch: int = 512,
        on_threads: DaemonCalls | None = None,
    ) -> None:
        check_positive(timeout_s=timeout_s)
        check_at_least(1, max_batch=max_batch)
        if retriever.max_concurrent_batches < 1:
            raise UserError(
                f"max_concurrent_batches must be at least 1; {type(retriever).__name__} has "
                f"{retriever.max_concurrent_batches}"
            )
        self.stats = SearchStats()
        self._retriever, self._timeout_s, self._max_batch = retriever, timeout_s, max_batch
        self._queue: dict[Key, None] = {}  # an ordered set
        self._results: dict[Key, asyncio.Future[Result]] = {}  # of queries that are queued or being searched
        self._workers: set[asyncio.Task[None]] = set()  # each searches one batch at a time
        self._on_threads = on_threads or DaemonCalls()
        self._closed = False

    async def search(self, query: str, k: int) -> list[Passage]:
        """Returns up to `k` passages, best first.

        Raises:
            Unavailable: if the retriever is down or took too long, or the batcher is closed.
            RetrievalError: if the search failed.
            UserError: if `k` is below 1, as in an environment's tool that passes on the policy's argument.
        """
        check_search([query], k)
        if self._closed:
            raise Unavailable("the search batcher is closed; make a new one for each event loop")
        self.stats.queries += 1
        key = (query, k)
        if key not in self._results:
            self._results[key] = asyncio.get_running_loop().create_future()
            self._queue[key] = None
            if len(self._workers) < self._retriever.max_concurrent_batches:
                self._workers.add(asyncio.create_task(self._drain()))
        result = await asyncio.shield(self._results[key])  # other coroutines may await it after this one is cancelled
        if isinstance(result, RetrievalError):
            self.stats.failures += 1
            kind = next(kind for kind in (Unavailable, Crashed, RetrievalError) if isinstance(result, kind))
            raise kind(str(result)) from result.__cause__
        return list(result[:k])  # some retrievers return more than they were asked for

    def take_stats(self) -> SearchStats:
        """The counts since the last call."""
        taken, self.stats = self.stats, SearchStats()
        return taken

    async def aclose(self) -> None:
        """Closes at once; pending searches raise `Unavailable`."""
        self._closed = True
        workers = set(self._workers)
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.wait(workers)
        self._queue.clear()
        for key in list(self._results):
            self._resolve(key, Unavailable("the search batcher was closed before this search was done"))

    async def _drain(self) -> None:
        worker = asyncio.current_task()
        assert worker is not None
        try:
            while self._queue:
                _, k = next(iter(self._queue))
                batch = list(islice((key for key in self._queue if key[1] == k), self._max_batch))
                for key in batch:
                    del self._queue[key]
                await self._answer(batch, k)
        finally:
            # Not in a callback of the task, which runs one iteration of the loop later: a query that arrives in
            # between would count on a worker that has already stopped.
            self._workers.discard(worker)

    async def _answer(self, batch: list[Key], k: int) -> None:
        try:
            found = await self._call([query for query, _ in batch], k, self._timeout_s)
        except Exception as error:  # it fails these queries but must not end the worker
            await self._answer_singly(batch, k, _as_failure(error))
        else:
            for key, passages in zip(batch, found, strict=True):
                self._resolve(key, passages)

    async def _answer_singly(self, batch: list[Key], k: int, error: RetrievalError) -> None:
        """Retries one by one to find the bad query. All retries share one timeout, because a server that is down fails
        every query."""
        deadline = time.monotonic() + self._timeout_s
        for key in batch:
            left_s = deadline - time.monotonic()
            if len(batch) == 1 or left_s <= 0 or isinstance(error, Unavailable):
                self._resolve(key, error)
                continue
            try:
                self._resolve(key, (await self._call([key[0]], k, left_s))[0])
            except Exception as alone:
                self._resolve(key, _as_failure(alone))

    async def _call(self, queries: list[str], k: int, timeout_s: float) -> list[list[Passage]]:
        """One call of the retriever, for at most `timeout_s`."""
        started = time.monotonic()
        call = start_search(self._retriever, self._on_threads, queries, k)
        self.stats.batches += 1
        try:
            await asyncio.wait({call}, timeout=timeout_s)  # wait_for would wait for a hanging call to be cancelled
            if not call.done():
                raise Unavailable(
                    f"a search of {len(queries)} queries timed out after {timeout_s:.3g} s; is the retriever up, "
                    "and is the limit on a call long enough for it?"
                )
        finally:
            self.stats.seconds += time.monotonic() - started
            call.cancel()  # no effect if it is done
        if call.cancelled():
            raise RetrievalError("the retriever cancelled its own search")
        if (error := call.exception()) is not None:
            raise _as_failure(error)  # SystemExit too: it must not end the worker
        return _checked(call.result(), len(queries))

    def _resolve(self, key: Key, result: Result) -> None:
        future = self._results.pop(key)
        if not future.done():
            future.set_result(result)


def _checked(found: Any, queries: int) -> list[list[Passage]]:
    """The result of a retriever's `search`.

    Raises:
        Crashed: if it is not one list of passages per query.
    """
    wanted = "return one list of Passage(id, title, text) per query"
    if not isinstance(found, list | tuple):
        also = ", and call an asynchronous search search_async" if inspect.isawaitable(found) else ""
        raise Crashed(f"the retriever returned {found!r:.60}: {wanted}{also}")
    if len(found) != queries:
        raise Crashed(f"the retriever returned {len(found)} results for {queries} queries")
    for passages in found:
        if not isinstance(passages, list | tuple):
            raise Crashed(f"the retriever returned {passages!r:.60} for a query: {wanted}")
        for passage in passages:
            if not isinstance(passage, Passage) or not isinstance(passage.text, str):
                raise Crashed(f"the retriever returned the passage {passage!r:.80}: {wanted}")
    return [list(passages) for passages in found]


def _as_failure(error: BaseException) -> RetrievalError:
    if isinstance(error, RetrievalError):
        return error
    failure = Crashed(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
