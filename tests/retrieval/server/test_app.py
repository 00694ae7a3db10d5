"""The server over real HTTP on loopback: what it answers, what it refuses, and that no client crashes it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import requests
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, Retriever, load_retriever
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.batching import SearchBatcher
from trl_search.retrieval.remote.wire import Limits, WireError, parse_response
from trl_search.retrieval.server import ServerConfig, make_app
from trl_search.retrieval.server.body import read_body
from trl_search.retrieval.server.cache import ResultCache
from trl_search.retrieval.server.run import is_loopback, listen
from trl_search.types import Passage

pytestmark = pytest.mark.slow

CLIENT = httpx.Client(timeout=200)  # a new client per request would create a TLS context each time
SMALL = Limits(max_queries=8, max_query_chars=1000, max_topk=10, max_body_bytes=10_000)


class Echo(Retriever):
    """Returns the query `k` times; "poison" fails, "garbage" returns no passages; waits while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.batches.append(list(queries))
        assert self.gate.wait(200)
        if "poison" in queries:
            raise RetrievalError("the index is on fire")
        if "crash" in queries:
            raise KeyError("crash")
        if "garbage" in queries:
            return [["no passage"] for _ in queries]  # type: ignore[list-item]
        return [
            [Passage(f"{query}{rank}", "T", f"about {query}", 1.0 - rank) for rank in range(k)] for query in queries
        ]


@contextlib.contextmanager
def serving(retriever: Retriever | None, **options: Any) -> Iterator[tuple[str, Any]]:
    """A real server on a thread; yields its URL and its app."""
    app = make_app(retriever, ServerConfig(**options))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join(200)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], Any], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.01)


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.gate.set()


@pytest.fixture
def url(echo: Echo) -> Iterator[str]:
    with serving(echo, limits=SMALL) as (url, _):
        yield url


def retrieve(url: str, **request: Any) -> httpx.Response:
    return CLIENT.post(f"{url}/retrieve", json=request)


def ids(response: httpx.Response) -> list[list[str]]:
    assert response.status_code == 200, response.text
    return [[passage.id for passage in passages] for passages in parse_response(response.json())]


def metrics(url: str) -> dict[str, float]:
    """Every metric, summed over its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(CLIENT.get(f"{url}/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_the_exact_format_of_requests_and_responses(url: str) -> None:
    response = retrieve(url, queries=["a", "b"], topk=2, return_scores=True)
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "result": [
            [
                {"document": {"id": f"{q}{r}", "contents": f'"T"\nabout {q}', "url": ""}, "score": 1.0 - r}
                for r in range(2)
            ]
            for q in "ab"
        ]
    }
    bare = [{"id": f"a{rank}", "contents": '"T"\nabout a', "url": ""} for rank in range(3)]
    assert retrieve(url, query="a").json() == {"result": [bare]}
    assert retrieve(url, queries=["a", "a"], topk=1, return_scores=False).json() == {"result": [bare[:1]] * 2}


def test_search_r1s_client_works(url: str) -> None:
    """It sends one POST per turn with `requests`, with all queries of the batch, also if there are none; the documents
    are formatted as it shows them to its model."""

    def batch_search(queries: list[str]) -> list[str]:
        payload = {"queries": queries, "topk": 3, "return_scores": True}
        results = requests.post(f"{url}/retrieve", json=payload).json()["result"]
        return [passages_to_string(result) for result in results]

    def passages_to_string(result: list[dict[str, Any]]) -> str:
        shown = ""
        for at, item in enumerate(result):
            title, _, text = item["document"]["contents"].partition("\n")
            shown += f"Doc {at + 1}(Title: {title}) {text}\n"
        return shown

    first, second = batch_search(["a", "b"])
    assert first.startswith('Doc 1(Title: "T") about a\nDoc 2(Title: "T") about a\n') and "about b" in second
    assert batch_search([]) == []


def test_verls_clients_work(url: str) -> None:
    """It sends one POST per query, 120 at once, with a session, headers and retries; documents as it shows them."""

    def call_search_api(query: str) -> str:
        payload = {"queries": [query], "topk": 3, "return_scores": True}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        for _ in range(10):
            with requests.Session() as session:
                response = session.post(f"{url}/retrieve", headers=headers, json=payload, timeout=300)
            if response.status_code not in (500, 502, 503, 504):
                break
            time.sleep(0.05)  # verl waits a second or more
        response.raise_for_status()
        pages = []
        for at, item in enumerate(response.json().get("result", [])[0]):
            title, _, text = item["document"]["contents"].partition("\n")
            pages.append(f"Doc {at + 1} (Title: {title})\n{text}\n\n")
        return "".join(pages)

    with ThreadPoolExecutor(30) as pool:
        shown = list(pool.map(call_search_api, [f"q{at}" for at in range(120)]))
    assert all(page.startswith(f'Doc 1 (Title: "T")\nabout q{at}\n\nDoc 2') for at, page in enumerate(shown))


def test_skyrls_client_works(url: str) -> None:
    payload = {"query": "a", "topk": 2, "return_scores": True}
    (result,) = requests.post(f"{url}/retrieve", json=payload, timeout=300).json().get("result", [])
    assert [item["document"]["contents"] for item in result] == ['"T"\nabout a'] * 2


def test_concurrent_requests_are_searched_in_one_batch(echo: Echo) -> None:
    echo.gate.clear()
    with serving(echo, limits=SMALL, max_queued=100) as (url, app), ThreadPoolExecutor(64) as pool:
        answers = [pool.submit(retrieve, url, queries=[f"q{at}"], topk=1) for at in range(64)]
        wait_for(lambda: app.state.service.queued == 64)
        echo.gate.set()
        assert [ids(answer.result()) for answer in answers] == [[[f"q{at}0"]] for at in range(64)]
    assert sorted(query for batch in echo.batches for query in batch) == sorted(f"q{at}" for at in range(64))
    assert len(echo.batches) == 2  # the first query, and all that arrived during its search


def test_a_full_queue_refuses_whole_requests(echo: Echo) -> None:
    echo.gate.clear()
    with serving(echo, limits=SMALL, max_queued=8) as (url, app), ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(retrieve, url, queries=[f"{n}{at}" for at in range(3)]) for n in "ab"]
        wait_for(lambda: app.state.service.queued == 6)
        refused = retrieve(url, queries=["c0", "c1", "c2"])
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == "the queue is full: 6 queries are under way, 8 may be"
        third = pool.submit(retrieve, url, queries=["d0", "d1"])  # there is room for these
        wait_for(lambda: app.state.service.queued == 8)
        assert metrics(url)["trl_search_queued_queries"] == 8
        echo.gate.set()
        assert [len(ids(answer.result())) for answer in (*waiting, third)] == [3, 3, 2]
        assert len(ids(retrieve(url, queries=["c0", "c1", "c2"]))) == 3
        counted = metrics(url)
        assert (counted["trl_search_queries_refused_total"], counted["trl_search_queued_queries"]) == (3, 0)
    with pytest.raises(UserError, match="could never be answered"):
        ServerConfig(limits=SMALL, max_queued=7)


def test_a_failed_search_says_why_and_fails_alone(echo: Echo) -> None:
    echo.gate.clear()
    with serving(echo, limits=SMALL) as (url, app), ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(retrieve, url, queries=[query]) for query in ("first", "poison", "crash", "b")]
        wait_for(lambda: app.state.service.queued == 4)
        echo.gate.set()
        first, poison, crash, b = (answer.result() for answer in answers)
        assert (first.status_code, b.status_code) == (200, 200)
        assert (poison.status_code, crash.status_code) == (422, 500)
        assert poison.json() == {"error": "the search failed: the index is on fire", "field": None}
        assert "KeyError" in crash.json()["error"]
        assert "retry-after" not in poison.headers
        assert retrieve(url, queries=["a", "poison"]).status_code == 422
        assert metrics(url)["trl_search_query_failures_total"] == 3


def test_a_failing_query_of_a_batch_fails_alone_and_at_once(echo: Echo) -> None:
    async def search(retriever: Retriever) -> list[Any]:
        batcher = SearchBatcher(retriever, timeout_s=10)
        asked = (batcher.search(query, 1) for query in ("a", "b", "poison", "c"))
        found = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.aclose()
        return found

    with serving(echo, limits=SMALL) as (url, _), contextlib.closing(load_retriever("http", url=url)) as retriever:
        started = time.monotonic()
        a, b, poison, c = asyncio.run(search(retriever))
        assert [found[0].id for found in (a, b, c)] == ["a0", "b0", "c0"]
        assert type(poison) is RetrievalError and "422" in str(poison) and "the index is on fire" in str(poison)
        assert time.monotonic() - started < 20  # the client would wait 25 s for a server that is down
        assert retriever.take_metrics()["retrieval/retries"] == 0
        assert retriever.endpoints.other_is_well([])  # the client did not pause the server


def test_a_retriever_that_is_down_is_503(echo: Echo) -> None:
    def down(queries: Sequence[str], k: int) -> list[list[Passage]]:
        raise Unavailable("nobody listens")

    echo.search = down  # type: ignore[method-assign]
    with serving(echo) as (url, _):
        response = retrieve(url, queries=["a", "b"])
    assert (response.status_code, response.json()["error"]) == (503, "the search failed: nobody listens")


def test_a_hanging_search_gets_a_response(echo: Echo) -> None:
    echo.gate.clear()
    with serving(echo, limits=SMALL, search_timeout_s=1.0) as (url, _):
        response = retrieve(url, queries=["a"])
        assert response.status_code == 503 and "timed out after 1 s" in response.json()["error"]
        echo.gate.set()
        assert retrieve(url, queries=["b"]).status_code == 200


def test_a_retriever_that_returns_no_passages_has_crashed(url: str) -> None:
    response = retrieve(url, queries=["garbage"])  # not 422: the query is not to blame
    assert (
        response.status_code == 500 and "the retriever returned the passage 'no passage'" in response.json()["error"]
    )


def test_a_bug_fails_one_request_with_an_incident_number(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*given: object) -> bytes:
        raise AttributeError("of nothing")

    with monkeypatch.context() as patched:
        patched.setattr("trl_search.retrieval.server.service._dumps", bug)
        response = retrieve(url, queries=["any"])
    assert response.status_code == 500
    incident = response.json()["error"].split()[-1]
    (record,) = [record for record in caplog.records if record.exc_info]
    assert incident in record.getMessage() and "AttributeError" in caplog.text
    assert "AttributeError" not in response.text
    assert retrieve(url, queries=["a"]).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"{", 400, None),
        (b'{"queries": ["\xff"]}', 400, None),
        (b"[]", 422, None),
        (b'{"topk": 3}', 422, "queries"),
        (b'{"queries": ["a", 3]}', 422, "queries[1]"),
        (b'{"query": "\\ud83c"}', 422, "query"),
        (b'{"query": "a", "topk": 0}', 422, "topk"),
        (b'{"query": "' + b"x" * 1001 + b'"}', 413, "query"),
        (b'{"query": "' + b"x" * 10_000 + b'"}', 413, None),
    ],
)
def test_a_bad_request_gets_an_explanation(url: str, body: bytes, status: int, field: str | None) -> None:
    response = CLIENT.post(f"{url}/retrieve", content=body)
    assert (response.status_code, response.json()["field"]) == (status, field)
    assert response.json()["error"].startswith(field or "the request")


def test_any_bytes_get_a_response(url: str) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300) | st.text(max_size=40).map(lambda text: json.dumps({"query": text}).encode()))
    def check(body: bytes) -> None:
        assert CLIENT.post(f"{url}/retrieve", content=body).status_code in (200, 400, 413, 422)

    check()


def test_other_routes_and_methods_are_refused(url: str) -> None:
    assert CLIENT.get(f"{url}/retrieve").status_code == 405
    assert CLIENT.get(f"{url}/retrieve").headers["Allow"] == "POST"
    assert CLIENT.post(f"{url}/search", json={}).status_code == 404
    assert "POST /retrieve" in CLIENT.get(url).json()["error"]  # a person in front of a browser learns what there is
    assert [CLIENT.get(f"{url}{path}").status_code for path in ("/docs", "/openapi.json")] == [404, 404]


def test_a_body_that_is_too_large_is_refused_while_it_arrives(url: str) -> None:
    def without_a_length() -> Iterator[bytes]:
        for _ in range(3):
            yield b"x" * 5_000

    response = CLIENT.post(f"{url}/retrieve", content=without_a_length())
    assert response.status_code == 413 and response.headers["connection"] == "close"
    # A body of unknown length is cut off: the server answers and disconnects after a two-hundredth of it.
    with connect(url) as client:
        client.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\n\r\n")
        client.sendall(b"x" * 41_000)
        answer = b""
        while received := client.recv(10_000):
            answer += received
        assert b" 413 " in answer.split(b"\r\n")[0] and b"larger than 10,000 bytes" in answer
    assert retrieve(url, queries=["a"]).status_code == 200


@pytest.mark.parametrize(("sent", "taken"), [(9, 9), (10, 10), (11, 11), (1000, 41)])
def test_no_more_of_a_body_than_the_limit_is_kept(sent: int, taken: int) -> None:
    messages = iter({"type": "http.request", "body": b"x" * 1000, "more_body": at < sent} for at in range(1, sent + 1))

    async def receive() -> dict[str, Any]:
        return next(messages)

    if sent <= 10:
        assert asyncio.run(read_body(receive, SMALL, 5.0)) == b"x" * 1000 * sent
    else:
        with pytest.raises(WireError, match="larger than 10,000 bytes"):
            asyncio.run(read_body(receive, SMALL, 5.0))
    assert len(list(messages)) == sent - taken


def test_a_client_that_sends_too_slowly_gets_an_error(echo: Echo) -> None:
    with serving(echo, limits=SMALL, body_timeout_s=0.2) as (url, _):
        for sent in (b'{"quer', b""):
            with connect(url) as client:
                client.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + sent)
                assert b" 408 " in client.recv(1000).split(b"\r\n")[0]


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=200)


def test_disconnected_clients_leave_nothing_behind(echo: Echo) -> None:
    echo.gate.clear()
    body = b'{"query": "gone"}'
    head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    with serving(echo, limits=SMALL) as (url, app):
        for sent in (head % len(body) + body, head % 5000 + b"half a body", head[:30], b"\x00\xff"):
            with connect(url) as client:
                client.sendall(sent)
                if sent.endswith(body):
                    wait_for(lambda: app.state.service.queued == 1)
        echo.gate.set()
        wait_for(lambda: app.state.service.queued == 0)
        assert ids(retrieve(url, query="gone", topk=1)) == [["gone0"]]
        wait_for(lambda: 'status="499"' in CLIENT.get(f"{url}/metrics").text)  # the request with half a body


def test_a_repeated_query_comes_from_the_cache(echo: Echo) -> None:
    with serving(echo, limits=SMALL) as (url, _):
        first = retrieve(url, queries=["a", "b", "a"], return_scores=True)
        again = retrieve(url, queries=["b", "c", "a"], return_scores=True)
        assert [sorted(batch) for batch in echo.batches] == [["a", "b"], ["c"]]
        assert again.json()["result"][2] == first.json()["result"][0]
        assert ids(again) == [[f"{query}{rank}" for rank in range(3)] for query in "bca"]
        retrieve(url, queries=["a"], topk=2, return_scores=True)
        retrieve(url, queries=["a"], return_scores=False)
        assert len(echo.batches) == 4
        assert retrieve(url, queries=["poison"]).status_code == retrieve(url, queries=["poison"]).status_code == 422
        assert len(echo.batches) == 6  # failures are not cached
        counted = metrics(url)
        assert (counted["trl_search_cache_hits_total"], counted["trl_search_cache_entries"]) == (2, 5)


def test_the_cache_stays_within_its_memory() -> None:
    cache = ResultCache(10_000)
    for at in range(100):
        cache.put(f"q{at}", 3, True, b"x" * 500)
        assert cache.get("q0", 3, True) is not None  # used often, so it stays
    assert cache.size_bytes <= 10_000 and 8 <= len(cache) <= 12
    assert cache.get("q99", 3, True) == b"x" * 500 and cache.get("q50", 3, True) is None
    cache.put("large", 3, True, b"x" * 20_000)
    assert cache.get("large", 3, True) is None and len(cache) >= 8
    nothing = ResultCache(0)
    nothing.put("q", 3, True, b"")
    assert nothing.get("q", 3, True) is None


def test_invalid_text_in_a_passage_does_not_break_the_response(echo: Echo) -> None:
    echo.search = lambda queries, k: [[Passage("1", "", "half \ud83c")] for _ in queries]  # type: ignore[method-assign]
    with serving(echo) as (url, _):
        ((passage,),) = parse_response(retrieve(url, query="a").json())
        assert passage.text == "half \ufffd"


def test_the_token_is_required_and_never_shown(echo: Echo, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = ServerConfig(token="s3cret")
    assert "s3cret" not in repr(config)
    with serving(echo, token="s3cret") as (url, _):
        for given_headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            response = CLIENT.post(f"{url}/retrieve", json={"query": "a"}, headers=given_headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        allowed = {"Authorization": "Bearer s3cret"}
        assert CLIENT.post(f"{url}/retrieve", json={"query": "words"}, headers=allowed).status_code == 200
        assert [CLIENT.get(f"{url}{path}").status_code for path in ("/health", "/ready", "/metrics")] == [
            200,
            200,
            401,
        ]
        assert CLIENT.get(f"{url}/metrics", headers=allowed).status_code == 200
    assert echo.batches == [["words"]]
    written = "".join(record.getMessage() for record in caplog.records if "trl_search" in record.name)
    assert '"status":401' in written and "s3cret" not in written and "words" not in written
    for unfit, message in ((" ", "not empty"), ("s3cret\n", "pass it stripped")):
        with pytest.raises(UserError, match=f"the token from ServerConfig .*{message}"):
            ServerConfig(token=unfit)


def test_every_request_is_logged_as_one_line_of_json(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trl_search.retrieval.server.access")
    retrieve(url, queries=["a", "b"], topk=2)
    retrieve(url, queries=["a"], topk=2)
    retrieve(url, queries="a")
    CLIENT.get(f"{url}/health?secret=1")
    wait_for(lambda: len(caplog.records) == 4)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 200, 422, 200]
    assert [(line.get("queries"), line.get("k"), line.get("cached")) for line in lines[:2]] == [(2, 2, 0), (1, 2, 1)]
    assert lines[2]["error"].startswith("queries: ") and lines[3]["path"] == "/health"
    assert all(line["ms"] >= 0 and line["client"] == "127.0.0.1" for line in lines)


def test_metrics_are_in_prometheus_format(url: str) -> None:
    retrieve(url, queries=["a", "b"])
    retrieve(url, queries="a")
    CLIENT.get(f"{url}/some/scanner/path")
    text = CLIENT.get(f"{url}/metrics").text
    assert 'trl_search_requests_total{path="/retrieve",status="422"} 1.0' in text
    assert 'path="other"' in text and "scanner" not in text
    counted = metrics(url)
    assert counted["trl_search_queries_total"] == 2 and counted["trl_search_batches_total"] == 1
    assert counted["trl_search_ready"] == 1 and counted["trl_search_request_seconds_count"] >= 3


def test_the_server_is_not_ready_before_the_index_is_loaded(echo: Echo) -> None:
    with serving(None, name="bm25", fingerprint="f00") as (url, app):
        assert CLIENT.get(f"{url}/ready").status_code == 503
        assert CLIENT.get(f"{url}/health").json() == {"status": "ok", "serves": "bm25", "fingerprint": "f00"}
        response = retrieve(url, queries=["a"])
        assert response.status_code == 503 and response.headers["retry-after"] and "loading" in response.text
        app.state.service.open(echo)
        assert CLIENT.get(f"{url}/ready").json() == {"ready": True}
        assert retrieve(url, queries=["a"]).status_code == 200


SLOW = """
    import sys, threading, time
    from trl_search.retrieval import RetrievalError, Retriever
    from trl_search.retrieval.server import ServerConfig
    from trl_search.retrieval.server.run import listen, serve
    from trl_search.types import Passage

    class Slow(Retriever):
        def search(self, queries, k):
            print("searching", len(queries), flush=True)
            time.sleep(1.0)
            return [[Passage(query, "", "")] for query in queries]

        def close(self):
            print("closed", flush=True)

    def load():
        if sys.argv[1] == "hang":
            time.sleep(60)
        if sys.argv[1] == "fail":
            raise RetrievalError("no such index")
        return Slow()

    listening = listen("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    serve(load, ServerConfig(max_batch=2), listening, lambda url: print("loaded", flush=True))
    print("ended", flush=True)
"""


@contextlib.contextmanager
def process(load: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", textwrap.dedent(SLOW), load]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server, f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_on_a_stop_signal_it_answers_running_requests(number: signal.Signals) -> None:
    with process("load") as (server, url), ThreadPoolExecutor(6) as pool:
        assert server.stdout is not None and server.stdout.readline() == "loaded\n"
        answers = [pool.submit(retrieve, url, queries=[f"q{at}"]) for at in range(4)]
        assert server.stdout.readline().startswith("searching ")
        wait_for(lambda: metrics(url)["trl_search_queued_queries"] == 4)
        os.kill(server.pid, number)
        # One or two requests are being searched, the others wait: all get a response.
        assert [ids(answer.result()) for answer in answers] == [[[f"q{at}"]] for at in range(4)]
        written, _ = server.communicate(timeout=200)
        assert written.endswith("closed\nended\n") and server.returncode == 0
        with pytest.raises(httpx.ConnectError):
            retrieve(url, queries=["late"])


def test_on_a_stop_signal_during_loading_it_stops() -> None:
    with process("hang") as (server, url):
        wait_for(lambda: reachable(url))
        assert CLIENT.get(f"{url}/ready").status_code == 503
        server.terminate()
        assert server.communicate(timeout=200)[0] == "ended\n" and server.returncode == 0


def reachable(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return CLIENT.get(f"{url}/health").status_code == 200
    return False


def test_an_index_that_cannot_be_loaded_ends_the_server_with_the_reason() -> None:
    with process("fail") as (server, _):
        written, complaint = server.communicate(timeout=200)
        assert server.returncode == 1 and written == ""
        assert complaint.strip().endswith("RetrievalError: no such index")


def test_a_port_in_use_is_reported_at_once() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(UserError, match="choose another --host or --port"):
        listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("gpu-node-3", False),
    ],
)
def test_which_hosts_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
