"""Searches a Qdrant cluster, for an index that is too large for one host: by dense vectors, or by BM25.

    trl-search index --kind qdrant --corpus corpus.jsonl --url http://qdrant:6333 --collection wiki --output out
    load_retriever("qdrant", url="http://qdrant:6333", collection="wiki")

Under each row number, a collection holds the passage and its vector: a dense vector of an encoder, or a sparse BM25
vector over the terms of `analyzer.py`, whose inverse document frequencies Qdrant computes (its "idf" modifier). Qdrant
manages shards, replicas, quantisation and disk storage. The collection's metadata (Qdrant 1.16) record the encoder or
analyzer and the corpus, so a gateway needs only an address, and rejects any other encoder.

Qdrant's dense search is approximate (HNSW); `exact=True` reads every vector. `path` instead of `url` runs the official
client in this process without a server, for tests and up to 20,000 passages.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from trl_search.common.bounds import check_at_least
from trl_search.common.credentials import from_environment
from trl_search.common.errors import UserError
from trl_search.common.extras import import_extra
from trl_search.common.tls import tls_context
from trl_search.retrieval.base import (
    KEEP_ALIVE_S,
    RetrievalError,
    Retriever,
    Unavailable,
    check_search,
    failure,
    read_answer,
)
from trl_search.retrieval.bm25.analyzer import ANALYZER_VERSION, Analyzer
from trl_search.retrieval.bm25.retriever import MAX_QUERY_TERMS
from trl_search.retrieval.bm25.sparse_vectors import term_counts
from trl_search.retrieval.dense.encoder import Encoder, load_recorded
from trl_search.retrieval.engines.base import (
    ABOUT,
    MAX_PASSAGES,
    find_about,
    from_folder,
    refuse_another_corpus,
    repeat_trouble,
)
from trl_search.retrieval.ranking import Hits, best_rows
from trl_search.types import Passage

KIND = "qdrant"
DENSE, SPARSE = "dense", "sparse"  # the name of a collection's vector
API_KEY = "QDRANT_API_KEY"
MOST_FETCHED = 4096  # rows per query
MAX_BATCH = 128  # queries per request


class QdrantRetriever(Retriever):
    """Searches a collection. Make one with `load_retriever("qdrant", ...)`.

    Args:
        client (`QdrantClient`): The client, which this retriever closes.
        collection (`str`): Its name.
        about (`dict`): The record of what was loaded ([`read_about`]).
        encoder (`Encoder`, *optional*): For a collection of dense vectors.
        search_params (`dict`): Qdrant's `SearchParams`: `hnsw_ef`, `exact`, `quantization`.
        local (`bool`): The client runs without a server: one search at a time.

    Raises:
        UserError: if the collection was loaded with an incompatible analyzer version.
    """

    def __init__(
        self,
        client: Any,
        collection: str,
        about: dict[str, Any],
        *,
        encoder: Encoder | None,
        search_params: dict[str, Any],
        local: bool,
    ) -> None:
        from qdrant_client import models

        self._vectors = about["vectors"]
        self._client, self._collection, self._encoder = client, collection, encoder
        self._passages = int(about["passages"])
        try:
            self._params = models.SearchParams(**search_params)
        except ValueError as error:
            raise UserError(f"Qdrant does not take these options of a search: {error}") from error
        self._lock = threading.Lock() if local else None
        self.max_concurrent_batches = 1 if local else 4
        if encoder is None:
            if about.get("analyzer") != ANALYZER_VERSION:
                raise UserError(
                    f"the collection {collection!r} was loaded by a version of trl-search that splits text "
                    "differently, so queries would miss passages; load it again with --replace"
                )
            self._analyzer = Analyzer(about["stemmer"], about["stopwords"])

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        check_search(queries, k)
        self._check_open()
        vectors = self._dense(queries) if self._encoder is not None else self._sparse(queries)
        asked = list(vectors.values())

        def fetch(numbers: list[int], count: int) -> list[Hits]:
            return self._fetch([asked[number] for number in numbers], count)

        ranked = best_rows(fetch, len(asked), k, min(self._passages, max(MOST_FETCHED, k)))
        passages = self._read({row for rows in ranked for row, _ in rows})
        found: list[list[Passage]] = [[] for _ in queries]
        for number, rows in zip(vectors, ranked, strict=True):
            found[number] = [Passage(**passages[row], score=score) for row, score in rows]
        return found

    def _dense(self, queries: Sequence[str]) -> dict[int, Any]:
        """The vectors of the queries that can be searched, by the query's number."""
        assert self._encoder is not None
        # A query without letters or digits would still get a vector, and match meaningless passages.
        asked = [number for number, query in enumerate(queries) if any(map(str.isalnum, query))]
        encoded_QD = self._encoder.encode_queries([queries[number] for number in asked])
        return dict(zip(asked, encoded_QD.tolist(), strict=True))

    def _sparse(self, queries: Sequence[str]) -> dict[int, Any]:
        from qdrant_client import models

        terms = (term_counts(self._analyzer.query_terms(query)[:MAX_QUERY_TERMS]) for query in queries)
        return {
            number: models.SparseVector(indices=list(counts), values=list(map(float, counts.values())))
            for number, counts in enumerate(terms)
            if counts
        }

    def _fetch(self, vectors: list[Any], count: int) -> list[Hits]:
        from qdrant_client import models

        hits: list[Hits] = []
        for start in range(0, len(vectors), MAX_BATCH):
            requests = [
                models.QueryRequest(
                    query=vector,
                    using=self._vectors,
                    limit=count,
                    params=self._params,
                    with_payload=False,  # a second request fetches it for the few rows that are returned
                )
                for vector in vectors[start : start + MAX_BATCH]
            ]
            for answer in self._ask(self._client.query_batch_points, requests=requests):
                scores = np.array([point.score for point in answer.points], dtype=np.float32)
                hits.append((scores, np.array([point.id for point in answer.points], dtype=np.int64)))
        return hits

    def _read(self, rows: set[int]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        ids = sorted(rows)
        for start in range(0, len(ids), MAX_PASSAGES):
            points = self._ask(self._client.retrieve, ids=ids[start : start + MAX_PASSAGES])
            found |= {point.id: point.payload for point in points}
        if len(found) < len(rows):
            raise RetrievalError(
                f"{len(rows) - len(found)} passages were deleted from {self._collection!r} during a search"
            )
        return found

    def _ask(self, method: Callable[..., Any], **options: Any) -> Any:
        def ask() -> Any:
            return call(method, self._collection, **options)

        if self._lock is None:
            return repeat_trouble(ask)
        with self._lock:
            return ask()

    def close(self) -> None:
        super().close()
        self._client.close()


def call(method: Callable[..., Any], collection: str, **options: Any) -> Any:
    """Sends one request. Temporary trouble raises `Unavailable`; any other error, a `RetrievalError` with its message.

    Raises:
        RetrievalError: with the server's message; `Unavailable` if it cannot be reached.
    """
    from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

    try:
        return method(collection_name=collection, **options)
    except UnexpectedResponse as error:
        said = f"Qdrant answered {error.status_code}: {error.content.decode('utf-8', 'replace')[:300]}"
        raise failure(error.status_code or 0, said) from error
    except ApiException as error:
        if isinstance(source := getattr(error, "source", None), RetrievalError):  # of `_Transport`
            raise source from None
        raise Unavailable(f"Qdrant cannot be reached: {error}") from error
    # Raised by the client, which asserts that there is a result, and by its built-in engine.
    except (RuntimeError, ValueError, AssertionError, sqlite3.Error) as error:
        raise RetrievalError(f"Qdrant, collection {collection!r}: {error}") from error


class _Transport(httpx.HTTPTransport):
    """Reads answers up to the limits of `read_answer`, which the client does not have. Proxies of the environment are
    ignored: they cannot resolve the hosts of a cluster."""

    def __init__(self, timeout_s: float) -> None:
        limits = httpx.Limits(keepalive_expiry=KEEP_ALIVE_S)
        super().__init__(verify=tls_context(), trust_env=False, limits=limits)
        self._timeout_s = timeout_s

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        started = time.monotonic()
        answer = super().handle_request(request)
        try:
            content = read_answer(answer.iter_bytes(), "Qdrant", timeout_s=self._timeout_s, started=started)
        finally:
            answer.close()
        headers = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
        return httpx.Response(answer.status_code, headers=headers, content=content)


def connect(url: str | None, path: str | Path | None, timeout_s: int) -> Any:
    """Makes a client. The API key comes from the environment only.

    Raises:
        UserError: for a missing client or address, or an address that holds a key.
    """
    make = import_extra("qdrant_client", "Qdrant", "qdrant").QdrantClient
    if (url is None) == (path is None):
        raise UserError('qdrant needs url="http://host:6333", or path=DIR to try it out without a server')
    if url is not None and "@" in url:
        raise UserError(f"the url would be written into files: put the API key in {API_KEY}")
    if path is not None:
        try:
            return make(path=str(path), force_disable_check_same_thread=True)
        except (RuntimeError, OSError, sqlite3.Error, ValueError, TypeError, LookupError) as error:  # damaged files
            raise UserError(f"{path} cannot be opened: {type(error).__name__}: {error}") from error
    try:
        return make(
            url=url,
            api_key=from_environment(API_KEY),
            timeout=timeout_s,
            check_compatibility=False,
            transport=_Transport(timeout_s),
        )
    except ValueError as error:
        raise UserError(f"{url!r} is not the address of a Qdrant server, such as http://host:6333: {error}") from error


def read_about(client: Any, collection: str) -> dict[str, Any]:
    """Reads the record of what was loaded into the collection."""

    def read() -> dict[str, Any] | None:
        return (call(client.get_collection, collection).config.metadata or {}).get(ABOUT)

    remark = ", or by a Qdrant before 1.16, which keeps no metadata"
    return find_about(read, f"the collection {collection!r}", remark)


def load(
    *,
    url: str | None = None,
    collection: str | None = None,
    path: str | Path | None = None,
    index: str | Path | None = None,
    encoder: str | Path | Encoder | None = None,
    device: str | None = None,
    dtype: str = "float32",
    exact: bool = False,
    hnsw_ef: int | None = None,
    oversampling: float | None = None,
    timeout_s: int = 30,
    trust_remote_code: bool = False,
) -> QdrantRetriever:
    """`load_retriever("qdrant", ...)`: give `url` and `collection`, or the `index` folder that names them.

    The API key, if there is one, comes from the environment variable `QDRANT_API_KEY`.

    Args:
        url (`str`, *optional*): The address of any node of the cluster, or of its load balancer.
        collection (`str`, *optional*): The name of the collection.
        path (`str | Path`, *optional*): A folder, instead of `url`: runs the client without a server.
        index (`str | Path`, *optional*): A folder made by `trl-search index --kind qdrant`; only its `manifest.json`
            is read. It is an error if other passages have been loaded since.
        encoder (`str | Path | Encoder`, *optional*): By default the encoder that the collection records; any other is
            an error.
        device (`str`, *optional*): Of the encoder: "cpu", "cuda".
        dtype (`str`): Precision of encoding queries.
        exact (`bool`): Compares with every vector.
        hnsw_ef (`int`, *optional*): Candidates of the approximate search; more raise recall.
        oversampling (`float`, *optional*): With quantised vectors: this many times k candidates are rescored with full
            vectors.
        timeout_s (`int`): Seconds until one request counts as failed.
        trust_remote_code (`bool`): Runs Python code from the encoder's checkpoint.

    Raises:
        UserError: if no collection is named.
    """
    url, collection, path, expected = from_folder(index, KIND, url, collection, path)
    if collection is None:
        raise UserError("qdrant needs the name of a collection")
    check_at_least(1, hnsw_ef=hnsw_ef, oversampling=oversampling)
    if path is not None and not Path(path, "meta.json").exists():  # the client would make an empty folder
        raise UserError(f"{path} is not a folder of Qdrant's client: load it with `trl-search index --kind qdrant`")
    client = connect(url, path, timeout_s)
    try:
        about = read_about(client, collection)
        refuse_another_corpus(about, expected, f"the collection {collection!r}", index)
        if path is not None and (held := call(client.count, collection).count) != about["passages"]:
            raise UserError(
                f"{path} holds {held:,} of {about['passages']:,} passages of {collection!r}, because its files are "
                "damaged or incomplete: load it again with --replace"
            )
        used = None
        if about["vectors"] == DENSE:
            how = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
            used = load_recorded(about["encoder"], encoder, f"the collection {collection!r}", **how)
        params: dict[str, Any] = {"exact": exact, "hnsw_ef": hnsw_ef}
        if oversampling is not None:
            params["quantization"] = {"rescore": True, "oversampling": oversampling}
        return QdrantRetriever(client, collection, about, encoder=used, search_params=params, local=path is not None)
    except BaseException:
        client.close()
        raise
