"""The `bm25s` engine of BM25: scores computed once, while indexing; to about two million passages.

    terms ["talvan", "born"]  ->  ids [17, 4]  ->  [(row 0, 1.93), (row 5, 0.41)]

`bm25s` is fast and leaves its edges to the caller; they are all dealt with here:

- equal scores come in an order that differs between its backends and with k: more is fetched than asked for, until no
  tie reaches past what was fetched, and ties are put in corpus order;
- documents that match nothing come with score 0: dropped, so that no match is `[]`;
- k above the number of passages, an empty batch, a query without a known term raise: never passed on;
- its "auto" backend takes jax where jax is installed, and its import claims the GPU there: the backend is named, numba
  if installed, else numpy, and jax is hidden from the import;
- two numba threads can abort the process: one search at a time, behind a lock.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from array import array
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from trl_search.errors import UserError, unknown_name
from trl_search.retrieval.analyzer import Analyzer, import_bm25s
from trl_search.types import Passage

K1, B = 1.5, 0.75
MARGIN = 13  # fetched beyond k at first; most ties end within it


class Passages(Protocol):
    """Passages by row: a `Corpus` on disk, or a tuple."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Passage: ...


def index_terms(passages: Passages, analyzer: Analyzer, *, k1: float, b: float, backend: str) -> Any:
    """A `bm25s.BM25` of the passages, its term ids in order of appearance."""
    vocabulary: dict[str, int] = {}
    documents: list[array[int]] = []  # 4 bytes a term; the lists that bm25s itself makes take twice that
    for row in tqdm(range(len(passages)), desc="splitting into terms", unit=" passages", disable=None):
        passage = passages[row]
        terms = analyzer.terms(f"{passage.title}\n{passage.text}")
        documents.append(array("i", [vocabulary.setdefault(term, len(vocabulary)) for term in terms]))
    if not vocabulary:
        raise UserError("no passage holds a word that can be searched; check the corpus and the stop words")
    scores = import_bm25s().BM25(k1=k1, b=b, method="lucene", backend=backend, csc_backend="numpy", auto_compile=False)
    # The empty term that bm25s would add has an id beyond its own arrays.
    scores.index((documents, vocabulary), create_empty_token=False, show_progress=sys.stderr.isatty())
    return scores


class BM25SEngine:
    """Ranks rows by a `bm25s.BM25`, one search at a time."""

    def __init__(self, scores: Any, passages: int) -> None:
        self._scores, self._passages = scores, passages
        self._lock = threading.Lock()
        if scores.backend == "numba":
            self._rank([[0]], k=1)  # numba compiles for ten seconds on the first search; that is no time for a rollout

    @classmethod
    def open(cls, folder: Path, passages: int, *, backend: str | None) -> BM25SEngine:
        """Opens what `bm25s` saved in `folder`, memory-mapped."""
        scores = import_bm25s().BM25.load(
            folder, mmap=True, backend=choose_backend(backend), csc_backend="numpy", auto_compile=False
        )
        return cls(scores, passages)

    def rank(self, queries: list[list[str]], k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query with their scores, equal scores in corpus order."""
        vocabulary: dict[str, int] = self._scores.vocab_dict
        known = [[vocabulary[term] for term in query if term in vocabulary] for query in queries]
        asked = [query for query, ids in enumerate(known) if ids]
        ranked: list[list[tuple[int, float]]] = [[] for _ in queries]
        with self._lock:
            for query, rows in zip(asked, self._rank([known[query] for query in asked], k), strict=True):
                ranked[query] = rows
        return ranked

    def _rank(self, queries: list[list[int]], k: int) -> list[list[tuple[int, float]]]:
        """Every query has a known term."""
        ranked: list[list[tuple[int, float]]] = [[] for _ in queries]
        pending, fetch = list(range(len(queries))), k + MARGIN
        while pending:
            fetch = min(fetch, self._passages)
            rows_QF, scores_QF = self._scores.retrieve(
                [queries[query] for query in pending],
                k=fetch,
                show_progress=False,
                backend_selection=self._scores.backend,
            )
            undecided = []
            for query, rows, scores in zip(pending, rows_QF, scores_QF, strict=True):
                order = np.lexsort((rows, -scores))[:k]
                # The k-th score is also the last one fetched: documents not fetched may tie, and come earlier.
                if fetch < self._passages and scores[order[-1]] == scores.min() > 0:
                    undecided.append(query)
                else:
                    ranked[query] = [(int(rows[at]), float(scores[at])) for at in order if scores[at] > 0]
            pending, fetch = undecided, 8 * fetch
        return ranked


def choose_backend(name: str | None) -> str:
    """ "numba" where it is installed, else "numpy"; a name is taken at its word."""
    if name is None:
        return "numba" if importlib.util.find_spec("numba") else "numpy"
    if name not in ("numba", "numpy"):
        raise unknown_name("BM25 backend", name, ["numba", "numpy"])
    if name == "numba" and not importlib.util.find_spec("numba"):
        raise UserError(
            "BM25's numba backend needs numba: pip install 'trl-search[bm25]'; backend='numpy' does the same, slower"
        )
    return name
