"""Reranking servers on loopback with both APIs, which score a document by the words it shares with the query."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.servers import WaitingHTTPServer

Answer = tuple[int, Any]  # a status and a body


def shared_words(query: str, text: str) -> float:
    words = set(text.lower().replace(".", " ").split())
    return float(sum(word in words for word in query.lower().replace("?", "").split()))


def jina(body: dict[str, Any]) -> Answer:
    documents = body["documents"]
    scores = [(shared_words(body["query"], text), index) for index, text in enumerate(documents)]
    best = sorted(scores, reverse=True)[: body["top_n"]]
    return 200, {"results": [{"index": index, "relevance_score": score} for score, index in best], "usage": {}}


def tei(body: dict[str, Any]) -> Answer:
    if len(body["texts"]) > 32:
        return 413, {"error": f"batch size {len(body['texts'])} > maximum allowed batch size 32", "error_type": "Val"}
    scores = [(shared_words(body["query"], text), index) for index, text in enumerate(body["texts"])]
    return 200, [{"index": index, "score": score} for score, index in sorted(scores, reverse=True)]


Asked = list[tuple[dict[str, str], dict[str, Any]]]  # the headers and the body of each request


def start(answer: Callable[[dict[str, Any]], Answer]) -> tuple[WaitingHTTPServer, str, Asked]:
    """Starts a server on a daemon thread that uses `answer`; returns it, its address and the list of its requests."""
    asked: Asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((dict(self.headers), body))
            status, said = answer(body)
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = WaitingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/rerank", asked


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[tuple[str, Asked]]:
    """A server of [`start`] for the duration of a block."""
    server, url, asked = start(answer)
    try:
        yield url, asked
    finally:
        server.shutdown()
        server.server_close()
