"""The search of BM25, compiled by numba. The machine code is cached beside this file or in the user's cache folder:
compiling takes two seconds, reading the cache 0.1 s.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled at its first call. It releases the GIL."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no writable cache folder
        return njit(nogil=True)(function)


@compiled
def offer(best: list[tuple[Any, int]], k: int, row: int, total: Any) -> Any:
    """Keeps a row if it is among the best k; of equal scores, the lower row. Returns the score to exceed next."""
    if len(best) < k:
        heapq.heappush(best, (total, -row))
    elif (total, -row) > best[0]:
        heapq.heapreplace(best, (total, -row))
    return best[0][0] if len(best) == k else np.float32(0)


@compiled
def find(
    terms: Array,
    ends_Q: Array,
    rows: Array,
    scores: Array,
    starts: Array,
    totals: Array,
    rows_QK: Array,
    scores_QK: Array,
) -> None:
    """Writes the best rows of every query with their scores."""
    begin, (queries, k) = 0, rows_QK.shape
    for query in range(queries):
        asked, begin = terms[begin : ends_Q[query]], ends_Q[query]
        postings = 0
        for term in asked:
            postings += starts[term + 1] - starts[term]
            for at in range(starts[term], starts[term + 1]):
                totals[rows[at]] += scores[at]
        best = [(np.float32(0), 0) for _ in range(0)]  # (score, -row); empty, and typed
        needed = np.float32(0)
        if postings < len(totals):
            for term in asked:
                for at in range(starts[term], starts[term + 1]):
                    total, totals[rows[at]] = totals[rows[at]], 0
                    if total >= needed and total > 0:
                        needed = offer(best, k, rows[at], total)
        else:  # most rows match, so scanning all rows is faster
            for row in range(len(totals)):
                if totals[row] > needed:  # a later row of the same score is not better
                    needed = offer(best, k, row, totals[row])
            totals[:] = 0
        for place in range(len(best) - 1, -1, -1):
            scores_QK[query, place], negative = heapq.heappop(best)
            rows_QK[query, place] = -negative
