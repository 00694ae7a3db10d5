"""BM25 over `bm25s`: the embedded default, good to about two million passages.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from trl_search.errors import UserError, unknown_name
from trl_search.retrieval.analyzer import Analyzer, import_bm25s
from trl_search.retrieval.base import RetrievalError, Retriever
from trl_search.retrieval.corpus import Corpus, read_corpus, refuse_duplicates
from trl_search.retrieval.index import open_index
from trl_search.types import Passage

KIND = "bm25"
MARGIN = 13  # fetched beyond k at first; most ties end within it
MAX_QUERY_TERMS = 256  # a question has ten; a pasted page of 20,000 would hold up everybody else's search for minutes


class Passages(Protocol):
    """Passages by row: a `Corpus` on disk, or a tuple."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Passage: ...


@dataclass(frozen=True)
class BM25Builder:
    """How passages become scores, and `build_index(kind="bm25")`.

    Args:
        stemmer (`str`, *optional*): A Snowball algorithm: "english", "german", ...; `None` does not stem.
        stopwords (`str`, *optional*): A language whose stop words are dropped; `None` keeps every word.
        k1 (`float`): How soon a repeated term stops counting.
        b (`float`): How much long passages are held back, 0 to 1.
    """

    stemmer: str | None = "english"
    stopwords: str | None = "english"
    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise UserError(f"BM25 needs k1 >= 0 and 0 <= b <= 1; got k1={self.k1}, b={self.b}")
        self.analyzer()  # an unknown stemmer is an error now, not after an hour of reading

    def analyzer(self) -> Analyzer:
        return Analyzer(self.stemmer, self.stopwords)

    def build(self, corpus: Corpus, folder: Path) -> None:
        self.score(corpus, "numpy").save(folder / KIND, show_progress=False)

    def score(self, passages: Passages, backend: str) -> Any:
        """A `bm25s.BM25` of the passages, its term ids in order of appearance."""
        analyzer = self.analyzer()
        vocabulary: dict[str, int] = {}
        documents: list[array[int]] = []  # 4 bytes a term; the lists that bm25s itself makes take twice that
        for row in tqdm(range(len(passages)), desc="splitting into terms", unit=" passages", disable=None):
            passage = passages[row]
            terms = analyzer.terms(f"{passage.title}\n{passage.text}")
            documents.append(array("i", [vocabulary.setdefault(term, len(vocabulary)) for term in terms]))
        if not vocabulary:
            raise UserError("no passage holds a word that can be searched; check the corpus and the stop words")
        scores = import_bm25s().BM25(
            k1=self.k1, b=self.b, method="lucene", backend=backend, csc_backend="numpy", auto_compile=False
        )
        # The empty term that bm25s would add has an id beyond its own arrays.
        scores.index((documents, vocabulary), create_empty_token=False, show_progress=sys.stderr.isatty())
        return scores


class BM25Retriever(Retriever):
    """Lexical search. Make one with `from_passages` (in memory), `from_index` (memory-mapped) or `load_retriever`.

    Example:
        >>> retriever = BM25Retriever.from_passages([Passage("1", "Mira Talvane", "Mira Talvane was born in Orlune.")])
        >>> retriever.search(["where was Talvane born?", "zeppelin"], k=3)
        [[Passage(id='1', title='Mira Talvane', text='Mira Talvane was born in Orlune.', score=0.8...)], []]
    """

    def __init__(self, scores: Any, passages: Passages, analyzer: Analyzer) -> None:
        self._scores, self._passages, self._analyzer = scores, passages, analyzer
        self._lock = threading.Lock()
        self._closed = False
        if scores.backend == "numba":
            self._rank([[0]], k=1)  # numba compiles for ten seconds on the first search; that is no time for a rollout

    @classmethod
    def from_passages(
        cls,
        passages: Iterable[Passage],
        *,
        stemmer: str | None = "english",
        stopwords: str | None = "english",
        k1: float = 1.5,
        b: float = 0.75,
        backend: str | None = None,
    ) -> BM25Retriever:
        """Indexes passages in memory. A thousand take a tenth of a second."""
        builder = BM25Builder(stemmer, stopwords, k1, b)
        rows = tuple(refuse_duplicates(passages))
        return cls(builder.score(rows, _backend(backend)), rows, builder.analyzer())

    @classmethod
    def from_index(cls, folder: str | Path, *, backend: str | None = None, check_source: bool = True) -> BM25Retriever:
        """Opens a folder that `trl-search index --kind bm25` made. Scores and passages stay on disk, memory-mapped."""
        index = open_index(folder, KIND, check_source=check_source)
        scores = import_bm25s().BM25.load(
            index.folder / KIND, mmap=True, backend=_backend(backend), csc_backend="numpy", auto_compile=False
        )
        return cls(scores, index.corpus, BM25Builder(**index.manifest.options).analyzer())

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        if isinstance(queries, str):
            raise TypeError("search takes a list of queries; pass [query]")
        if k < 1:
            raise ValueError(f"k is the number of passages wanted a query, at least 1; got {k}")
        vocabulary: dict[str, int] = self._scores.vocab_dict
        terms = [self._analyzer.terms(query)[:MAX_QUERY_TERMS] for query in queries]
        known = [[vocabulary[term] for term in query if term in vocabulary] for query in terms]
        asked = [query for query, ids in enumerate(known) if ids]
        found: list[list[Passage]] = [[] for _ in queries]
        with self._lock:
            if self._closed:
                raise RetrievalError("this BM25 retriever is closed; load it again to search")
            for query, ranked in zip(asked, self._rank([known[query] for query in asked], k), strict=True):
                found[query] = [replace(self._passages[row], score=score) for row, score in ranked]
        return found

    def _rank(self, queries: list[list[int]], k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query, equal scores in corpus order. Every query has a known term."""
        ranked: list[list[tuple[int, float]]] = [[] for _ in queries]
        pending, fetch = list(range(len(queries))), k + MARGIN
        while pending:
            fetch = min(fetch, len(self._passages))
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
                if fetch < len(self._passages) and scores[order[-1]] == scores.min() > 0:
                    undecided.append(query)
                else:
                    ranked[query] = [(int(rows[at]), float(scores[at])) for at in order if scores[at] > 0]
            pending, fetch = undecided, 8 * fetch
        return ranked

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if isinstance(self._passages, Corpus):
                self._passages.close()


def load(
    *,
    index: str | Path | None = None,
    corpus: str | Path | None = None,
    passages: Iterable[Passage] | None = None,
    backend: str | None = None,
    check_source: bool = True,
    **options: Any,
) -> BM25Retriever:
    """`load_retriever("bm25", ...)`: of one of `index`, `corpus` and `passages`.

    Args:
        index (`str | Path`, *optional*): A folder made by `trl-search index --kind bm25`.
        corpus (`str | Path`, *optional*): A jsonl file to index in memory: to about 100,000 passages.
        passages (`Iterable[Passage]`, *optional*): Passages to index in memory.
        backend (`str`, *optional*): "numba" or "numpy"; by default numba where it is installed. Same results.
        check_source (`bool`): With `index`, refuse it when the file it was built from has changed.
        options: With `corpus` or `passages`: `stemmer`, `stopwords`, `k1`, `b`. An index has its own.
    """
    if sum(source is not None for source in (index, corpus, passages)) != 1:
        raise UserError("bm25 needs one of index=DIR, corpus=FILE.jsonl and passages=[...]")
    own = [option.name for option in fields(BM25Builder)]
    for option in options:
        if option not in own:
            raise unknown_name(
                "option of bm25", option, ["index", "corpus", "passages", "backend", "check_source", *own]
            )
    if index is not None:
        if options:
            raise UserError(f"{', '.join(sorted(options))}: fixed when {index} was built; rebuild to change")
        return BM25Retriever.from_index(index, backend=backend, check_source=check_source)
    found = read_corpus(corpus) if corpus is not None else passages
    assert found is not None
    return BM25Retriever.from_passages(found, backend=backend, **options)


def _backend(name: str | None) -> str:
    if name is None:
        return "numba" if importlib.util.find_spec("numba") else "numpy"
    if name not in ("numba", "numpy"):
        raise unknown_name("BM25 backend", name, ["numba", "numpy"])
    if name == "numba" and not importlib.util.find_spec("numba"):
        raise UserError(
            "BM25's numba backend needs numba: pip install 'trl-search[bm25]'; backend='numpy' does the same, slower"
        )
    return name
