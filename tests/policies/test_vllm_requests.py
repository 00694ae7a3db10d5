"""Requests to a vLLM server: many at once, and what a failure is."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from trl_search.policies import vllm_requests
from trl_search.policies.vllm_requests import Refused, Trouble, VLLMRequests

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"ids":1}'


class Counting:
    """An HTTP server that holds its answers until `hold` requests are in flight, and counts connections."""

    def __init__(self, answer: bytes = ANSWER, hold: int = 1) -> None:
        self.answer, self.hold, self.in_flight, self.connections, self.ended = answer, hold, 0, 0, asyncio.Event()
        self.full = asyncio.Event()

    async def __call__(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split()[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line
                )
                await reader.readexactly(length)
                self.in_flight += 1
                if self.in_flight == self.hold:
                    self.full.set()
                await self.full.wait()
                writer.write(self.answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.ended.set()
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def requests_to(server, timeout_s=60.0):
    async with await asyncio.start_server(server, "127.0.0.1", 0, backlog=1024) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        requests = VLLMRequests(url, connect_timeout_s=60.0, timeout_s=timeout_s)
        try:
            yield requests
        finally:
            await requests.close()


def test_requests_share_a_limited_number_of_connections_and_use_them_again(monkeypatch):
    monkeypatch.setattr(vllm_requests, "MAX_CONNECTIONS", 20)

    async def go():
        server = Counting(hold=20)
        async with requests_to(server) as requests:
            return server, await asyncio.gather(*(requests.post("/v1/completions", {}, {}) for _ in range(100)))

    server, answers = asyncio.run(go())
    assert answers == [{"ids": 1}] * 100 and server.in_flight == 100 and server.connections == 20


def test_a_cancelled_request_closes_its_connection():
    async def go():
        server = Counting(hold=2)
        async with requests_to(server) as requests:
            endless = asyncio.create_task(requests.post("/v1/completions", {}, {}))
            while not server.in_flight:
                await asyncio.sleep(0.01)
            endless.cancel()
            server.full.set()  # the answer goes nowhere
            await asyncio.wait_for(server.ended.wait(), 60)

    asyncio.run(go())


def said(status, body):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (
            said(b"500 Internal Server Error", b'{"error": {"message": "out of memory"}}'),
            Trouble,
            "500: out of memory",
        ),
        (said(b"503 Service Unavailable", b""), Trouble, "503: Service Unavailable"),
        (said(b"429 Too Many Requests", b"slow \xff"), Trouble, "429: slow \ufffd"),
        (said(b"400 Bad Request", b'{"error": {"message": "too long"}}'), Refused, "400: too long"),
        (said(b"302 Found\r\nLocation: http://127.0.0.1:1/", b""), Refused, "302: Found"),
        (said(b"200 OK", b"<html>"), Trouble, "no JSON: <html>"),
        (said(b"200 OK", b"[" * 100_000), Trouble, "no JSON"),
        (said(b"200 OK\r\nContent-Encoding: gzip", b"no gzip"), Trouble, "400|gzip|[Dd]ecod"),
        (b"no HTTP\r\n\r\n", Trouble, "."),
    ],
)
def test_a_failure_of_the_server_is_told_from_one_of_the_request(answer, error, words):
    async def go():
        async with requests_to(Counting(answer)) as requests:
            await requests.post("/v1/completions", {"prompt": [1]}, {})

    with pytest.raises(error, match=words):
        asyncio.run(go())


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_a_silent_server_is_in_trouble(begun):
    async def go():
        async with requests_to(Counting(begun), timeout_s=0.1) as requests:
            await requests.post("/v1/completions", {"prompt": [1]}, {})

    with pytest.raises(Trouble, match="no answer in time"):
        asyncio.run(go())
