"""Loads a Qdrant collection: `trl-search index --kind qdrant`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.common.bounds import check_minima
from trl_search.common.errors import UserError, unknown_name
from trl_search.retrieval.bm25.analyzer import ANALYZER_VERSION, Analyzer
from trl_search.retrieval.bm25.sparse_vectors import mean_length, weigh
from trl_search.retrieval.corpus.fields import passage_row
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.dense.corpus_vectors import VECTORS, EncodingOptions
from trl_search.retrieval.engines.base import ABOUT, repeat_trouble
from trl_search.retrieval.engines.build import load_engine
from trl_search.retrieval.engines.qdrant import DENSE, SPARSE, call, connect
from trl_search.retrieval.index.build_folder import SCRATCH
from trl_search.retrieval.index.workers import Workers

QUANTIZATIONS = ("none", "int8", "binary")
MAX_UPSERT = 1000  # points per request
NUMBER_BYTES = 22  # the most that a number takes in JSON


@dataclass(frozen=True)
class QdrantBuilder(EncodingOptions):
    """Loads a Qdrant collection: the options of `build_index(kind="qdrant")`.

    Args:
        url (`str`, *optional*): Of the engine: a node of the Qdrant or OpenSearch cluster, http://host:6333.
        path (`str`, *optional*): A folder, instead of `url`: runs Qdrant inside its client, to try it out.
        collection (`str`): The name of the Qdrant collection to make.
        vectors (`str`): The kind of search: "dense" (meaning) or "sparse" (BM25).
        stemmer (`str`, *optional*): Of sparse vectors: a Snowball algorithm; `None` does not stem.
        stopwords (`str`, *optional*): Of sparse vectors: a language whose stop words are dropped.
        shards (`int`, *optional*): Pieces of the collection or index; by default one per node for Qdrant, and one for
            OpenSearch.
        replicas (`int`): Copies of each shard.
        quantization (`str`): How Qdrant keeps dense vectors in memory: "none", "int8" (a quarter) or "binary" (a
            32nd).
        on_disk (`bool`): Full vectors stay on disk, memory-mapped; with quantization, the quantized vectors are in
            memory.
        replace (`bool`): Deletes a collection or index of that name first.
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
    timeout_s: int = 120

    def __post_init__(self) -> None:
        if self.vectors not in (DENSE, SPARSE):
            raise unknown_name("kind of vectors", self.vectors, [DENSE, SPARSE])
        if self.quantization not in QUANTIZATIONS:
            raise unknown_name("quantization", self.quantization, QUANTIZATIONS)
        if self.vectors == SPARSE and self.quantization != "none":
            raise UserError("quantization is of dense vectors; sparse ones are small as they are")
        check_minima(self, shards=1, replicas=1)
        if self.vectors == DENSE:
            self.check_encoding()
        else:
            _ = self.analyzer
        if self.path is not None and self.url is None:
            object.__setattr__(self, "path", str(Path(self.path).resolve()))
        else:
            connect(self.url, self.path, self.timeout_s).close()

    @cached_property
    def analyzer(self) -> Analyzer:
        return Analyzer(self.stemmer, self.stopwords)

    def share(self, corpus: Corpus, folder: Path, workers: Workers) -> None:
        if self.vectors == DENSE:
            self.encode(corpus, folder / SCRATCH, workers)

    def build(self, corpus: Corpus, folder: Path) -> dict[str, Any]:
        about: dict[str, Any] = {"vectors": self.vectors}
        if self.vectors == DENSE:
            about["encoder"] = asdict(self.loaded.fingerprint)
        else:
            about |= {"analyzer": ANALYZER_VERSION, "stemmer": self.stemmer, "stopwords": self.stopwords}
        with contextlib.closing(connect(self.url, self.path, self.timeout_s)) as client:
            engine = _Collection(client, self, corpus, folder)
            return load_engine(engine, corpus, folder, about, replace=self.replace, max_rows=MAX_UPSERT)


class _Collection:
    """The collection while it is loaded."""

    def __init__(self, client: Any, options: QdrantBuilder, corpus: Corpus, folder: Path) -> None:
        self.name = f"Qdrant's collection {options.collection!r}"
        self._client, self._options, self._corpus, self._folder = client, options, corpus, folder

    @cached_property
    def _vector(self) -> Callable[[int], tuple[Any, int]]:
        """A function that returns a row's vector and its number of values."""
        from qdrant_client import models

        if self._options.vectors == DENSE:
            vectors_ND = np.load(self._folder / SCRATCH / VECTORS, mmap_mode="r")
            return lambda row: (vectors_ND[row].tolist(), vectors_ND.shape[1])
        corpus, analyzer = self._corpus, self._options.analyzer
        mean = mean_length(corpus, analyzer)

        def sparse(row: int) -> tuple[Any, int]:
            weights = weigh(corpus[row], analyzer, mean)
            return models.SparseVector(indices=list(weights), values=list(weights.values())), 2 * len(weights)

        return sparse

    def exists(self) -> bool:
        return bool(self._call(self._client.collection_exists))

    def delete(self) -> None:
        self._call(self._client.delete_collection)

    def make(self) -> None:
        from qdrant_client import models

        options = self._options
        dense, sparse = {}, {}
        if options.vectors == DENSE:
            # Unit vectors too are compared by inner product, with which the encoder was trained.
            dense[DENSE] = models.VectorParams(
                size=options.loaded.dim, distance=models.Distance.DOT, on_disk=options.on_disk or None
            )
        else:
            sparse[SPARSE] = models.SparseVectorParams(
                modifier=models.Modifier.IDF, index=models.SparseIndexParams(on_disk=options.on_disk)
            )
        quantization: Any = None
        if options.quantization == "int8":
            quantization = models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            )
        elif options.quantization == "binary":
            quantization = models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
        self._call(
            self._client.create_collection,
            vectors_config=dense,
            sparse_vectors_config=sparse,
            shard_number=options.shards,
            replication_factor=options.replicas,
            on_disk_payload=True,
            quantization_config=quantization,
        )

    def item(self, row: int) -> tuple[Any, int]:
        from qdrant_client import models

        payload = passage_row(self._corpus[row])
        vector, numbers = self._vector(row)
        size = NUMBER_BYTES * numbers + len(json.dumps(payload, ensure_ascii=False).encode())
        return models.PointStruct(id=row, vector={self._options.vectors: vector}, payload=payload), size

    def send(self, items: Sequence[Any]) -> None:
        self._call(self._client.upsert, points=list(items), wait=True)

    def count(self) -> int:
        return int(self._call(self._client.count, exact=True).count)

    def describe(self, about: dict[str, Any]) -> None:
        self._call(self._client.update_collection, metadata={ABOUT: about})

    def _call(self, method: Any, **options: Any) -> Any:
        return repeat_trouble(lambda: call(method, self._options.collection, **options))
