"""The `tantivy` engine of BM25: an inverted index on disk, for millions of passages.

It is fed the terms of our own analyzer, joined by spaces, so that a passage matches exactly where it does under
`bm25s`. What differs is the scale and the grain of the scores: tantivy's k1 and b are fixed (1.2 and 0.75), and it
keeps the length of a passage in one byte, exact to 40 terms and rounded down by up to an eighth above. The order of
two passages of nearly equal score may differ from that of `bm25s`; the same index always gives the same order.

tantivy scores in double precision, so copies of a passage have the same score to the bit; which of them it returns
depends on how its segments were merged. Every document carries its row, by which ties are put in corpus order
(`ranking.py`).

The build holds one buffer of `HEAP_BYTES`, whatever the size of the corpus. Its files have random names, and where
segments begin depends on timing: two builds of a corpus differ in bytes and answer alike.
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

from trl_search.common.errors import UserError
from trl_search.retrieval.bm25.analyzer import STOP_MARK, Analyzer
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.ranking import Hits, best_rows

K1, B = 1.2, 0.75  # constants of tantivy
HEAP_BYTES = 256 << 20
REMOVALS = 20  # tries to remove a folder in which tantivy may hold a lock for an instant
TERMS, STOPS, ROW = "terms", "stops", "row"


def import_tantivy() -> Any:
    try:
        import tantivy
    except ImportError as error:
        raise UserError("BM25's tantivy engine needs tantivy: pip install 'trl-search[tantivy]'") from error
    return tantivy


def schema() -> Any:
    """A document: its terms and its stop words with their counts, and its row in the corpus, which has the text."""
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
    """Indexes the terms of every passage into the new folder `folder`."""
    tantivy = import_tantivy()
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
    folder.mkdir()
    # One thread: several would each hold a buffer and write segments of interleaved rows, and splitting into terms, in
    # Python, is what takes the time.
    searchable = False
    with tantivy.Index(schema(), path=str(folder)).writer(heap_size=HEAP_BYTES, num_threads=1) as writer:
        for row in tqdm(range(len(corpus)), desc="indexing terms", unit=" passages", disable=None):
            passage = corpus[row]
            terms, stops = analyzer.split(passage.titled_text)
            writer.add_document(document(row, terms, stops))
            searchable = searchable or bool(terms)
        if not searchable:
            raise UserError("no passage holds a word that can be searched; check the corpus and the stop words")
    # Left well, the writer has committed and merged; left by an error, it has stopped writing.
    for own in folder.glob(".*"):
        own.unlink()  # the writer's locks and its list of files to clean up, which readers do without
    shutil.copymode(next(folder.glob("*.idx")), folder / "meta.json")  # tantivy makes it for its owner's eyes alone


class TantivyEngine:
    """Ranks rows by a folder that `write_terms` made, memory-mapped. Searches of one batch run on several threads.

    Args:
        folder (`Path`): What `write_terms` made.
        passages (`int`): How many there are.
        threads (`int`, *optional*): How many queries of a batch are searched at a time; by default one a CPU.
    """

    def __init__(self, folder: Path, passages: int, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UserError(
                f"threads is how many queries of a batch are searched at a time, at least 1; got {threads}"
            )
        self._tantivy = import_tantivy()
        self._schema = schema()
        self._searcher = _open(folder)
        if self._searcher.num_docs != passages:
            raise UserError(f"{folder} holds {self._searcher.num_docs} passages of {passages}; rebuild the index")
        self._passages = passages
        self._threads = threads or _cpus()

    def rank(self, queries: list[list[str]], k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query with their scores, equal scores in corpus order."""
        threads = min(self._threads, len(queries))
        if threads < 2:
            return [self._rank(query, k) for query in queries]
        with ThreadPoolExecutor(threads) as pool:  # made anew: the threads of a kept one would be missing after a fork
            return list(pool.map(lambda query: self._rank(query, k), queries))

    def _rank(self, terms: list[str], k: int) -> list[tuple[int, float]]:
        query = self._tantivy.Query.boolean_query(
            [
                (self._tantivy.Occur.Should, self._tantivy.Query.term_query(self._schema, field, term, "freq"))
                for field, term in ((STOPS if term.startswith(STOP_MARK) else TERMS, term) for term in terms)
            ]
        )

        def fetch(_: list[int], count: int) -> list[Hits]:
            hits = self._searcher.search(query, limit=count, count=False).hits
            rows = self._searcher.fast_field_values(ROW, [address for _, address in hits])
            return [(np.array([score for score, _ in hits]), np.array(rows, dtype=np.int64))]

        (ranked,) = best_rows(fetch, 1, k, self._passages, tie=0.0, decimals=None)
        return ranked


def _open(folder: Path) -> Any:
    """Opening takes a lock, a file in the folder, and an index may lie where this process may not write: it is opened
    through links, in a folder of its own that is gone once every file is mapped."""
    links = Path(tempfile.mkdtemp(prefix="trl-search-tantivy-"))
    try:
        for file in folder.iterdir():
            os.symlink(file.resolve(), links / file.name)
        index = import_tantivy().Index.open(str(links))
        index.config_reader(reload_policy="manual")  # nobody writes to it; the default polls the folder on a thread
        return index.searcher()
    finally:
        # That thread may have begun, and take its lock in the folder at the very moment it is removed.
        for _ in range(REMOVALS):
            shutil.rmtree(links, ignore_errors=True)
            if not links.exists():
                break
            time.sleep(0.05)


def _cpus() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
