"""The `bm25s` engine of BM25: scores computed once, while indexing; to about two million passages.

    terms ["talvan", "born"]  ->  ids [17, 4]  ->  [(row 0, 1.93), (row 5, 0.41)]

`bm25s` computes the scores and keeps them on disk, by term. Searching is ours (`postings.py`): its own adds up a score
for every passage of the corpus at every query, gives equal scores in an order that differs between its backends and
with k, gives passages that match nothing, raises for a batch without a known word, and compiles for ten seconds.
Where jax is installed, its import claims the GPU there, so jax is hidden from it.
"""

from __future__ import annotations

import sys
import threading
from array import array
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.bm25.analyzer import Analyzer, import_bm25s
from trl_search.retrieval.bm25.postings import Postings
from trl_search.types import Passage

K1, B = 1.5, 0.75


class Passages(Protocol):
    """Passages by row: a `Corpus` on disk, or a tuple."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Passage: ...


def index_terms(passages: Passages, analyzer: Analyzer, *, k1: float, b: float) -> Any:
    """A `bm25s.BM25` of the passages, its term ids in order of appearance."""
    vocabulary: dict[str, int] = {}
    documents: list[array[int]] = []  # 4 bytes a term; the lists that bm25s itself makes take twice that
    for row in tqdm(range(len(passages)), desc="splitting into terms", unit=" passages", disable=None):
        passage = passages[row]
        terms = analyzer.terms(f"{passage.title}\n{passage.text}")
        documents.append(array("i", [vocabulary.setdefault(term, len(vocabulary)) for term in terms]))
    if not vocabulary:
        raise UserError("no passage holds a word that can be searched; check the corpus and the stop words")
    scores = import_bm25s().BM25(k1=k1, b=b, method="lucene", backend="numpy", csc_backend="numpy", auto_compile=False)
    # The empty term that bm25s would add has an id beyond its own arrays.
    scores.index((documents, vocabulary), create_empty_token=False, show_progress=sys.stderr.isatty())
    return scores


class BM25SEngine:
    """Ranks rows by a `bm25s.BM25`, one search at a time."""

    def __init__(self, scores: Any, passages: int, backend: str) -> None:
        self._vocabulary: dict[str, int] = scores.vocab_dict
        found = scores.scores
        self._postings = Postings(found["indices"], found["data"], found["indptr"], passages, backend)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, passages: int, backend: str) -> BM25SEngine:
        """Opens what `bm25s` saved in `folder`, memory-mapped."""
        scores = import_bm25s().BM25.load(folder, mmap=True, backend="numpy", csc_backend="numpy", auto_compile=False)
        return cls(scores, passages, backend)

    def rank(self, queries: list[list[str]], k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query with their scores, equal scores in corpus order."""
        known = [[self._vocabulary[term] for term in query if term in self._vocabulary] for query in queries]
        with self._lock:
            return self._postings.best(known, k)
