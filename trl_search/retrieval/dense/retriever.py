"""Dense retrieval: an encoder turns text into vectors, and a vector index finds the nearest ones (`vectors/`).

Batching changes the last bits of a vector and of a score, so nearly equal scores count as ties, in corpus order
(`ranking.py`). Results do not depend on the rest of the batch. With queries encoded in bfloat16 or float16, batching
changes scores by thousandths, and may swap passages whose scores are that close.

    load_retriever("dense", index="indexes/wiki")                                 made by trl-search index --kind dense
    load_retriever("dense", passages=passages, encoder="intfloat/e5-base-v2")     in memory
    load_retriever("dense", faiss_file="e5_Flat.index", corpus="wiki-18.jsonl", encoder="intfloat/e5-base-v2")
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.common.errors import UserError, unknown_name
from trl_search.retrieval.base import Retriever, check_search
from trl_search.retrieval.corpus.fields import Fields
from trl_search.retrieval.corpus.passages import Corpus, Passages, join_contents, read_corpus, refuse_duplicates
from trl_search.retrieval.corpus.published import check_encoder, open_jsonl
from trl_search.retrieval.dense.corpus_vectors import ENCODER, VECTORS, EncodingOptions
from trl_search.retrieval.dense.encoder import Encoder, load_encoder, load_recorded
from trl_search.retrieval.dense.vectors import (
    VECTOR_INDEXES,
    VectorSearch,
    build_vectors,
    open_faiss_file,
    open_vectors,
    plan,
)
from trl_search.retrieval.dense.vectors.gpu import search_in_memory
from trl_search.retrieval.dense.vectors.search import read_faiss, stored_rows
from trl_search.retrieval.index.build_folder import SCRATCH
from trl_search.retrieval.index.folder import open_index, reading_index
from trl_search.retrieval.index.workers import Workers
from trl_search.retrieval.ranking import MARGIN, Hits, best_rows
from trl_search.types import Passage

KIND = "dense"
MOST_FETCHED = 4096  # rows per query; of a longer tie, the first rows that the index returned are used


@dataclass(frozen=True)
class DenseBuilder(EncodingOptions):
    """Builds a dense index: the options of `build_index(kind="dense")`.

    Args:
        index_type (`str`): "flat" (exact), "fp16", "int8", "small" (a thirtieth of the memory), "small-ivf" or "hnsw".
        seed (`int`): The seed of the sample of passages that the index is trained on.
    """

    index_type: str = "flat"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.index_type not in VECTOR_INDEXES:
            raise unknown_name("type of vector index", self.index_type, VECTOR_INDEXES)
        self.check_encoding()

    def plan(self, passages: int) -> str:
        """The memory, disk, build time and recall of the index, and the cost of encoding."""
        scratch = passages * self.loaded.dim * np.dtype(self.dtype).itemsize
        return (
            f"{plan(self.index_type, passages, self.loaded.dim).describe()}\n"
            f"while it builds, {scratch / 1e9:,.2f} GB of vectors on disk as well, and the time to encode them first"
        )

    def share(self, corpus: Corpus, folder: Path, workers: Workers) -> None:
        self.encode(corpus, folder / SCRATCH, workers)

    def build(self, corpus: Corpus, folder: Path) -> dict[str, Any]:
        (folder / KIND).mkdir(exist_ok=True)
        vectors_ND = np.load(folder / SCRATCH / VECTORS, mmap_mode="r")
        measured = build_vectors(folder / KIND, vectors_ND, index=self.index_type, seed=self.seed)
        return {"encoder": asdict(self.loaded.fingerprint), "vectors": measured}


class DenseRetriever(Retriever):
    """Searches by meaning. Make one with `load_retriever("dense", ...)`.

    Raises:
        UserError: if vectors, passages and encoder do not match.
    """

    def __init__(self, encoder: Encoder, vectors: VectorSearch, passages: Passages) -> None:
        if encoder.dim != vectors.dim:
            raise UserError(
                f"encoder {encoder.fingerprint.name!r} makes vectors of {encoder.dim} dimensions and the index holds "
                f"vectors of {vectors.dim}: it was built with another encoder"
            )
        if len(passages) != vectors.count:
            raise UserError(
                f"the corpus has {len(passages):,} passages and the index {vectors.count:,} vectors: they do not match"
            )
        self.encoder, self._vectors, self._passages = encoder, vectors, passages
        self._lock = threading.Lock()  # keeps `close` from running during a search

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        check_search(queries, k)
        # A query without letters or digits would still get a vector, and match meaningless passages.
        asked = [number for number, query in enumerate(queries) if any(map(str.isalnum, query))]
        found: list[list[Passage]] = [[] for _ in queries]
        with self._lock:
            self._check_open()
            vectors_QD = self.encoder.encode_queries([queries[number] for number in asked])
            for number, ranked in zip(asked, self._rank(vectors_QD, k), strict=True):
                found[number] = [replace(self._passages[row], score=score) for row, score in ranked]
        return found

    def _rank(self, vectors_QD: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
        """The best `k` rows of each query, equal scores in corpus order."""

        def fetch(queries: list[int], count: int) -> list[Hits]:
            scores_QF, rows_QF = self._vectors.search(vectors_QD[queries], count)
            return [(scores[rows >= 0], rows[rows >= 0]) for scores, rows in zip(scores_QF, rows_QF, strict=True)]

        most = min(max(k + MARGIN, MOST_FETCHED), self._vectors.count)
        return best_rows(fetch, len(vectors_QD), k, most)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._vectors.close()
            if isinstance(self._passages, Corpus):
                self._passages.close()


def load(
    *,
    index: str | Path | None = None,
    corpus: str | Path | None = None,
    passages: Iterable[Passage] | None = None,
    faiss_file: str | Path | None = None,
    encoder: str | Path | Encoder | None = None,
    device: str | None = None,
    gpu_engine: str = "torch",
    dtype: str = "float32",
    check_source: bool = True,
    nprobe: int | None = None,
    ef_search: int | None = None,
    trust_remote_code: bool = False,
    id_field: str | None = None,
    title_field: str | None = None,
    text_field: str | None = None,
    **options: Any,
) -> DenseRetriever:
    """`load_retriever("dense", ...)`: give `index`; `passages` or a `corpus`; or `faiss_file` and `corpus`.

    Args:
        index (`str | Path`, *optional*): A folder made by `trl-search index --kind dense`. It records its encoder.
        corpus (`str | Path`, *optional*): A file or dataset to encode now; with `faiss_file` its jsonl file.
        passages (`Iterable[Passage]`, *optional*): Passages to encode now.
        faiss_file (`str | Path`, *optional*): A published index, such as `e5_Flat.index`, used without conversion.
        encoder (`str | Path | Encoder`, *optional*): By default the encoder of the index, else `intfloat/e5-base-v2`.
            An index accepts no other encoder: pass it only if its files have moved.
        device (`str`, *optional*): Of encoder and index: "cpu", "cuda"; by default GPUs, if there are any with enough
            memory.
        gpu_engine (`str`): The library that searches an index on GPUs: "torch", or "faiss" with the extra `faiss-gpu`.
        dtype (`str`): Precision of encoding queries.
        check_source (`bool`): Rejects an index whose source has changed, or a published index of another encoder.
        nprobe (`int`, *optional*): Of an IVF: lists that are searched; more lists raise recall. The default is the
            calibrated value; for a published index, the value in its file or, if that is FAISS' default of 1, a value
            measured now.
        ef_search (`int`, *optional*): Of a graph: candidates; more raise recall.
        trust_remote_code (`bool`): Runs Python code from the encoder's checkpoint.
        id_field, title_field, text_field (`str`, *optional*): With `corpus`: its fields, if they are not the usual
            ones (see `Fields`).
        options: `query_encoder`, `max_length`, `query_prompt`, `passage_prompt`, `pooling`, `normalize`: see
            `EncodingOptions`. An index records its own.

    Raises:
        UserError: for options that cannot be combined.
    """
    named = Fields(id_field, title_field, text_field)
    named.check_use(corpus if faiss_file is None else None)
    places = "cpu" if device == "cpu" else "auto"
    how: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    found: dict[str, Any] = {"nprobe": nprobe, "ef_search": ef_search, "gpu_engine": gpu_engine}
    if index is None and faiss_file is None and (nprobe, ef_search, gpu_engine) != (None, None, "torch"):
        raise UserError(
            "nprobe, ef_search and gpu_engine are options of an index; passages in memory are searched exactly"
        )
    if index is not None:
        if options or corpus is not None or passages is not None or faiss_file is not None:
            given = sorted(options) or ["corpus, passages and faiss_file"]
            raise UserError(f"{', '.join(given)}: fixed when {index} was built; rebuild it to change them")
        opened = open_index(index, KIND, check_source=check_source)
        with reading_index(index):
            encoder = load_recorded(opened.manifest.details["encoder"], encoder, str(index), **how)
        return DenseRetriever(encoder, open_vectors(opened.folder / KIND, device=places, **found), opened.corpus)
    if (corpus is None) == (passages is None) or (faiss_file is not None and corpus is None):
        raise UserError(
            "dense needs one of index=DIR, corpus=FILE.jsonl and passages=[...], or faiss_file=FILE.index and "
            "corpus=FILE.jsonl"
        )
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder or ENCODER, **how, **options)
    if faiss_file is not None:
        assert corpus is not None
        rows = open_jsonl(corpus)
        retriever = DenseRetriever(encoder, open_faiss_file(Path(faiss_file), device=places, **found), rows)
        stored_ND = stored_rows(Path(faiss_file), read_faiss(Path(faiss_file))) if check_source else None
        if stored_ND is not None:
            check_encoder(encoder, stored_ND, rows, str(faiss_file))
        return retriever
    read = read_corpus(corpus, named) if corpus is not None else passages
    assert read is not None
    kept = tuple(refuse_duplicates(read))
    if not kept:
        raise UserError("no passages; a corpus needs one at least")
    return DenseRetriever(encoder, search_in_memory(encoder.encode_passages(list(map(join_contents, kept)))), kept)
