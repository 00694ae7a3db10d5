"""The `tantivy` engine of BM25: an inverted index on disk, for millions of passages.

tantivy receives the terms of our analyzer, joined by spaces, so that the same passages match as with `bm25s`. The
scores differ: tantivy's k1 and b are fixed (1.2 and 0.75), and it stores the length of a passage in one byte, which is
exact up to 40 terms and rounded down by at most an eighth above. So two passages with nearly equal scores may come in
a different order than with `bm25s`. The same index always gives the same order.

tantivy scores in double precision, so copies of a passage have exactly the same score, and the merging of segments
decides which comes first. So every document stores its row number, and `ranking.py` puts ties in corpus order.

The build needs one buffer of `HEAP_BYTES`, whatever the size of the corpus. File names are random and segment
boundaries depend on timing, so two builds of a corpus have different bytes but give the same results.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.bounds import check_at_least
from trl_search.common.errors import UserError
from trl_search.common.extras import import_extra
from trl_search.retrieval.bm25.analyzer import STOP_MARK, Analyzer
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.ranking import Hits, best_rows

K1, B = 1.2, 0.75  # constants of tantivy
HEAP_BYTES = 256 << 20
REMOVALS = 20  # attempts to remove a folder in which tantivy may briefly hold a lock
TERMS, STOPS, ROW = "terms", "stops", "row"


def import_tantivy() -> Any:
    return import_extra("tantivy", "BM25's tantivy engine", "tantivy", "; engine='bm25s' needs none")


def schema() -> Any:
    """The fields of a document: its terms and stop words with their counts, and its row in the corpus."""
    builder = import_tantivy().SchemaBuilder()
    for field in (TERMS, STOPS):
        builder.add_text_field(field, stored=False, tokenizer_name="whitespace", index_option="freq")
    builder.add_unsigned_field(ROW, stored=False, fast=True)
    return builder.build()


def document(row: int, terms: list[str], stops: Sequence[str] = ()) -> Any:
    filled = import_tantivy().Document()
    filled.add_text(TERMS, " ".join(terms))
    filled.add_text(STOPS, " ".join(stops))
    filled.add_unsigned(ROW, row)
    return filled


def write_terms(corpus: Corpus, analyzer: Analyzer, folder: Path) -> None:
    """Indexes the terms of every passage into the new folder `folder`.

    Raises:
        UserError: if no passage holds a word.
    """
    tantivy = import_tantivy()
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
    folder.mkdir()
    # One thread: each thread needs its own buffer, and splitting text in Python takes most of the time.
    searchable = False
    with tantivy.Index(schema(), path=str(folder)).writer(heap_size=HEAP_BYTES, num_threads=1) as writer:
        for row in tqdm(range(len(corpus)), desc="indexing terms", unit=" passages", disable=None):
            passage = corpus[row]
            terms, stops = analyzer.split(passage.titled_text)
            writer.add_document(document(row, terms, stops))
            searchable = searchable or bool(terms)
        if not searchable:
            raise UserError("no passage holds a word that can be searched; check the corpus and the stop words")
    # The writer has committed and merged its segments. (After an error it has only stopped.)
    for own in folder.glob(".*"):
        own.unlink()  # locks and a list of files to clean up, which only a writer needs
    shutil.copymode(next(folder.glob("*.idx")), folder / "meta.json")  # tantivy makes it readable by its owner only


class TantivyEngine:
    """Ranks rows by a folder that `write_terms` made, memory-mapped. Searches of one batch run on several threads.

    Raises:
        UserError: if the folder holds a different number of passages, or `threads` is below 1.
    """

    def __init__(self, folder: Path, passages: int, *, threads: int | None = None) -> None:
        check_at_least(1, threads=threads)
        self._tantivy = import_tantivy()
        self._schema = schema()
        self.searcher = _open(folder)
        if self.searcher.num_docs != passages:
            raise UserError(f"{folder} holds {self.searcher.num_docs} passages of {passages}; rebuild the index")
        self._passages = passages
        self._threads = threads or _cpus()

    def rank(self, queries: list[list[str]], k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query with their scores, equal scores in corpus order."""
        threads = min(self._threads, len(queries))
        if threads < 2:
            return [self._rank(query, k) for query in queries]
        with ThreadPoolExecutor(threads) as pool:  # a new pool each time: threads do not survive a fork
            return list(pool.map(lambda query: self._rank(query, k), queries))

    def _rank(self, terms: list[str], k: int) -> list[tuple[int, float]]:
        query = self._tantivy.Query.boolean_query(
            [
                (self._tantivy.Occur.Should, self._tantivy.Query.term_query(self._schema, field, term, "freq"))
                for field, term in ((STOPS if term.startswith(STOP_MARK) else TERMS, term) for term in terms)
            ]
        )

        def fetch(_: list[int], count: int) -> list[Hits]:
            hits = self.searcher.search(query, limit=count, count=False).hits
            rows = self.searcher.fast_field_values(ROW, [address for _, address in hits])
            return [(np.array([score for score, _ in hits]), np.array(rows, dtype=np.int64))]

        (ranked,) = best_rows(fetch, 1, k, self._passages, tie=0.0, decimals=None)
        return ranked


def _open(folder: Path) -> Any:
    """Opens an index, even in a read-only folder.

    tantivy creates a lock file in the folder. So the index is opened through links in a temporary folder, which is
    removed when all files are mapped."""
    links = Path(tempfile.mkdtemp(prefix="trl-search-tantivy-"))
    try:
        for file in folder.iterdir():
            os.symlink(file.resolve(), links / file.name)
        index = import_tantivy().Index.open(str(links))
        index.config_reader(reload_policy="manual")  # the default polls the folder for changes, on a thread
        return index.searcher()
    finally:
        # The polling thread may have started, and create its lock while the folder is being removed.
        for _ in range(REMOVALS):
            shutil.rmtree(links, ignore_errors=True)
            if not links.exists():
                break
            time.sleep(0.05)


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
