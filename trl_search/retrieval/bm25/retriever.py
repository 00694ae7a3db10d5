"""BM25: lexical search, with one of two engines that match the same words.

    engine     for up to            disk per passage  what it stores                    memory to build
    bm25s      about two million    0.7 kB            scores, computed while indexing   5 GB per million passages
    tantivy    tens of millions     0.2 kB            an inverted index                 half a GB

`Analyzer` turns passages and queries into terms, and an engine sees only terms. So both engines match the same
passages and follow the same rules (no match gives `[]`, ties are in corpus order, k may exceed the corpus). Their
scores differ slightly, see `tantivy_engine.py`. `build_index` chooses the engine by the number of passages.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from trl_search.common.bounds import check_not_negative, check_share
from trl_search.common.errors import UserError, unknown_name
from trl_search.retrieval.base import Retriever, check_search
from trl_search.retrieval.bm25 import bm25s_engine, tantivy_engine
from trl_search.retrieval.bm25.analyzer import ANALYZER_VERSION, Analyzer
from trl_search.retrieval.bm25.postings import choose_backend
from trl_search.retrieval.corpus.fields import Fields
from trl_search.retrieval.corpus.passages import Corpus, Passages, read_corpus, refuse_duplicates
from trl_search.retrieval.index.folder import IndexFolderError, open_index, reading_index, rebuild_hint
from trl_search.types import Passage

KIND = "bm25"
BM25S, TANTIVY = "bm25s", "tantivy"
# The subfolder in an index folder names its engine.
BM25S_FOLDER, TANTIVY_FOLDER = "bm25", "tantivy"
BM25S_LIMIT = 2_000_000  # passages; above this, bm25s needs more than 10 GB of memory to build
SAMPLE = 1000  # passages sampled to check that the analyzer suits the corpus
MAX_QUERY_TERMS = 256  # a question has ten terms; a page of 20,000 would delay all other searches for minutes

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Ranks rows for queries given as terms. Thread-safe."""

    def rank(self, queries: list[list[str]], k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query with their scores, all above 0, equal scores in corpus order."""


@dataclass(frozen=True)
class BM25Builder:
    """Builds a BM25 index: the options of `build_index(kind="bm25")`.

    Args:
        stemmer (`str`, *optional*): A Snowball algorithm: "english", "german", ...; `None` does not stem.
        stopwords (`str`, *optional*): A language whose stop words are dropped, except from a query that has no other
            word; `None` keeps every word.
        k1 (`float`, *optional*): Saturation of repeated terms: higher counts them more. The default is 1.5 with bm25s;
            tantivy's is fixed at 1.2.
        b (`float`, *optional*): Length normalisation, 0 to 1: higher lowers the scores of long passages more. The
            default is 0.75, fixed with tantivy.
        engine (`str`): "bm25s", "tantivy", or "auto": bm25s up to two million passages, tantivy above.
        fold_accents (`bool`): Drops accents: "Zurich" finds "Zürich", and vice versa.
    """

    stemmer: str | None = "english"
    stopwords: str | None = "english"
    k1: float | None = None
    b: float | None = None
    engine: str = "auto"
    fold_accents: bool = False

    def __post_init__(self) -> None:
        check_not_negative(k1=self.k1)
        check_share(b=self.b)
        if self.engine not in (BM25S, TANTIVY, "auto"):
            raise unknown_name("BM25 engine", self.engine, [BM25S, TANTIVY, "auto"])
        # Reject a wrong option now, not after an hour of reading.
        self.analyzer()
        if self.engine == TANTIVY:
            self._check_tantivy()

    def analyzer(self) -> Analyzer:
        return Analyzer(self.stemmer, self.stopwords, self.fold_accents)

    def build(self, corpus: Corpus, folder: Path) -> dict[str, Any]:
        """Writes the engine's files, and returns the values chosen for the defaults, for the manifest."""
        step = max(1, len(corpus) // SAMPLE)
        sample = (corpus[row] for row in range(0, len(corpus), step))
        misfit = self.analyzer().misfit(passage.titled_text for passage in sample)
        if misfit is not None:
            logger.warning("this analyzer does not suit this corpus: %s", misfit)
        if self.engine == TANTIVY or (self.engine == "auto" and len(corpus) > BM25S_LIMIT):
            self._check_tantivy()
            tantivy_engine.write_terms(corpus, self.analyzer(), folder / TANTIVY_FOLDER)
            return {"analyzer": ANALYZER_VERSION, "engine": TANTIVY, "k1": tantivy_engine.K1, "b": tantivy_engine.B}
        scores = self.score(corpus)
        scores.save(folder / BM25S_FOLDER, show_progress=False)
        return {"analyzer": ANALYZER_VERSION, "engine": BM25S, "k1": scores.k1, "b": scores.b}

    def score(self, passages: Passages) -> Any:
        """A `bm25s.BM25` of the passages."""
        k1, b = bm25s_engine.K1 if self.k1 is None else self.k1, bm25s_engine.B if self.b is None else self.b
        return bm25s_engine.index_terms(passages, self.analyzer(), k1=k1, b=b)

    def _check_tantivy(self) -> None:
        if self.k1 not in (None, tantivy_engine.K1) or self.b not in (None, tantivy_engine.B):
            raise UserError(
                f"tantivy's k1 and b are fixed at {tantivy_engine.K1} and {tantivy_engine.B}, "
                f"got k1={self.k1} and b={self.b}: "
                f"leave them out, or index with engine='bm25s', which serves up to about {BM25S_LIMIT:,} passages"
            )
        tantivy_engine.import_tantivy()


class BM25Retriever(Retriever):
    """Lexical search. Make one with `from_passages` (in memory), `from_index` (memory-mapped) or `load_retriever`."""

    def __init__(self, engine: Engine, passages: Passages, analyzer: Analyzer) -> None:
        self.engine, self._passages, self._analyzer = engine, passages, analyzer
        self._lock = threading.Lock()  # keeps `close` from running while passages are read

    @classmethod
    def from_passages(
        cls, passages: Iterable[Passage], *, backend: str | None = None, **options: Any
    ) -> BM25Retriever:
        """Indexes passages in memory with bm25s: 0.1 s per thousand. `options`: see `BM25Builder`."""
        builder = BM25Builder(**options)
        rows = tuple(refuse_duplicates(passages))
        engine = bm25s_engine.BM25SEngine(builder.score(rows), len(rows), choose_backend(backend))
        return cls(engine, rows, builder.analyzer())

    @classmethod
    def from_index(
        cls, folder: str | Path, *, backend: str | None, threads: int | None, check_source: bool
    ) -> BM25Retriever:
        """Opens a folder that `trl-search index --kind bm25` made. Scores and passages stay on disk, memory-mapped.

        Raises:
            UserError: for an index that cannot be opened, or an option of the other engine.
        """
        index = open_index(folder, KIND, check_source=check_source)
        if index.manifest.details.get("analyzer") != ANALYZER_VERSION:
            raise IndexFolderError(
                f"{folder} was built by a version of trl-search that splits text differently, so queries would miss "
                f"passages; {rebuild_hint(folder)}"
            )
        engine: Engine
        with reading_index(folder):
            analyzer = Analyzer(
                **{name: index.manifest.options[name] for name in ("stemmer", "stopwords", "fold_accents")}
            )
            passages = len(index.corpus)
            if (index.folder / TANTIVY_FOLDER).is_dir():
                if backend is not None:
                    raise UserError(f"backend is an option of the bm25s engine, and {folder} was built for tantivy")
                engine = tantivy_engine.TantivyEngine(index.folder / TANTIVY_FOLDER, passages, threads=threads)
            else:
                if threads is not None:
                    raise UserError(f"threads is an option of the tantivy engine, and {folder} was built for bm25s")
                engine = bm25s_engine.BM25SEngine.open(index.folder / BM25S_FOLDER, passages, choose_backend(backend))
        return cls(engine, index.corpus, analyzer)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        check_search(queries, k)
        self._check_open()
        ranked = self.engine.rank([self._analyzer.query_terms(query)[:MAX_QUERY_TERMS] for query in queries], k)
        with self._lock:
            self._check_open()
            return [[replace(self._passages[row], score=score) for row, score in rows] for rows in ranked]

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
    threads: int | None = None,
    check_source: bool = True,
    id_field: str | None = None,
    title_field: str | None = None,
    text_field: str | None = None,
    **options: Any,
) -> BM25Retriever:
    """`load_retriever("bm25", ...)`: give one of `index`, `corpus` and `passages`.

    Args:
        index (`str | Path`, *optional*): A folder made by `trl-search index --kind bm25`.
        corpus (`str | Path`, *optional*): A file or dataset to index in memory, up to about 100,000 passages.
        passages (`Iterable[Passage]`, *optional*): Passages to index in memory.
        backend (`str`, *optional*): Of bm25s: "numba" or "numpy", with the same results; by default numba if it is
            installed.
        threads (`int`, *optional*): Of a tantivy index: queries of a batch that are searched in parallel; by default
            one per CPU.
        check_source (`bool`): With `index`: rejects it if the file that it was built from has changed.
        id_field, title_field, text_field (`str`, *optional*): With `corpus`: its fields, if they are not the usual
            ones (see `Fields`).
        options: With `corpus` or `passages`: `stemmer`, `stopwords`, `k1`, `b`, `fold_accents`. An index records its
            own.

    Raises:
        UserError: for options that cannot be combined.
    """
    named = Fields(id_field, title_field, text_field)
    named.check_use(corpus)
    own = [option.name for option in fields(BM25Builder) if option.name != "engine"]
    for option in options:
        if option not in own:
            raise unknown_name("option of bm25", option, [*list(inspect.signature(load).parameters)[:-1], *own])
    if sum(source is not None for source in (index, corpus, passages)) != 1:
        raise UserError(
            "bm25 needs one of index=DIR, corpus=FILE.jsonl and passages=[...]; on the command line, give the index "
            'folder itself, or --retriever_options \'{"corpus": "FILE.jsonl"}\''
        )
    if index is not None:
        if options:
            raise UserError(f"{', '.join(sorted(options))}: fixed when {index} was built; rebuild it to change them")
        return BM25Retriever.from_index(index, backend=backend, threads=threads, check_source=check_source)
    if threads is not None:
        raise UserError("threads is an option of an index for tantivy; passages in memory are searched by bm25s")
    found = read_corpus(corpus, named) if corpus is not None else passages
    assert found is not None
    return BM25Retriever.from_passages(found, backend=backend, **options)
