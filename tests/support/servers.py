"""Real HTTP servers on loopback, each on a thread, that answer by a function and record their requests."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trl_search.retrieval import Retriever
from trl_search.retrieval.remote.wire import Limits, WireError, format_response, parse_request


@dataclass(frozen=True)
class Asked:
    """A request to the server."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Said:
    """A response: JSON, bytes, or written directly to the open socket."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    by_hand: Callable[[Any], None] | None = None


def endless(wfile: Any) -> None:
    """A response by hand that sends zeros until the client has gone."""
    wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


class WaitingHTTPServer(ThreadingHTTPServer):
    """Sleeps until the next request. `ThreadingHTTPServer` checks many times per second whether it should stop: with a
    hundred servers during the tests, this took half a core."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, *args: Any, **options: Any) -> None:
        self._ends, self._ended = False, threading.Event()
        super().__init__(*args, **options)

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        while not self._ends:
            self.handle_request()
        self._ended.set()

    def shutdown(self) -> None:
        self._ends = True
        with contextlib.suppress(OSError):  # the socket is closed
            socket.create_connection(self.server_address[:2]).close()  # wakes the server
        self._ended.wait()


class Server:
    """Calls `answer(asked)` on a thread for each request. Listens immediately; `kill` drops every connection."""

    def __init__(self, answer: Callable[[Asked], Said], host: str = "127.0.0.1", port: int = 0) -> None:
        self.asked: list[Asked] = []
        self._connections: set[socket.socket] = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                server._connections.add(self.connection)

            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # the client has gone, or `kill` came
                    super().handle()

            def finish(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    super().finish()
                server._connections.discard(self.connection)

            def respond(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                server.asked.append(asked)
                said = answer(asked)
                if said.by_hand is not None:
                    self.close_connection = True
                    said.by_hand(self.wfile)
                    return
                written = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
                self.send_response(said.status)
                headers = {"Content-Type": "application/json", "Content-Length": str(len(written)), **said.headers}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(written)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = respond

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Listener(WaitingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._listener = Listener((host, port), Handler)
        self.port = self._listener.server_port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def kill(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving(answer: Callable[[Asked], Said], **options: Any) -> Iterator[Server]:
    server = Server(answer, **options)
    try:
        yield server
    finally:
        server.kill()


def retrieve_from(retriever: Retriever, limits: Limits = Limits()) -> Callable[[Asked], Said]:  # noqa: B008 (frozen)
    """`POST /retrieve` for a retriever, to test clients."""

    def answer(asked: Asked) -> Said:
        if asked.target != "/retrieve":
            return Said({"detail": "Not Found"}, 404)
        try:
            request = parse_request(asked.body, limits)
        except WireError as error:
            return Said({"error": str(error)}, error.status)
        return Said(format_response(retriever.search(request.queries, request.k), request.return_scores))

    return answer
