"""Finds the best rows for the terms of a query in an inverted index of scores, with numpy or numba.

    term 17 -> rows  3  8 40        totals   row 3: 1.2   row 8: 0.4 + 0.9   row 40: 0.1
    term  4 -> rows  8 91                    row 91: 0.7                  ──► [(8, 1.3), (3, 1.2), ...]

The compiled search reads only the rows of the query's terms, so its cost does not depend on the size of the corpus;
only for very common words does it scan all rows. Both backends add the same float32 numbers in the same order, so
their results are bit-identical.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from trl_search.common.errors import UserError, unknown_name

Array = np.ndarray[Any, Any]


class Postings:
    """Rows (none twice in a term) and scores (float32, above 0) of every term: those of term t are
    `[starts[t], starts[t + 1])`. Not thread-safe."""

    def __init__(self, rows: Array, scores: Array, starts: Array, passages: int, backend: str) -> None:
        # As plain arrays: numba is slower with subclasses such as memory maps, at every call.
        self._rows, self._scores, self._starts = (array.view(np.ndarray) for array in (rows, scores, starts))
        self._totals = np.zeros(passages, dtype=np.float32)  # all 0 between queries
        self._find: Callable[..., None] = _find_by_numpy
        if backend == "numba":
            from trl_search.retrieval.bm25.compiled_search import find

            self._find = find
            self.best([[0]], 1)  # compiles now if the cache is empty, so that no rollout waits for it

    def best(self, queries: Sequence[Sequence[int]], k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query with their scores; equal scores in the order of the rows. A repeated term
        counts again."""
        ends_Q = np.cumsum([len(terms) for terms in queries], dtype=np.int64)
        terms = np.fromiter(chain.from_iterable(queries), dtype=np.int64, count=ends_Q[-1] if queries else 0)
        shape = (len(queries), min(k, len(self._totals)))
        rows_QK, scores_QK = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        try:
            self._find(terms, ends_Q, self._rows, self._scores, self._starts, self._totals, rows_QK, scores_QK)
        except BaseException:  # interrupted or out of memory: the next query must still start at 0
            self._totals[:] = 0
            raise
        return [
            [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
            for rows, scores in zip(rows_QK.tolist(), scores_QK.tolist(), strict=True)
        ]


def _find_by_numpy(
    terms: Array,
    ends_Q: Array,
    rows: Array,
    scores: Array,
    starts: Array,
    totals: Array,
    rows_QK: Array,
    scores_QK: Array,
) -> None:
    """The search of `find`, in numpy."""
    begin, k = 0, rows_QK.shape[1]
    for query, end in enumerate(ends_Q):
        for term in terms[begin:end]:
            span = slice(starts[term], starts[term + 1])
            totals[rows[span]] += scores[span]
        begin = end
        found = np.flatnonzero(totals)
        total = totals[found]
        totals[found] = 0
        if len(found) > k:
            good = total >= np.partition(total, -k)[-k]
            found, total = found[good], total[good]
        best = np.lexsort((found, -total))[:k]
        rows_QK[query, : len(best)], scores_QK[query, : len(best)] = found[best], total[best]


def choose_backend(name: str | None) -> str:
    """The backend of this name; by default "numba" if it is installed, else "numpy".

    Raises:
        UserError: for an unknown backend, or for numba if it is not installed.
    """
    if name is None:
        return "numba" if importlib.util.find_spec("numba") else "numpy"
    if name not in ("numba", "numpy"):
        raise unknown_name("BM25 backend", name, ["numba", "numpy"])
    if name == "numba" and not importlib.util.find_spec("numba"):
        raise UserError(
            "BM25's numba backend needs numba: pip install 'trl-search[bm25]'; backend='numpy' does the same, slower"
        )
    return name
