"""The `bm25s` engine of BM25: scores are computed once, while indexing. For up to about two million passages.

    terms ["talvan", "born"]  ->  ids [17, 4]  ->  [(row 0, 1.93), (row 5, 0.41)]

`bm25s` computes the scores and stores them by term. `postings.py` searches them instead of bm25s, whose search sums a
score for every passage of the corpus at every query, orders ties differently by backend and k, returns passages that
match nothing, raises for a batch without a known word, and compiles for ten seconds.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.bm25.analyzer import Analyzer, import_bm25s
from trl_search.retrieval.bm25.postings import Postings
from trl_search.retrieval.corpus.passages import Passages

K1, B = 1.5, 0.75


def index_terms(passages: Passages, analyzer: Analyzer, *, k1: float, b: float) -> Any:
    """A `bm25s.BM25` of the passages. Term ids are in order of appearance, with the ids of stop words last.

    Raises:
        UserError: if no passage holds a word.
    """
    kept, stops = _Terms(), _Terms()
    for row in tqdm(range(len(passages)), desc="splitting into terms", unit=" passages", disable=None):
        passage = passages[row]
        for terms, found in zip((kept, stops), analyzer.split(passage.titled_text), strict=True):
            terms.add(found)
    if not kept.vocabulary:
        raise UserError("no passage holds a word that can be searched; check the corpus and the stop words")
    index = kept.scores(k1, b)
    if stops.vocabulary:
        _append(index, stops.scores(k1, b))
    return index


class _Terms:
    """The terms of every passage, by number."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self._documents: list[array[int]] = []  # 4 bytes per term; bm25s' own lists take twice that

    def add(self, terms: Sequence[str]) -> None:
        numbers = [self.vocabulary.setdefault(term, len(self.vocabulary)) for term in terms]
        self._documents.append(array("i", numbers))

    def scores(self, k1: float, b: float) -> Any:
        index = import_bm25s().BM25(
            k1=k1, b=b, method="lucene", backend="numpy", csc_backend="numpy", auto_compile=False
        )
        # bm25s would add an empty term whose id lies outside its arrays.
        index.index((self._documents, self.vocabulary), create_empty_token=False, show_progress=sys.stderr.isatty())
        return index


def _append(index: Any, more: Any) -> None:
    """Appends the terms of `more` to those of `index`. Their scores are unchanged: BM25 over stop words only."""
    ours, theirs, terms = index.scores, more.scores, len(index.vocab_dict)
    index.scores = {
        **ours,
        "data": np.concatenate([ours["data"], theirs["data"]]),
        "indices": np.concatenate([ours["indices"], theirs["indices"]]),
        "indptr": np.concatenate([ours["indptr"], theirs["indptr"][1:] + ours["indptr"][-1]]),
    }
    index.vocab_dict |= {term: terms + number for term, number in more.vocab_dict.items()}
    index.unique_token_ids_set = set(index.vocab_dict.values())


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
