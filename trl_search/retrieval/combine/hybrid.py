"""Fuses several retrievers by reciprocal-rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009).

    load_retriever("hybrid", retrievers=[{"kind": "bm25", "index": "indexes/wiki-bm25"},
                                         {"kind": "dense", "index": "indexes/wiki-e5"}])

    bm25   a b c          score(d) = sum over the retrievers that found d of  weight / (60 + rank of d)
    dense  b d a
    ────────────
    hybrid b a d c        b: 1/62 + 1/61   a: 1/61 + 1/63   d: 1/62   c: 1/63

Only ranks count, so the retrievers may use any kind of score. Every retriever is asked for `depth` passages, whatever
k is. So a passage at rank 30 of one retriever and rank 2 of another comes before one at rank 3 of a single retriever,
and the first three results for k = 10 are the results for k = 3.

Rules:

- Passages with the same id are the same passage. If their texts differ, the first retriever's text is used. If a
  retriever returns an id twice, the better rank counts.
- Equal scores are ordered by the rank in the first retriever, then in the second, and so on.
- If one retriever fails, the search fails: partial results would silently train the policy on a different retriever.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from trl_search.common.bounds import check_at_least
from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.retrieval.base import Retriever, check_search, merge_metrics
from trl_search.retrieval.combine.parts import Part, load_parts, search_together
from trl_search.retrieval.threads import DaemonCalls
from trl_search.types import Passage

RRF_K = 60  # as in the paper; a larger value gives the first ranks less weight
DEPTH = 50


class HybridRetriever(Retriever):
    """Searches several retrievers in parallel and fuses their rankings. For the arguments see [`load`]."""

    def __init__(
        self, retrievers: Sequence[Retriever], *, weights: Sequence[float] | None = None, depth: int = DEPTH
    ) -> None:
        _check(len(retrievers), weights, depth)
        self._parts, self._depth = tuple(retrievers), depth
        self._on_threads = [DaemonCalls() for _ in retrievers]
        self._weights = tuple(weights) if weights is not None else (1.0,) * len(retrievers)
        self.max_concurrent_batches = min(part.max_concurrent_batches for part in retrievers)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return run_sync(self.search_async(queries, k))

    async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """[`search`] for coroutines; it awaits the retrievers that have `search_async`."""
        check_search(queries, k)
        self._check_open()
        if not queries:
            return []
        try:
            found = await search_together(self._parts, self._on_threads, queries, max(k, self._depth))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return [fuse(rankings, self._weights)[:k] for rankings in zip(*found, strict=True)]

    def take_metrics(self) -> dict[str, float]:
        return merge_metrics([part.take_metrics() for part in self._parts])

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.close()


def fuse(rankings: Sequence[Sequence[Passage]], weights: Sequence[float]) -> list[Passage]:
    """The passages of several rankings, best first, with their fused scores."""
    passages: dict[str, Passage] = {}
    ranks: dict[str, list[float]] = {}
    for part, ranking in enumerate(rankings):
        for rank, passage in enumerate(ranking, start=1):
            passages.setdefault(passage.id, passage)
            own = ranks.setdefault(passage.id, [math.inf] * len(rankings))
            own[part] = min(own[part], rank)

    # fsum: the same ranks in a different order give the same score to the bit
    scores = {
        identity: math.fsum(weight / (RRF_K + rank) for weight, rank in zip(weights, own, strict=True))
        for identity, own in ranks.items()
    }
    order = sorted(passages, key=lambda identity: (-scores[identity], ranks[identity]))
    return [replace(passages[identity], score=scores[identity]) for identity in order]


def load(*, retrievers: Sequence[Part], weights: Sequence[float] | None = None, depth: int = DEPTH) -> HybridRetriever:
    """`load_retriever("hybrid", ...)`.

    Args:
        retrievers (`Sequence`): Two or more retrievers, each an instance or its kind with its options, such as
            `{"kind": "bm25", "index": "indexes/wiki"}`.
        weights (`Sequence[float]`, *optional*): The weight of each retriever, above 0; by default all equal.
        depth (`int`): Passages requested from each retriever, or k if that is larger.

    Raises:
        UserError: if `retrievers` is not a list of two or more, or another option is out of range.
    """
    if isinstance(retrievers, (str, Retriever)) or not isinstance(retrievers, Sequence):
        raise UserError(f'hybrid needs a list, retrievers=[{{"kind": "bm25", ...}}, ...]; got {retrievers!r}')
    _check(len(retrievers), weights, depth)  # before an index is opened
    return HybridRetriever(load_parts(retrievers, "hybrid"), weights=weights, depth=depth)


def _check(parts: int, weights: Sequence[float] | None, depth: int) -> None:
    if parts < 2:
        raise UserError(f"hybrid needs two or more retrievers; got {parts}")
    if weights is not None and len(weights) != parts:
        raise UserError(f"hybrid needs a weight for each of its {parts} retrievers; got {len(weights)}")
    if weights is not None and not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"a weight must be above 0, got {list(weights)}; to give a retriever no weight, leave it out")
    check_at_least(1, depth=depth)
