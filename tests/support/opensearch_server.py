"""A fake OpenSearch on loopback: the endpoints that we use, with the response schema of its REST API.

It is not OpenSearch: it searches documents with our own BM25 (numpy), whose terms differ a little from OpenSearch's
analyzers. Like OpenSearch, it refuses an unknown index, a field that a strict mapping does not have, a window above
10,000, and more than 1024 words.
"""

from __future__ import annotations

import json
from typing import Any

from tests.support.servers import Asked, Said, Server
from trl_search.retrieval import load_retriever
from trl_search.types import Passage


class OpenSearchServer(Server):
    """`indices[name]` is what a client created; `fail(asked)` may answer instead."""

    def __init__(self) -> None:
        self.indices: dict[str, dict[str, Any]] = {}
        self.fail: Any = lambda asked: None
        super().__init__(self._answer)

    def _answer(self, asked: Asked) -> Said:
        failed = self.fail(asked)
        if failed is not None:
            return failed
        path, _, _ = asked.target.partition("?")
        name, _, action = path.strip("/").partition("/")
        if action == "" and asked.method == "PUT":
            if name in self.indices:
                return error(400, "resource_already_exists_exception", f"index [{name}] already exists")
            self.indices[name] = {**asked.json, "documents": {}}
            return Said({"acknowledged": True, "shards_acknowledged": True, "index": name})
        if name not in self.indices:
            return error(404, "index_not_found_exception", f"no such index [{name}]")
        index = self.indices[name]
        if action == "":
            if asked.method == "DELETE":
                del self.indices[name]
            return Said({"acknowledged": True})
        if action == "_settings":
            index["settings"]["index"].update(asked.json["index"])
            return Said({"acknowledged": True})
        if action == "_mapping" and asked.method == "GET":
            return Said({name: {"mappings": index["mappings"]}})
        if action == "_mapping":
            index["mappings"].update(asked.json)
            return Said({"acknowledged": True})
        if action == "_refresh":
            index.pop("searcher", None)
            return Said({"_shards": {"total": 1, "successful": 1, "failed": 0}})
        if action == "_count":
            return Said({"count": len(index["documents"]), "_shards": SHARDS})
        lines = [json.loads(line) for line in asked.body.decode().splitlines()]
        if action == "_bulk":
            items = [bulk_item(name, index, *pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
            failed = any(item["index"]["status"] >= 300 for item in items)
            return Said({"took": 3, "errors": failed, "items": items})
        if action == "_msearch":
            responses = [search(name, index, *pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
            return Said({"took": 2, "responses": responses})
        return error(400, "illegal_argument_exception", f"no handler for {asked.method} {asked.target}")


SHARDS = {"total": 1, "successful": 1, "skipped": 0, "failed": 0}


def error(status: int, kind: str, reason: str) -> Said:
    return Said(error_body(status, kind, reason), status)


def error_body(status: int, kind: str, reason: str) -> dict[str, Any]:
    cause = {"type": kind, "reason": reason}
    return {"error": {"root_cause": [cause], **cause}, "status": status}


def bulk_item(name: str, index: dict[str, Any], action: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    identity = action["index"]["_id"]
    for field in document:
        if field not in index["mappings"]["properties"]:
            reason = f"mapping set to strict, dynamic introduction of [{field}] within [_doc] is not allowed"
            failed = {"type": "strict_dynamic_mapping_exception", "reason": reason}
            return {"index": {"_index": name, "_id": identity, "status": 400, "error": failed}}
    there = identity in index["documents"]
    index["documents"][identity] = document
    done = {"_index": name, "_id": identity, "_version": 1, "result": "updated" if there else "created"}
    return {"index": {**done, "_shards": SHARDS, "status": 200 if there else 201}}


def search(name: str, index: dict[str, Any], header: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    assert header == {"search_type": "dfs_query_then_fetch"}
    assert body["sort"] == [{"_score": "desc"}, {"row": "asc"}] and body["track_scores"]
    query, size = body["query"]["match"]["contents"]["query"], body["size"]
    if size > 10_000:
        return error_body(400, "illegal_argument_exception", f"Result window is too large, was [{size}]")
    if len(query.split()) > 1024:
        return error_body(400, "too_many_clauses", "maxClauseCount is set to 1024")
    documents = index["documents"]
    if "searcher" not in index:
        ordered = sorted(documents.values(), key=lambda document: document["row"])
        passages = [Passage(str(document["row"]), document["title"], document["text"]) for document in ordered]
        index["searcher"] = load_retriever("bm25", passages=passages, backend="numpy")
    (found,) = index["searcher"].search([query], size)
    hits = [
        {
            "_index": name,
            "_id": passage.id,
            "_score": passage.score,
            "_source": {key: documents[passage.id][key] for key in body["_source"] if key in documents[passage.id]},
            "sort": [passage.score, int(passage.id)],
        }
        for passage in found
    ]
    return {"took": 1, "timed_out": False, "_shards": SHARDS, "hits": {"max_score": None, "hits": hits}, "status": 200}
