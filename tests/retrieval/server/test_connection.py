"""Request headers and slow or oversized requests from unknown clients: real sockets and a real server."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence

import httpx
import pytest
import uvicorn

from trl_search.retrieval import Retriever
from trl_search.retrieval.server import ServerConfig, make_app
from trl_search.retrieval.server.connection import MAX_HEAD_BYTES, LimitedConnection
from trl_search.retrieval.server.run import listen
from trl_search.types import Passage

pytestmark = pytest.mark.slow

IDLE_S = 0.5  # uvicorn's timeout for an idle connection
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = GET + b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n"


class Slow(Retriever):
    """Takes longer than the timeout for idle connections."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        time.sleep(2 * IDLE_S)
        return [[Passage(query, "", "")] for query in queries]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = make_app(Slow(), ServerConfig(token="s3cret"))
    settings = uvicorn.Config(app, http=LimitedConnection, log_level="warning", timeout_keep_alive=IDLE_S)  # type: ignore[arg-type]
    server, listening = uvicorn.Server(settings), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=100)


def until_closed(client: socket.socket) -> bytes:
    """The remaining output of the server; raises `TimeoutError` if it does not disconnect."""
    said = b""
    with contextlib.suppress(ConnectionError):  # it disconnected while we were sending
        while received := client.recv(1 << 16):
            said += received
    return said


def send_until_refused(client: socket.socket, piece: bytes, pieces: int) -> int:
    """The number of pieces that could be sent."""
    for sent in range(pieces):
        try:
            client.sendall(piece)
        except ConnectionError:
            return sent
    return pieces


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (GET, b"X-Many: " + b"x" * 8000 + b"\r\n"),
        (GET + b"X-Long: ", b"x" * 8000),
        (b"GET /", b"x" * 8000),
        (b"", b"\r\n" * 4000),
        (GET + b"\r\n" + GET + b"X-Long: ", b"x" * 8000),  # the second request of two
        (CHUNKED, b"X-Trailer: " + b"x" * 8000 + b"\r\n"),
    ],
    ids=["many headers", "a long one", "a path", "nothing but lines", "the second request", "trailers"],
)
def test_endless_headers_are_cut_off(port: int, head: bytes, piece: bytes) -> None:
    with connect(port) as client:
        client.sendall(head)
        sent = send_until_refused(client, piece, 10_000)
        until_closed(client)
    assert sent * len(piece) < 20 << 20  # of 80 MB; the buffers of the two sockets hold some of it


def test_headers_that_are_too_large_get_an_error(port: int) -> None:
    with connect(port) as client:
        client.sendall(GET + b"X-Long: " + b"x" * MAX_HEAD_BYTES)
        said = until_closed(client)
    assert said.startswith(b"HTTP/1.1 400 ") and said.endswith(b"The head of the request is larger than 65,536 bytes.")


@pytest.mark.parametrize("first", [b"", GET + b"\r\n"], ids=["at once", "after a request"])
@pytest.mark.parametrize(
    "sent", [b"", b"GET /hea", GET + b"X: x", b"\r\n"], ids=["nothing", "half a line", "half a head", "no line"]
)
def test_incomplete_headers_are_cut_off_after_a_timeout(port: int, first: bytes, sent: bytes) -> None:
    with connect(port) as client:
        client.sendall(first)
        client.settimeout(0.1)
        if first:
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        client.sendall(sent)
        said: bytes | None = None
        while said is None and time.monotonic() - started < 100 * IDLE_S:
            try:
                said = client.recv(1000)
            except TimeoutError:
                client.sendall(sent[-1:])  # single bytes do not extend the timeout
            except ConnectionError:
                said = b""
    assert said == b"" and time.monotonic() - started > 0.8 * IDLE_S


def test_a_slow_request_and_the_next_one_get_responses(port: int) -> None:
    headers = {"Authorization": "Bearer s3cret", "X-Padding": "x" * (MAX_HEAD_BYTES - 1000)}

    def in_pieces() -> Iterator[bytes]:  # 100 KB of framing around a body of 20 KB
        yield b'{"query": "a"'
        yield from [b" "] * 20_000
        yield b"}"

    with httpx.Client(headers=headers, timeout=200) as client:
        for _ in range(2):
            answer = client.post(f"http://127.0.0.1:{port}/retrieve", content=in_pieces())
            assert answer.json() == {"result": [[{"id": "a", "contents": '""\n', "url": ""}]]}


SERVE = """
    from trl_search.retrieval.server import ServerConfig
    from trl_search.retrieval.server.run import listen, serve
    from tests.retrieval.server.test_connection import Slow

    listening = listen("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    serve(Slow, ServerConfig(), listening, lambda url: None)
"""


def test_trl_search_serve_has_these_limits() -> None:
    command = [sys.executable, "-c", textwrap.dedent(SERVE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            with connect(int(server.stdout.readline())) as client:
                client.sendall(GET + b"X-Long: " + b"x" * MAX_HEAD_BYTES)
                assert until_closed(client).startswith(b"HTTP/1.1 400 ")
        finally:
            server.kill()
