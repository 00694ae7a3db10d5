"""The `http` retriever with real servers on loopback that die, are overloaded, hang or answer wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.servers import Asked, Said, Server, endless, retrieve_from, serving
from trl_search.common.errors import UserError
from trl_search.environment import SearchEnvironment
from trl_search.retrieval import RetrievalError, Retriever, base, load_retriever
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.batching import SearchBatcher
from trl_search.retrieval.remote.endpoints import Endpoints
from trl_search.retrieval.remote.http_retriever import HttpRetriever
from trl_search.retrieval.remote.wire import Limits
from trl_search.types import Passage, Search, StopReason

pytestmark = pytest.mark.slow


class Echo(Retriever):
    """Returns the query itself `k` times, after a delay."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        time.sleep(self.delay_s)
        return [[Passage(f"{query}{rank}", "T", query, 1.0 / (1 + rank)) for rank in range(k)] for query in queries]


ECHO = retrieve_from(Echo())


def echo_after(delay_s: float) -> Callable[[Asked], Said]:
    return retrieve_from(Echo(delay_s))


def says(*answers: Said) -> Callable[[Asked], Said]:
    """These answers first, then those of Echo."""
    waiting = list(answers)
    return lambda asked: waiting.pop(0) if waiting else ECHO(asked)


@pytest.fixture
def client() -> Iterator[Callable[..., HttpRetriever]]:
    made: list[HttpRetriever] = []

    def make(*servers: Server | str, **options: Any) -> HttpRetriever:
        urls = [server if isinstance(server, str) else server.url for server in servers]
        made.append(HttpRetriever(urls=urls, **{"timeout_s": 5.0, "patience_s": 10.0, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def total(retriever: HttpRetriever) -> dict[str, float]:
    return retriever.take_metrics()


def dead_url() -> str:
    with serving(ECHO) as server:
        return server.url


def test_both_ways_to_name_a_server_are_equivalent(client) -> None:
    with serving(ECHO) as server:
        for url in (server.url, f"{server.url}/", f"{server.url}/retrieve"):
            retriever = load_retriever("http", url=url)
            assert retriever.search(["a", "b"], 2) == Echo().search(["a", "b"], 2)
            retriever.close()
        assert {asked.target for asked in server.asked} == {"/retrieve"}
        assert server.asked[0].json == {"queries": ["a", "b"], "topk": 2, "return_scores": True}
        assert (client(server).search([], 2), len(server.asked)) == ([], 3)  # an empty batch sends no request


def test_answers_of_other_servers_are_read(client) -> None:
    hit = {"document": {"id": 7, "contents": '"Orlune"\nA town.'}, "score": 0.5}
    bare = {"id": "7", "title": "Orlune", "text": "A town.", "url": "https://example.org"}
    with serving(says(Said({"result": [[hit], [bare, bare]]}))) as server:
        first, second = client(server).search(["a", "b"], 1)
    assert first == [Passage("7", "Orlune", "A town.", 0.5)]
    assert second == [Passage("7", "Orlune", "A town.", 0.0, "https://example.org")]  # k=1, although it sent two


def skyrl_server(asked: Asked) -> Said:
    """Answers like SkyRL's example server (FastAPI with one required `query`)."""
    if "query" not in asked.json:
        missing = {"type": "missing", "loc": ["body", "query"], "msg": "Field required", "input": asked.json}
        return Said({"detail": [missing]}, 422)
    document = {"id": "7", "contents": f'"Orlune"\n{asked.json["query"]}'}
    return Said({"result": [[{"document": document, "score": 0.5}] * asked.json["topk"]]})


def test_a_server_for_single_queries_gets_one_query_per_request(client) -> None:
    with serving(skyrl_server) as server:
        retriever = client(server)
        queries = [f"query {number}" for number in range(50)]
        for _ in range(2):
            found = retriever.search(queries, 2)
            assert [[passage.text for passage in passages] for passages in found] == [[query] * 2 for query in queries]
        assert len(server.asked) == 1 + 100 and all("query" in asked.json for asked in server.asked[1:])


def test_every_document_has_contents_and_url() -> None:
    """ASearcher's client reads both, from answers without scores."""
    world = [Passage("1", "Orlune", "A harbour town."), Passage("2", "", "A harbour.", url="https://e.org")]
    with serving(retrieve_from(load_retriever("bm25", passages=world))) as server:
        asked = {"queries": ["harbour"], "topk": 2, "return_scores": False}
        (documents,) = httpx.post(f"{server.url}/retrieve", json=asked).json()["result"]
    assert [(one["contents"], one["url"]) for one in documents] == [
        ('""\nA harbour.', "https://e.org"),
        ('"Orlune"\nA harbour town.', ""),
    ]


def test_a_server_killed_under_load_fails_no_request(client) -> None:
    servers = [Server(echo_after(0.01)) for _ in range(3)]
    retriever = client(*servers)
    start = threading.Barrier(8)

    def ask(worker: int) -> int:
        start.wait()
        for at in range(40):
            query = f"{worker}/{at}"
            assert retriever.search([query], 1)[0][0].text == query
            if worker == 0 and at == 10:
                servers[0].kill()
        return 40

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 320
    metrics = total(retriever)
    name = servers[0].url.removeprefix("http://")
    assert metrics[f"retrieval/failures/{name}"] == metrics["retrieval/failures"] >= 1
    assert metrics["retrieval/requests"] == 320 + metrics["retrieval/retries"]
    for server in servers[1:]:
        assert len(server.asked) > 80
        server.kill()


def test_a_server_that_comes_back_is_used_again(client) -> None:
    first, second = Server(ECHO), Server(ECHO)
    retriever = client(first, second)
    first.kill()
    for at in range(4):
        assert retriever.search([f"{at}"], 1)
    with serving(ECHO, port=first.port) as again:
        until = time.monotonic() + 120
        while not again.asked and time.monotonic() < until:
            assert retriever.search(["a"], 1)
            time.sleep(0.02)
        assert again.asked
    second.kill()


def test_a_server_that_restarts_is_waited_for(client) -> None:
    server = Server(ECHO)
    port = server.port
    server.kill()
    retriever = client(f"http://127.0.0.1:{port}")
    back: list[Server] = []
    timer = threading.Timer(0.4, lambda: back.append(Server(ECHO, port=port)))
    timer.start()
    assert retriever.search(["a"], 1)[0][0].id == "a0"
    timer.join()
    back[0].kill()
    assert total(retriever)["retrieval/retries"] >= 1


@pytest.mark.parametrize("retry_after", ["1", "date"])
def test_503_is_retried_after_the_time_in_retry_after(client, retry_after: str) -> None:
    value = retry_after if retry_after == "1" else formatdate(time.time() + 2, usegmt=True)
    with serving(says(Said({"error": "full"}, 503, {"Retry-After": value}))) as server:
        retriever, started = client(server), time.monotonic()
        assert retriever.search(["a"], 1)[0][0].id == "a0"
        assert time.monotonic() - started >= 0.9
        assert len(server.asked) == 2


def test_after_503_another_server_is_tried_at_once(client) -> None:
    full = Said({"error": "full"}, 503, {"Retry-After": "90"})
    with serving(lambda asked: full) as busy, serving(ECHO) as idle:
        retriever, started = client(busy, idle), time.monotonic()
        for at in range(10):
            assert retriever.search([f"{at}"], 1)
        assert time.monotonic() - started < 30
        assert (len(busy.asked), len(idle.asked)) == (1, 10)


def test_a_retry_after_beyond_the_patience_fails_at_once(client) -> None:
    with serving(lambda asked: Said({"error": "the queue is full"}, 503, {"Retry-After": "3600"})) as server:
        started = time.monotonic()
        with pytest.raises(
            Unavailable, match=r"127.0.0.1:\d+ answered 503 .*the queue is full; gave up after one try"
        ):
            client(server).search(["a"], 1)
        assert time.monotonic() - started < 30


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 422])
def test_a_4xx_is_reported_and_not_retried(client, status: int) -> None:
    with serving(lambda asked: Said({"detail": "queries[0]: no"}, status)) as server, serving(ECHO) as other:
        retriever = client(server, other)
        with pytest.raises(RetrievalError, match=rf"127.0.0.1:{server.port} answered {status} .*: queries\[0\]: no"):
            for _ in range(2):  # the servers are used in turn
                retriever.search(["a"], 1)
        assert len(server.asked) == 1
        assert total(retriever)[f"retrieval/failures/127.0.0.1:{server.port}"] == 1


def test_a_redirect_is_not_followed(client) -> None:
    with serving(ECHO) as there, serving(lambda asked: Said(b"", 307, {"Location": there.url})) as server:
        with pytest.raises(RetrievalError, match="answered 307"):
            client(server).search(["a"], 1)
        assert (len(server.asked), len(there.asked)) == (1, 0)


def test_a_500_is_tried_three_times(client) -> None:
    with serving(lambda asked: Said(b"Internal Server Error", 500)) as server:
        retriever = client(server)
        with pytest.raises(RetrievalError, match=r"answered 500 .*gave up after 3 tries") as raised:
            retriever.search(["a"], 1)
        assert not isinstance(raised.value, Unavailable)
        assert len(server.asked) == 3
    with serving(says(Said(b"", 500))) as server:
        assert client(server).search(["a"], 1)[0][0].id == "a0"


def test_a_failing_query_does_not_fail_the_rest_of_its_batch(client) -> None:
    def answer(asked: Asked) -> Said:
        return Said(b"boom", 500) if "poison" in asked.json["queries"] else ECHO(asked)

    async def scenario(retriever: HttpRetriever) -> list[Any]:
        batcher = SearchBatcher(retriever, timeout_s=10)
        asked = (batcher.search(query, 1) for query in ("a", "poison", "b"))
        found = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.aclose()
        return found

    with serving(answer) as server:
        a, poison, b = asyncio.run(scenario(client(server)))
    assert (a[0].id, b[0].id) == ("a0", "b0")
    assert "boom" in str(poison)


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b'{"result": 3}', b'{"result": [[{"id": 1}]]}', b"["])
def test_an_invalid_response_names_its_server_and_is_not_retried(client, body: bytes) -> None:
    with serving(lambda asked: Said(body)) as server:
        with pytest.raises(RetrievalError, match=f"127.0.0.1:{server.port} returned an invalid result"):
            client(server).search(["a"], 1)
        assert len(server.asked) == 1


@given(body=st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(max_size=5),
       lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["result", "document", "contents"]),
       inner, max_size=3)))  # fmt: skip
def test_any_body_gives_a_result_or_a_failure(shared_body: tuple[HttpRetriever, list[Any]], body: Any) -> None:
    retriever, holder = shared_body
    holder[:] = [body]
    try:
        found = retriever.search(["a"], 1)
    except RetrievalError:
        return
    assert len(found) == 1


@pytest.fixture(scope="module")
def shared_body() -> Iterator[tuple[HttpRetriever, list[Any]]]:
    holder: list[Any] = [b""]
    with serving(lambda asked: Said(holder[0])) as server:
        retriever = HttpRetriever(url=server.url)
        yield retriever, holder
        retriever.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_answer_that_is_not_compressed_as_it_says_is_a_failed_search(client, encoding: str) -> None:
    with serving(lambda asked: Said(b"plain", headers={"Content-Encoding": encoding})) as server:
        with pytest.raises(RetrievalError, match=f"127.0.0.1:{server.port}: .* not compressed as its Content-Enc"):
            client(server).search(["a"], 1)
        assert len(server.asked) == 1


@pytest.mark.parametrize("charset", ["rot13", "idna", "hex", "undefined"])
def test_a_charset_that_is_none_does_not_hide_the_message(client, charset: str) -> None:
    said = Said(b"no index", 404, {"Content-Type": f"text/plain; charset={charset}"})
    with serving(lambda asked: said) as server, pytest.raises(RetrievalError, match=r"answered 404 .*: no index"):
        client(server).search(["a"], 1)


@pytest.mark.parametrize("retry_after", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_retry_after_of_no_time_does_not_flood_the_server(client, retry_after: str) -> None:
    with serving(lambda asked: Said({"error": "full"}, 503, {"Retry-After": retry_after})) as server:
        with pytest.raises(Unavailable, match="full; gave up after"):
            client(server, patience_s=1.0).search(["a"], 1)
        assert len(server.asked) < 20  # hundreds without a wait; each wait is at least 50 ms


def test_idle_connections_are_closed_before_uvicorn_closes_them(client) -> None:
    async def expiry_s() -> float:
        return (await client("http://a").clients.get())._transport._pool._keepalive_expiry

    assert asyncio.run(expiry_s()) < 5


def test_the_number_of_results_is_checked(client) -> None:
    with (
        serving(says(Said({"result": [[]]}))) as server,
        pytest.raises(RetrievalError, match="1 results to 2 queries"),
    ):
        client(server).search(["a", "b"], 1)


def test_a_server_that_hangs_times_out(client) -> None:
    release = threading.Event()

    def hang(asked: Asked) -> Said:
        release.wait(200)
        return Said(b"", 500)

    with serving(hang) as server, serving(ECHO) as other:
        started = time.monotonic()
        with pytest.raises(Unavailable, match=rf"127.0.0.1:{server.port}: no answer to 1 queries in 0\.\d"):
            client(server, timeout_s=0.2, patience_s=0.2).search(["a"], 1)
        assert time.monotonic() - started < 30
        both = client(server, other, timeout_s=1.5)
        assert all(both.search([f"{at}"], 1)[0][0].id == f"{at}0" for at in range(20))
        assert total(both)["retrieval/failures"] == 1
        release.set()


def test_an_answer_that_is_too_long_is_given_up(client, monkeypatch) -> None:
    monkeypatch.setattr(base, "MAX_ANSWER_BYTES", 1 << 20)
    with serving(lambda asked: Said(by_hand=endless)) as server, serving(ECHO) as other:
        with pytest.raises(RetrievalError, match=rf"127.0.0.1:{server.port}: .*longer than 1 MiB.*fewer queries"):
            client(server).search(["a"], 1)
        assert len(server.asked) == 1
        both = client(server, other)
        with pytest.raises(RetrievalError, match="longer than 1 MiB"):
            both.search([str(at) for at in range(64)], 1)  # two requests, one to each
        assert both.search(["a"], 1)[0][0].id == "a0"  # the server at fault is put aside
    packed = Said(gzip.compress(bytes(2 << 20)), 200, {"Content-Encoding": "gzip"})
    with serving(lambda asked: packed) as server, pytest.raises(RetrievalError, match="longer than 1 MiB"):
        client(server).search(["a"], 1)


def test_a_connection_cut_during_the_response_is_retried(client) -> None:
    def cut(wfile: Any) -> None:
        wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{")

    with serving(says(Said(by_hand=cut))) as server:
        retriever = client(server)
        assert retriever.search(["a"], 1)[0][0].id == "a0"
        assert total(retriever)["retrieval/retries"] == 1


def test_a_closed_port_is_reported(client) -> None:
    url = dead_url()
    with pytest.raises(Unavailable, match=rf"{url.removeprefix('http://')}: ConnectError: .*gave up after \d+ tries"):
        client(url, patience_s=0.5).search(["a"], 1)


def test_a_failed_request_reaches_the_environment_as_a_failed_search(client) -> None:
    async def scenario(environment: SearchEnvironment) -> Any:
        await environment.open()
        observation = await environment.start({}).step(Search(("a",)))
        await environment.close()
        return observation

    observation = asyncio.run(scenario(SearchEnvironment(client(dead_url(), patience_s=0.3))))
    assert observation.done is StopReason.RETRIEVAL_FAILED
    assert "ConnectError" in observation.error and observation.documents == ()


def test_a_large_batch_is_split_over_servers_and_returned_in_order(client) -> None:
    queries = [f"q{at}" for at in range(100)]
    with serving(echo_after(0.05)) as one, serving(echo_after(0.05)) as other:
        found = client(one, other).search(queries, 1)
        assert [passages[0].text for passages in found] == queries
        assert [len(server.asked[0].json["queries"]) for server in (one, other)] == [50, 50]
        found = client(one, max_batch=7).search(queries[:20], 1)
        assert [passages[0].text for passages in found] == queries[:20]
        assert sorted(len(asked.json["queries"]) for asked in one.asked[1:]) == [6, 7, 7]


def test_a_batch_that_is_too_large_for_the_server_is_halved(client) -> None:
    queries = [f"q{at}" for at in range(25)]
    with serving(retrieve_from(Echo(), Limits(max_queries=10, max_query_chars=50))) as server:
        retriever = client(server)
        assert [passages[0].text for passages in retriever.search(queries, 1)] == queries
        with pytest.raises(RetrievalError, match=r"413 .*characters"):
            retriever.search(["a", "x" * 51], 1)


def test_the_token_comes_from_the_environment_and_is_never_shown(client, monkeypatch) -> None:
    monkeypatch.setenv("RETRIEVER_TOKEN", "s3cret")
    with serving(says(Said({"error": "no"}, 403))) as server:
        retriever = load_retriever("http", url=server.url, token_env="RETRIEVER_TOKEN")
        with pytest.raises(RetrievalError) as raised:
            retriever.search(["a"], 1)
        retriever.close()
        assert server.asked[0].headers["authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(raised.value)
    monkeypatch.setenv("RETRIEVER_TOKEN", "s3cret\n")  # mounted files end with a newline
    with serving(ECHO) as server:
        with contextlib.closing(load_retriever("http", url=server.url, token_env="RETRIEVER_TOKEN")) as retriever:
            retriever.search(["a"], 1)
        assert server.asked[0].headers["authorization"] == "Bearer s3cret"
    for unfit in ("s3\ncret", "s3crét"):
        monkeypatch.setenv("RETRIEVER_TOKEN", unfit)
        with pytest.raises(UserError, match="RETRIEVER_TOKEN must be printable ASCII") as refused:
            load_retriever("http", url=server.url, token_env="RETRIEVER_TOKEN")
        assert "s3" not in str(refused.value)
    monkeypatch.delenv("RETRIEVER_TOKEN")
    with pytest.raises(UserError, match="RETRIEVER_TOKEN, named by token_env, is not set"):
        load_retriever("http", url=server.url, token_env="RETRIEVER_TOKEN")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs url="),
        ({"url": "http://a", "urls": ["http://a"]}, "needs url="),
        ({"urls": []}, "needs url= or urls="),
        ({"urls": "http://a"}, "pass url="),
        ({"url": "localhost:8000"}, "begins with http://"),
        ({"url": "http://a:99999"}, "as http://host:8000"),
        ({"url": "http://user:s3cret@a"}, "token_env"),
        ({"urls": ["http://a:8000", "http://a:8000/retrieve"]}, "the same server twice"),
        ({"url": "http://a", "timeout_s": 0}, "above 0"),
        ({"url": "http://a", "max_batch": 0}, "at least 1"),
        ({"url": "http://a", "max_concurrent_batches": 0}, "at least 1"),
        ({"url": "http://a:port"}, "is not a URL"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_retriever("http", **options)
    assert "s3cret" not in str(raised.value)


def test_each_event_loop_has_its_own_connections_and_closes_them(client) -> None:
    with serving(ECHO) as server:
        retriever = client(server)

        async def step() -> int:
            for at in range(5):
                await retriever.search_async([f"{at}"], 1)
            return len(server._connections)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [asyncio.run(step()) for _ in range(3)] == [1, 1, 1]
            gc.collect()
        assert len(retriever.clients) == 0
        assert retriever.search(["a"], 1) and retriever.search(["b"], 1)
        assert len(server._connections) == 1


def test_a_forked_process_opens_its_own_connections(client) -> None:
    with serving(ECHO) as server:
        retriever = client(server)
        assert retriever.search(["a"], 1)
        child = os.fork()
        if child == 0:
            found = retriever.search(["b"], 1)
            retriever.close()
            os._exit(0 if found[0][0].id == "b0" else 1)
        deadline = time.monotonic() + 120
        status = None
        while status is None and time.monotonic() < deadline:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            time.sleep(0.01)
        if status is None:
            os.kill(child, 9)
        assert status == 0
        assert retriever.search(["c"], 1)[0][0].id == "c0"


def test_closing_ends_a_running_search(client) -> None:
    release = threading.Event()
    with serving(lambda asked: Said(b"", 500) if release.wait(200) else Said(b"")) as server:
        retriever = client(server)
        with ThreadPoolExecutor(1) as pool:
            search = pool.submit(retriever.search, ["a"], 1)
            while not server.asked:
                time.sleep(0.01)
            retriever.close()
            with pytest.raises(RetrievalError, match="was closed"):
                search.result(5)
        with pytest.raises(RetrievalError, match="is closed"):
            retriever.search(["a"], 1)
        release.set()


def test_a_caller_that_gives_up_is_not_a_failure_of_the_server(client) -> None:
    release = threading.Event()
    with serving(lambda asked: Said(b"", 500) if release.wait(200) else Said(b"")) as server:
        retriever = client(server)

        async def scenario() -> None:
            batcher = SearchBatcher(retriever, timeout_s=0.1)
            with pytest.raises(RetrievalError, match="timed out"):
                await batcher.search("a", 1)
            await batcher.aclose()

        asyncio.run(scenario())
        release.set()
        assert retriever.endpoints.other_is_well([])
        metrics = total(retriever)
        assert (metrics["retrieval/requests"], metrics["retrieval/failures"]) == (1, 0)


def test_metrics_are_reset_when_they_are_taken(client) -> None:
    with serving(says(Said(b"", 500))) as server:
        retriever = client(server)
        started = time.monotonic()
        retriever.search(["a"], 1)
        seconds = time.monotonic() - started
        metrics = total(retriever)
        assert metrics == {
            "retrieval/requests": 2,
            "retrieval/failures": 1,
            "retrieval/retries": 1,
            "retrieval/request_seconds": metrics["retrieval/request_seconds"],
            "retrieval/latency_p50_s": metrics["retrieval/latency_p50_s"],
            "retrieval/latency_max_s": metrics["retrieval/latency_max_s"],
            f"retrieval/failures/127.0.0.1:{server.port}": 1,
        }
        assert 0 < metrics["retrieval/latency_p50_s"] <= metrics["retrieval/request_seconds"] < seconds
        assert set(total(retriever).values()) == {0.0}


# Only the endpoints, with a clock that the tests set.


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def named(*names: str) -> tuple[Endpoints, Clock]:
    clock = Clock()
    return Endpoints([f"http://{name}" for name in names], clock=clock, jitter=lambda: 1.0), clock


def test_the_server_with_the_fewest_running_requests_is_next() -> None:
    endpoints, _ = named("a", "b", "c")
    taken = [endpoints.take() for _ in range(6)]
    assert sorted(one.name for one in taken) == ["a:80", "a:80", "b:80", "b:80", "c:80", "c:80"]
    endpoints.done(taken[1], 0.1)
    assert endpoints.take() is taken[1]


def test_a_failed_server_is_paused_for_increasing_times_and_probed_by_one_request() -> None:
    endpoints, clock = named("a", "b")
    a = endpoints.take()
    endpoints.failed(a, 0.0)
    assert all(endpoints.take() is not a for _ in range(5))
    clock.now += 0.5
    assert endpoints.take() is a  # the probe
    assert all(endpoints.take() is not a for _ in range(5))  # only one
    endpoints.failed(a, 0.0)
    clock.now += 0.9
    assert endpoints.take() is not a
    clock.now += 0.1
    assert endpoints.take() is a
    endpoints.done(a, 0.1)
    assert [endpoints.take() for _ in range(3)] == [a, a, a]


def test_simultaneous_failures_count_once() -> None:
    endpoints, clock = named("a", "b")
    taken = [endpoints.take() for _ in range(16)]
    for one in taken:
        if one.name == "a:80":
            endpoints.failed(one, 0.0)
    clock.now += 0.5
    assert endpoints.take().name == "a:80"


@pytest.mark.parametrize(
    ("seconds", "wait_s", "away_s"),
    [
        pytest.param(20.0, None, 60, id="what took long to fail stays away longer"),
        pytest.param(0.0, 86_400.0, 30, id="who asks for a day is asked again in half a minute"),
    ],
)
def test_how_long_a_failed_server_is_paused(seconds: float, wait_s: float | None, away_s: int) -> None:
    endpoints, clock = named("a", "b")
    a = endpoints.take()
    endpoints.failed(a, seconds, wait_s=wait_s)
    clock.now += away_s - 1
    assert endpoints.take() is not a
    clock.now += 1
    assert endpoints.take() is a


def test_a_cancelled_probe_is_followed_by_another() -> None:
    endpoints, clock = named("a", "b")
    a = endpoints.take()
    endpoints.failed(a, 0.0)
    assert all(endpoints.take() is not a for _ in range(3))
    clock.now += 0.5
    assert endpoints.take() is a
    endpoints.given_up(a, 3.0)
    assert endpoints.take() is a
    assert endpoints.take_stats()[a.name].failures == 1


def test_stored_latencies_are_bounded() -> None:
    endpoints, _ = named("a")
    for at in range(10_050):
        endpoints.done(endpoints.take(), float(at))
    stats = endpoints.take_stats()["a:80"]
    assert (stats.requests, len(stats.latencies_s), stats.latencies_s[-1]) == (10_050, 10_000, 10_049.0)


def test_if_all_servers_are_paused_the_one_due_first_is_used() -> None:
    endpoints, _ = named("a", "b")
    first, second = endpoints.take(), endpoints.take()
    endpoints.failed(first, 0.0, wait_s=9.0)
    endpoints.failed(second, 0.0, wait_s=5.0)
    assert not endpoints.other_is_well([])
    assert endpoints.take() is second
    assert endpoints.take([second]) is first
