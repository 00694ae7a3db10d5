"""Searches an existing OpenSearch cluster by BM25, with many queries per request (`_msearch`).

    trl-search index --kind opensearch --corpus corpus.jsonl --url http://search:9200 --collection wiki --output out
    load_retriever("opensearch", url="http://search:9200", collection="wiki")

An analyzer of OpenSearch splits and stems both passages and queries; title and text are searched as one field, as in
`bm25`. Term frequencies are summed over all shards (`dfs_query_then_fetch`), so that copies of a passage score the
same; equal scores are in corpus order. The mapping of the index records the corpus.

If a shard fails or times out, the search fails; OpenSearch itself would return the results of the other shards.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trl_search.common.credentials import from_environment
from trl_search.common.errors import UserError
from trl_search.common.extras import import_extra
from trl_search.common.unspaced import UNSPACED_LETTERS
from trl_search.retrieval.base import RetrievalError, Retriever, Unavailable, check_search, failure
from trl_search.retrieval.bm25.retriever import MAX_QUERY_TERMS
from trl_search.retrieval.engines.base import (
    ABOUT,
    MAX_PASSAGES,
    find_about,
    from_folder,
    refuse_another_corpus,
    repeat_trouble,
)
from trl_search.types import Passage

KIND = "opensearch"
CONTENTS = "contents"  # the field that title and text are copied to
USER, PASSWORD = "OPENSEARCH_USER", "OPENSEARCH_PASSWORD"
MAX_RESULTS = 10_000  # OpenSearch's own limit, `index.max_result_window`
MAX_BATCH = 128  # queries per request
# Each word of a query is at most one clause of the search; in a script without spaces, each letter is one.
_WORD = re.compile(rf"[{UNSPACED_LETTERS}]|[^\W{UNSPACED_LETTERS}]{{1,255}}")


class OpenSearchRetriever(Retriever):
    """Searches an index. Make one with `load_retriever("opensearch", ...)`.

    Args:
        client (`OpenSearch`): The client, which this retriever closes.
        collection (`str`): The index' name.
    """

    max_concurrent_batches = 4

    def __init__(self, client: Any, collection: str) -> None:
        self._client, self._collection = client, collection

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        check_search(queries, k)
        self._check_open()
        texts = [_cut(query) for query in queries]
        asked = [number for number, text in enumerate(texts) if any(map(str.isalnum, text))]
        found: list[list[Passage]] = [[] for _ in queries]
        size = max(1, min(MAX_BATCH, MAX_PASSAGES // k))
        for start in range(0, len(asked), size):
            batch = asked[start : start + size]
            ask = partial(self._ask, [texts[number] for number in batch], k)
            for number, passages in zip(batch, repeat_trouble(ask), strict=True):
                found[number] = passages
        return found

    def _ask(self, texts: list[str], k: int) -> list[list[Passage]]:
        body: list[dict[str, Any]] = []
        for text in texts:
            body.append({"search_type": "dfs_query_then_fetch"})
            body.append(
                {
                    "query": {"match": {CONTENTS: {"query": text}}},
                    "size": min(k, MAX_RESULTS),
                    "sort": [{"_score": "desc"}, {"row": "asc"}],
                    "_source": ["id", "title", "text", "url"],
                    "track_scores": True,
                    "track_total_hits": False,
                }
            )
        answer = call(self._client.msearch, body=body, index=self._collection)
        try:
            answers = answer["responses"]
            if len(answers) != len(texts):
                raise RetrievalError(f"OpenSearch answered {len(answers)} results to {len(texts)} queries")
            return [[Passage(**hit["_source"], score=hit["_score"]) for hit in _hits(one)] for one in answers]
        except (LookupError, TypeError, AttributeError, ValueError) as error:  # of a proxy, or another program's index
            said = f"{type(error).__name__}: {error}"
            raise RetrievalError(
                f"OpenSearch answered in an unexpected shape ({said}): {str(answer)[:200]}"
            ) from error

    def close(self) -> None:
        super().close()
        self._client.close()


def _cut(query: str) -> str:
    """The query unchanged for the index' analyzer ("U.S.A.", "node.js"), but cut to OpenSearch's limit of 1,024
    clauses."""
    query = query.encode("utf-8", "replace").decode()
    beyond = next(itertools.islice(_WORD.finditer(query), MAX_QUERY_TERMS, None), None)
    return query if beyond is None else query[: beyond.start()]


def _hits(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The hits of one query.

    Raises:
        RetrievalError: with the reason, if OpenSearch refused the query.
    """
    if "error" in answer:
        error = answer["error"]
        causes = error.get("root_cause") or [error]
        said = f"OpenSearch refused a query: {causes[0].get('type')}: {causes[0].get('reason')}"
        raise failure(answer.get("status", 0), said)
    shards = answer["_shards"]
    if answer["timed_out"] or shards["failed"]:
        raise Unavailable(f"OpenSearch searched {shards['successful']} of {shards['total']} shards in time")
    hits: list[dict[str, Any]] = answer["hits"]["hits"]
    return hits


def call(method: Callable[..., Any], **options: Any) -> Any:
    """Sends one request. Temporary trouble raises `Unavailable`; any other error, a `RetrievalError` with its message.

    Raises:
        RetrievalError: with the cluster's message; `Unavailable` if it cannot be reached.
    """
    from opensearchpy.exceptions import ConnectionError as NoConnection
    from opensearchpy.exceptions import OpenSearchException, TransportError

    try:
        return method(**options)
    except NoConnection as error:
        if isinstance(error.info, RetrievalError):  # of `Connection`
            raise error.info from None
        raise Unavailable(f"OpenSearch cannot be reached: {error.error}") from error
    except TransportError as error:
        said = f"OpenSearch answered {error.status_code}: {error.error}"
        raise failure(error.status_code, said) from error
    except OpenSearchException as error:
        raise RetrievalError(f"OpenSearch: {error}") from error


def connect(url: str | None, ca_certs: str | Path | None, timeout_s: float) -> Any:
    """Makes a client. User and password come from the environment only.

    Raises:
        UserError: for a missing client or address, or an address that holds a password.
    """
    client = import_extra("opensearchpy", "OpenSearch", "opensearch")
    from trl_search.retrieval.engines.opensearch_connection import Connection

    if url is None or not url.startswith(("http://", "https://")):
        raise UserError(f"opensearch needs the address of a node or balancer, url='http://host:9200'; got {url!r}")
    if "@" in url:
        raise UserError(f"the url would be written into files: put user and password in {USER} and {PASSWORD}")
    user, password = from_environment(USER), from_environment(PASSWORD)
    return client.OpenSearch(
        hosts=[url],
        connection_class=Connection,
        http_auth=(user, password) if user and password else None,
        ca_certs=None if ca_certs is None else str(ca_certs),
        timeout=timeout_s,
        max_retries=0,  # `repeat_trouble` retries
        pool_maxsize=8,
    )


def read_about(client: Any, collection: str) -> dict[str, Any]:
    """Reads the record of what was loaded into the index."""

    def read() -> dict[str, Any] | None:
        mapping = call(client.indices.get_mapping, index=collection)
        about: dict[str, Any] | None = next(iter(mapping.values()))["mappings"].get("_meta", {}).get(ABOUT)
        return about

    return find_about(read, f"the index {collection!r}")


def load(
    *,
    url: str | None = None,
    collection: str | None = None,
    index: str | Path | None = None,
    ca_certs: str | Path | None = None,
    timeout_s: float = 30.0,
) -> OpenSearchRetriever:
    """`load_retriever("opensearch", ...)`: give `url` and `collection`, or the `index` folder that names them.

    User and password come from the environment: `OPENSEARCH_USER` and `OPENSEARCH_PASSWORD`.

    Args:
        url (`str`, *optional*): The address of any node of the cluster, or of its load balancer.
        collection (`str`, *optional*): The name of the index in OpenSearch.
        index (`str | Path`, *optional*): A folder made by `trl-search index --kind opensearch`; only its
            `manifest.json` is read. It is an error if other passages have been loaded since.
        ca_certs (`str | Path`, *optional*): Certificates to trust, if the cluster has its own.
        timeout_s (`float`): Seconds until one request counts as failed.

    Raises:
        UserError: if no index is named.
    """
    url, collection, _, expected = from_folder(index, KIND, url, collection)
    if collection is None:
        raise UserError("opensearch needs the name of an index: collection='wiki'")
    client = connect(url, ca_certs, timeout_s)
    try:
        refuse_another_corpus(read_about(client, collection), expected, f"the index {collection!r}", index)
    except BaseException:
        client.close()
        raise
    return OpenSearchRetriever(client, collection)
