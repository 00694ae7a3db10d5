"""Loading an OpenSearch index: `trl-search index --kind opensearch`, in batches that a killed run need not send again.

While it is loaded it is not refreshed, which is several times as fast; what the index holds is written into its
mapping last, and before that it is refused as one that is being loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError, Unavailable
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.engines.base import TROUBLE, Journal, corpus_hash, repeat_trouble
from trl_search.retrieval.engines.opensearch import ABOUT, CONTENTS, call, connect

BULK_ROWS = 1000  # passages a request, about a megabyte


@dataclass(frozen=True)
class OpenSearchBuilder:
    """How passages become an index, and `build_index(kind="opensearch")`.

    Args:
        url (`str`, *optional*): Of a node of the cluster, or of the balancer before it: http://host:9200.
        collection (`str`): The name of the index to make.
        analyzer (`str`): Of OpenSearch, by name: "english", "german", "standard", ...
        shards (`int`, *optional*): Pieces of the index; by default 1. A shard serves up to about 50 GB.
        replicas (`int`): Copies of each shard.
        replace (`bool`): Deletes an index of that name first.
        ca_certs (`str`, *optional*): Certificates to trust, where an OpenSearch cluster has its own.
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
        if self.replicas < 1 or (self.shards is not None and self.shards < 1):
            raise UserError(f"shards and replicas must be at least 1; got {self.shards} and {self.replicas}")
        self._connect().close()

    def build(self, corpus: Corpus, folder: Path) -> dict[str, Any]:
        client = self._connect()
        try:
            journal = Journal(folder)
            if not journal.made:
                self._make(client)
                journal.note(0)
            self._load(client, corpus, journal)
            self._call(client.indices.put_settings, body={"index": {"refresh_interval": "1s"}})
            self._call(client.indices.refresh)
            stored = self._call(client.count)["count"]
            if stored != len(corpus):
                raise UserError(
                    f"the index {self.collection!r} has {stored:,} passages, not {len(corpus):,}: somebody else "
                    "writes to it, or deleted it; load it again with --replace"
                )
            about = {"corpus": corpus_hash(folder), "passages": len(corpus), "analyzer": self.analyzer}
            self._call(client.indices.put_mapping, body={"_meta": {ABOUT: about}})
            return about
        finally:
            client.close()

    def _make(self, client: Any) -> None:
        if self._call(client.indices.exists):
            if not self.replace:
                raise UserError(
                    f"OpenSearch has an index {self.collection!r} already; choose another name, or --replace it"
                )
            self._call(client.indices.delete)
        searched = {"type": "text", "analyzer": self.analyzer}
        stored = {"type": "text", "index": False, "copy_to": CONTENTS}
        body = {
            "settings": {
                "index": {
                    "number_of_shards": self.shards or 1,
                    "number_of_replicas": self.replicas - 1,
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
        self._call(client.indices.create, body=body)

    def _load(self, client: Any, corpus: Corpus, journal: Journal) -> None:
        """Batches in order, each acknowledged before the next. One that is sent twice is the same twice."""
        with tqdm(total=len(corpus), initial=journal.rows, desc="loading", unit=" passages", disable=None) as bar:
            for start in range(journal.rows, len(corpus), BULK_ROWS):
                rows = range(start, min(start + BULK_ROWS, len(corpus)))
                repeat_trouble(partial(self._send, client, list(_lines(corpus, rows))))
                journal.note(rows.stop)
                bar.update(len(rows))

    def _send(self, client: Any, lines: list[dict[str, Any]]) -> None:
        _check(call(client.bulk, body=lines, index=self.collection))

    def _call(self, method: Any, **options: Any) -> Any:
        return repeat_trouble(lambda: call(method, index=self.collection, **options))

    def _connect(self) -> Any:
        return connect(self.url, self.ca_certs, self.timeout_s)


def _lines(corpus: Corpus, rows: range) -> Iterator[dict[str, Any]]:
    for row in rows:
        passage = corpus[row]
        yield {"index": {"_id": str(row)}}
        document = {"row": row, "id": passage.id, "title": passage.title, "text": passage.text}
        yield document if passage.url is None else {**document, "url": passage.url}


def _check(answer: dict[str, Any]) -> None:
    """A bulk request is answered 200 also where some of its passages were refused."""
    if not answer["errors"]:
        return
    for item in answer["items"]:
        (outcome,) = item.values()
        if outcome["status"] >= 300:
            said = f"OpenSearch refused passage {outcome['_id']}: {outcome['error']['reason']}"
            raise (Unavailable if outcome["status"] in TROUBLE else RetrievalError)(said)
