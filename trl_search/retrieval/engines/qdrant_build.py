"""Loading a Qdrant collection: `trl-search index --kind qdrant`, in batches that a killed run need not send again.

The index folder stays the place of the passages, whole and in order, from which a collection can be loaded again; what
searches needs Qdrant alone. The collection's metadata come last: before, it is refused as one that is being loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError, unknown_name
from trl_search.retrieval.bm25.analyzer import ANALYZER_VERSION, Analyzer
from trl_search.retrieval.bm25.sparse_vectors import mean_length, weigh
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.dense.corpus_vectors import VECTORS, EncodingOptions
from trl_search.retrieval.dense.encoder import recorded
from trl_search.retrieval.engines.base import Journal, corpus_hash, repeat_trouble
from trl_search.retrieval.engines.qdrant import ABOUT, API_KEY, DENSE, SPARSE, call, connect
from trl_search.retrieval.index.build_folder import SCRATCH
from trl_search.retrieval.index.workers import Workers

QUANTIZATIONS = ("none", "int8", "binary")
MAX_UPSERT = 1000  # points a request: of 768 dimensions 10 MB of JSON, and a server takes 32


@dataclass(frozen=True)
class QdrantBuilder(EncodingOptions):
    """How passages become a collection, and `build_index(kind="qdrant")`.

    Args:
        url (`str`, *optional*): Of the engine: a node of the Qdrant or OpenSearch cluster, http://host:6333.
        path (`str`, *optional*): A folder in place of `url`: Qdrant inside of its client, to try it out.
        collection (`str`): The name of the Qdrant collection to make.
        vectors (`str`): What is searched by: "dense" (meaning) or "sparse" (BM25).
        stemmer (`str`, *optional*): Of sparse vectors: a Snowball algorithm; `None` does not stem.
        stopwords (`str`, *optional*): Of sparse vectors: a language whose stop words are dropped.
        shards (`int`, *optional*): Pieces of the collection or index; by default one a node of Qdrant, and one of
            OpenSearch.
        replicas (`int`): Copies of each shard.
        quantization (`str`): Of Qdrant's dense vectors in memory: "none", "int8" (a quarter), "binary" (a 32nd).
        on_disk (`bool`): Whole vectors stay on disk, memory-mapped; with a quantization, which then is in memory.
        replace (`bool`): Deletes a collection or index of that name first.
        api_key_env (`str`): The environment variable that holds Qdrant's API key, where there is one.
        timeout_s (`int`): Seconds until one request to an engine counts as failed.
    """

    url: str | None = None
    path: str | None = None
    collection: str = "passages"
    vectors: str = DENSE
    stemmer: str | None = "english"
    stopwords: str | None = "english"
    shards: int | None = None
    replicas: int = 1
    quantization: str = "none"
    on_disk: bool = False
    replace: bool = False
    api_key_env: str = API_KEY
    timeout_s: int = 120

    def __post_init__(self) -> None:
        if self.vectors not in (DENSE, SPARSE):
            raise unknown_name("kind of vectors", self.vectors, [DENSE, SPARSE])
        if self.quantization not in QUANTIZATIONS:
            raise unknown_name("quantization", self.quantization, QUANTIZATIONS)
        if self.vectors == SPARSE and self.quantization != "none":
            raise UserError("quantization is of dense vectors; sparse ones are small as they are")
        if self.replicas < 1 or (self.shards is not None and self.shards < 1):
            raise UserError(f"shards and replicas must be at least 1; got {self.shards} and {self.replicas}")
        if self.vectors == DENSE:
            self.check_encoding()
        else:
            _ = self.analyzer
        if self.path is not None and self.url is None:
            object.__setattr__(self, "path", str(Path(self.path).resolve()))
        else:
            connect(self.url, self.path, self.api_key_env, self.timeout_s).close()

    @cached_property
    def analyzer(self) -> Analyzer:
        return Analyzer(self.stemmer, self.stopwords)

    def share(self, corpus: Corpus, folder: Path, workers: Workers) -> None:
        if self.vectors == DENSE:
            self.encode(corpus, folder / SCRATCH, workers)

    def build(self, corpus: Corpus, folder: Path) -> dict[str, Any]:
        client = connect(self.url, self.path, self.api_key_env, self.timeout_s)
        try:
            journal = Journal(folder)
            if not journal.made:
                self._make(client)
                journal.note(0)
            self._load(client, corpus, folder, journal)
            stored = self._call(client.count, exact=True).count
            if stored != len(corpus):
                raise UserError(
                    f"the collection {self.collection!r} has {stored:,} passages, not {len(corpus):,}: somebody else "
                    "writes to it, or deleted it; load it again with --replace"
                )
            about: dict[str, Any] = {"corpus": corpus_hash(folder), "passages": len(corpus), "vectors": self.vectors}
            if self.vectors == DENSE:
                about["encoder"] = recorded(self.loaded)
            else:
                about |= {"analyzer": ANALYZER_VERSION, "stemmer": self.stemmer, "stopwords": self.stopwords}
            self._call(client.update_collection, metadata={ABOUT: about})
            return about
        finally:
            client.close()

    def _make(self, client: Any) -> None:
        from qdrant_client import models

        if self._call(client.collection_exists):
            if not self.replace:
                raise UserError(
                    f"Qdrant has a collection {self.collection!r} already; choose another name, or --replace it"
                )
            self._call(client.delete_collection)
        dense, sparse = {}, {}
        if self.vectors == DENSE:
            # Unit vectors are compared by their product as others are: it is what the encoder was trained with.
            dense[DENSE] = models.VectorParams(
                size=self.loaded.dim, distance=models.Distance.DOT, on_disk=self.on_disk or None
            )
        else:
            sparse[SPARSE] = models.SparseVectorParams(
                modifier=models.Modifier.IDF, index=models.SparseIndexParams(on_disk=self.on_disk)
            )
        quantization: Any = None
        if self.quantization == "int8":
            quantization = models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            )
        elif self.quantization == "binary":
            quantization = models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
        self._call(
            client.create_collection,
            vectors_config=dense,
            sparse_vectors_config=sparse,
            shard_number=self.shards,
            replication_factor=self.replicas,
            on_disk_payload=True,
            quantization_config=quantization,
        )

    def _load(self, client: Any, corpus: Corpus, folder: Path, journal: Journal) -> None:
        """Batches in order, each on disk at Qdrant before the next is sent. One sent twice is the same twice."""
        vectors = self._dense_vectors(folder) if self.vectors == DENSE else self._sparse_vectors(corpus)
        with tqdm(total=len(corpus), initial=journal.rows, desc="loading", unit=" passages", disable=None) as bar:
            for start in range(journal.rows, len(corpus), MAX_UPSERT):
                rows = range(start, min(start + MAX_UPSERT, len(corpus)))
                self._call(client.upsert, points=list(self._points(corpus, rows, vectors)), wait=True)
                journal.note(rows.stop)
                bar.update(len(rows))

    def _points(self, corpus: Corpus, rows: range, vectors: Any) -> Iterator[Any]:
        from qdrant_client import models

        for row in rows:
            passage = corpus[row]
            payload = {"id": passage.id, "title": passage.title, "text": passage.text}
            if passage.url is not None:
                payload["url"] = passage.url
            yield models.PointStruct(id=row, vector={self.vectors: vectors(row)}, payload=payload)

    def _dense_vectors(self, folder: Path) -> Any:
        vectors_ND = np.load(folder / SCRATCH / VECTORS, mmap_mode="r")
        return lambda row: vectors_ND[row].tolist()

    def _sparse_vectors(self, corpus: Corpus) -> Any:
        from qdrant_client import models

        mean = mean_length(corpus, self.analyzer)

        def vector(row: int) -> Any:
            weights = weigh(corpus[row], self.analyzer, mean)
            return models.SparseVector(indices=list(weights), values=list(weights.values()))

        return vector

    def _call(self, method: Any, **options: Any) -> Any:
        return repeat_trouble(lambda: call(method, self.collection, **options))
