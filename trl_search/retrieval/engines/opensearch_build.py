"""Loads an OpenSearch index: `trl-search index --kind opensearch`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_search.common.bounds import check_minima
from trl_search.retrieval.base import RetrievalError, failure
from trl_search.retrieval.corpus.fields import passage_row
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.engines.base import ABOUT, repeat_trouble
from trl_search.retrieval.engines.build import load_engine
from trl_search.retrieval.engines.opensearch import CONTENTS, call, connect

BULK_ROWS = 1000  # passages per request, about a megabyte


@dataclass(frozen=True)
class OpenSearchBuilder:
    """Loads an OpenSearch index: the options of `build_index(kind="opensearch")`.

    Args:
        url (`str`, *optional*): The address of a node of the cluster, or of its load balancer: http://host:9200.
        collection (`str`): The name of the index to make.
        analyzer (`str`): The name of an analyzer of OpenSearch, such as "english", "german" or "standard".
        shards (`int`, *optional*): Pieces of the index; by default 1. A shard serves up to about 50 GB.
        replicas (`int`): Copies of each shard.
        replace (`bool`): Deletes an index of that name first.
        ca_certs (`str`, *optional*): Certificates to trust, if an OpenSearch cluster has its own.
        timeout_s (`int`): Seconds until one request counts as failed.
    """

    url: str | None = None
    collection: str = "passages"
    analyzer: str = "english"
    shards: int | None = None
    replicas: int = 1
    replace: bool = False
    ca_certs: str | None = None
    timeout_s: int = 120

    def __post_init__(self) -> None:
        check_minima(self, shards=1, replicas=1)
        self._connect().close()

    def build(self, corpus: Corpus, folder: Path) -> dict[str, Any]:
        with contextlib.closing(self._connect()) as client:
            engine = _Index(client, self, corpus)
            about = {"analyzer": self.analyzer}
            return load_engine(engine, corpus, folder, about, replace=self.replace, max_rows=BULK_ROWS)

    def _connect(self) -> Any:
        return connect(self.url, self.ca_certs, self.timeout_s)


class _Index:
    """The index while it is loaded. Refreshing is off, which makes loading several times as fast."""

    def __init__(self, client: Any, options: OpenSearchBuilder, corpus: Corpus) -> None:
        self.name = f"OpenSearch's index {options.collection!r}"
        self._client, self._options, self._corpus = client, options, corpus

    def exists(self) -> bool:
        return bool(self._call(self._client.indices.exists))

    def delete(self) -> None:
        self._call(self._client.indices.delete)

    def make(self) -> None:
        searched = {"type": "text", "analyzer": self._options.analyzer}
        stored = {"type": "text", "index": False, "copy_to": CONTENTS}
        body = {
            "settings": {
                "index": {
                    "number_of_shards": self._options.shards or 1,
                    "number_of_replicas": self._options.replicas - 1,
                    "refresh_interval": "-1",
                }
            },
            "mappings": {
                "dynamic": "strict",
                "properties": {
                    "row": {"type": "long"},
                    "id": {"type": "keyword"},
                    "title": stored,
                    "text": stored,
                    "url": {"type": "keyword", "index": False, "doc_values": False},
                    CONTENTS: searched,
                },
            },
        }
        self._call(self._client.indices.create, body=body)

    def item(self, row: int) -> tuple[str, int]:
        document = {"row": row, **passage_row(self._corpus[row])}
        lines = f"{json.dumps({'index': {'_id': str(row)}})}\n{json.dumps(document, ensure_ascii=False)}"
        return lines, len(lines.encode())

    def send(self, items: Sequence[str]) -> None:
        body = "\n".join(items) + "\n"
        repeat_trouble(lambda: _check(call(self._client.bulk, body=body, index=self._options.collection)))

    def count(self) -> int:
        self._call(self._client.indices.put_settings, body={"index": {"refresh_interval": "1s"}})
        self._call(self._client.indices.refresh)
        return int(self._call(self._client.count)["count"])

    def describe(self, about: dict[str, Any]) -> None:
        self._call(self._client.indices.put_mapping, body={"_meta": {ABOUT: about}})

    def _call(self, method: Any, **options: Any) -> Any:
        return repeat_trouble(lambda: call(method, index=self._options.collection, **options))


def _check(answer: dict[str, Any]) -> None:
    """Checks the answer to a bulk request, whose status is 200 even if some passages were rejected."""
    if not answer["errors"]:
        return
    for item in answer["items"]:
        (outcome,) = item.values()
        if outcome["status"] >= 300:
            said = f"OpenSearch refused passage {outcome['_id']}: {outcome['error']['reason']}"
            # Here 413 concerns one passage, so a smaller request would not help.
            raise RetrievalError(said) if outcome["status"] == 413 else failure(outcome["status"], said)
