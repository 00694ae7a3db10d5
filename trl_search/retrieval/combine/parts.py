"""Loads and searches the retrievers that `hybrid` and `rerank` are made of, and merges their metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError, Retriever
from trl_search.retrieval.threads import DaemonCalls, start_search
from trl_search.types import Passage

Part = Retriever | Mapping[str, Any]


def load_parts(parts: Sequence[Part], of: str) -> list[Retriever]:
    """Loads `[{"kind": "bm25", "index": "indexes/wiki"}, ...]`; a retriever is used unchanged.

    Raises:
        UserError: if a part is neither a retriever nor the options of one.
    """
    from trl_search.retrieval import load_retriever

    loaded: list[Retriever] = []
    own: list[Retriever] = []  # retrievers that were passed in are closed by their owner
    try:
        for number, part in enumerate(parts, start=1):
            if isinstance(part, Retriever):
                loaded.append(part)
            elif isinstance(part, Mapping) and isinstance(part.get("kind"), str):
                own.append(load_retriever(**part))
                loaded.append(own[-1])
            else:
                raise UserError(
                    f'part {number} of {of} must be a retriever, or options with its kind, as {{"kind": "bm25", '
                    f'"index": "indexes/wiki"}}; got {part!r}'
                )
    except BaseException:
        for retriever in own:
            retriever.close()
        raise
    return loaded


async def search_together(
    parts: Sequence[Retriever], on_threads: Sequence[DaemonCalls], queries: Sequence[str], k: int
) -> list[list[list[Passage]]]:
    """Searches all parts in parallel. Parts with `search_async` are awaited; each other part runs on a thread of its
    entry in `on_threads`. If a part fails or the caller is cancelled, the tasks are cancelled and the threads run
    on."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_search(part, calls, queries, k)) for part, calls in zip(parts, on_threads, strict=True)
        ]
    return [task.result() for task in tasks]


async def _search(part: Retriever, calls: DaemonCalls, queries: Sequence[str], k: int) -> list[list[Passage]]:
    found = await start_search(part, calls, queries, k)
    if len(found) != len(queries):
        raise RetrievalError(f"{type(part).__name__} returned {len(found)} results for {len(queries)} queries")
    return found
