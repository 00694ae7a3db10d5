"""The `web` retriever: the response format of each provider from a real server, the rate, the cache, and failures."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import tenacity

from tests.support.servers import Said, Server, endless, serving
from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, base, load_retriever
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.batching import SearchBatcher
from trl_search.retrieval.web import page_gates
from trl_search.retrieval.web import retriever as web
from trl_search.retrieval.web.page import PageError, PageLimits
from trl_search.retrieval.web.providers import DdgsProvider, Provider, ProviderBusy, WebHit, load_provider
from trl_search.retrieval.web.retriever import WebRetriever
from trl_search.retrieval.web.store import WebStore
from trl_search.types import Passage

KEY = "k3y-of-the-tests"
URLS = ["https://orlune.example/", "https://vesk.example/town"]

# The responses that the providers document, with only some of their fields.
SERPER = {
    "searchParameters": {"q": "orlune", "type": "search", "num": 10, "engine": "google"},
    "organic": [
        {"title": "Orlune &amp; Sons", "link": URLS[0], "snippet": "A harbour town.", "position": 1},
        {"title": "Vesk", "link": URLS[1], "position": 2, "sitelinks": []},
    ],
    "peopleAlsoAsk": [],
    "credits": 1,
}
TAVILY = {
    "query": "orlune",
    "answer": None,
    "images": [],
    "results": [
        {"title": "Orlune & Sons", "url": URLS[0], "content": "A harbour town.", "score": 0.9, "raw_content": None},
        {"title": "Vesk", "url": URLS[1], "content": "", "score": 0.5, "raw_content": None},
    ],
    "response_time": 1.1,
}
BRAVE = {
    "type": "search",
    "query": {"original": "orlune", "more_results_available": True},
    "mixed": {"type": "mixed", "main": []},
    "web": {
        "type": "search",
        "results": [
            {"title": "Orlune &amp; Sons", "url": URLS[0], "description": "A <strong>harbour</strong> town."},
            {"title": "Vesk", "url": URLS[1], "description": "", "language": "en"},
        ],
    },
}
SEARXNG = {
    "query": "orlune",
    "number_of_results": 0,
    "results": [
        {
            "title": "Orlune & Sons",
            "url": URLS[0],
            "content": "A harbour town.",
            "engine": "bing",
            "engines": ["bing"],
        },
        {"title": "Vesk", "url": URLS[1], "content": None, "engine": "bing"},
    ],
    "answers": [],
    "suggestions": [],
    "unresponsive_engines": [["duckduckgo", "timeout"]],
}
SHAPES = {"serper": SERPER, "tavily": TAVILY, "brave": BRAVE, "searxng": SEARXNG}
EMPTY = {
    "serper": {"organic": []},
    "tavily": {"results": []},
    "brave": {"type": "search", "query": {}},
    "searxng": {"results": [], "unresponsive_engines": []},
}
FOUND = [
    Passage(URLS[0], "Orlune & Sons", "A harbour town.", 1.0, URLS[0]),
    Passage(URLS[1], "Vesk", "", 0.5, URLS[1]),
]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERPER", "TAVILY", "BRAVE"):
        monkeypatch.setenv(f"{name}_API_KEY", KEY)
    monkeypatch.delenv("SEARXNG_URL", raising=False)


class Waits:
    """A clock that moves only when a caller sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 3))
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., WebRetriever]]:
    made: list[WebRetriever] = []

    def make(provider: Provider, waits: Waits | None = None, **options: Any) -> WebRetriever:
        waits = waits or Waits()
        store = WebStore(tmp_path / "web.sqlite3", clock=waits)
        made.append(WebRetriever(provider, store, sleep=waits.sleep, **{"rate_per_s": 1000.0, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Engine:
    """A provider that finds the query itself, after it has raised the `failures`."""

    name = identity = "engine"
    rate_per_s = 1.0

    def __init__(self, failures: list[Exception] | None = None) -> None:
        self.asked: list[str] = []
        self.failures = failures or []

    async def search(self, client: httpx.AsyncClient, query: str, count: int) -> list[WebHit]:
        self.asked.append(query)
        if self.failures:
            raise self.failures.pop(0)
        return [] if query == "nothing" else [WebHit(query, f"https://{at}.example", query) for at in range(count)]


@pytest.mark.parametrize("name", SHAPES)
def test_requests_and_responses_of_each_provider(name: str, make) -> None:
    with serving(lambda asked: Said(SHAPES[name])) as server:
        retriever = make(load_provider(name, server.url))
        assert retriever.search(["orlune"], 2) == [FOUND]
        (asked,) = server.asked
    if name == "serper":
        assert (asked.method, asked.target, asked.headers["x-api-key"]) == ("POST", "/search", KEY)
        assert asked.json == {"q": "orlune", "num": 10}
    elif name == "tavily":
        assert (asked.method, asked.target, asked.headers["authorization"]) == ("POST", "/search", f"Bearer {KEY}")
        assert (asked.json["query"], asked.json["max_results"]) == ("orlune", 10)
    elif name == "brave":
        assert asked.headers["x-subscription-token"] == KEY
        assert asked.target == "/res/v1/web/search?q=orlune&count=10&text_decorations=false"
    else:
        assert asked.target == "/search?q=orlune&format=json"


@pytest.mark.parametrize("name", SHAPES)
def test_no_results_give_an_empty_list_that_is_not_cached(name: str, make) -> None:
    with serving(lambda asked: Said(EMPTY[name])) as server:
        retriever = make(load_provider(name, server.url))
        assert retriever.search(["orlune"], 2) == retriever.search(["orlune"], 2) == [[]]
        assert len(server.asked) == 2


ODD = [{}, {"title": "no address"}, {"title": None, "link": URLS[0], "url": URLS[0]}, "text", None, {"title": 3}]


@pytest.mark.parametrize("name", SHAPES)
def test_results_without_title_or_address_are_skipped(name: str, make) -> None:
    answer = copy.deepcopy(SHAPES[name])
    hits = answer["web"]["results"] if name == "brave" else answer["organic" if name == "serper" else "results"]
    hits[1:1] = ODD
    hits[0]["snippet" if name == "serper" else "description" if name == "brave" else "content"] = ["no", "text"]
    with serving(lambda asked: Said(answer)) as server:
        assert make(load_provider(name, server.url)).search(["orlune"], 2) == [[replace(FOUND[0], text=""), FOUND[1]]]


def test_an_answer_box_without_results_is_an_empty_result(make) -> None:
    answer = {"searchParameters": {"q": "orlune"}, "answerBox": {"answer": "a town"}, "credits": 1}
    with serving(lambda asked: Said(answer)) as server:
        assert make(load_provider("serper", server.url)).search(["orlune"], 2) == [[]]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("body", [b"<html>", {}, [], {"organic": 3, "results": 3, "type": "search", "web": 3}, None])
def test_an_unknown_response_format_is_an_error_and_not_an_empty_result(name: str, body: Any, make) -> None:
    with serving(lambda asked: Said(body)) as server:
        with pytest.raises(RetrievalError, match=f"{name} answered in an unexpected shape"):
            make(load_provider(name, server.url)).search(["orlune"], 2)
        assert len(server.asked) == 1


def test_searxng_with_unresponsive_engines_is_not_an_empty_result(make) -> None:
    answer = {"results": [], "unresponsive_engines": [["google", "CAPTCHA"]]}
    with serving(lambda asked: Said(answer)) as server, pytest.raises(Unavailable, match=r"CAPTCHA.*after 4 tries"):
        make(load_provider("searxng", server.url)).search(["orlune"], 2)


@pytest.mark.parametrize("status", [400, 401, 403, 422])
def test_a_refusal_is_not_retried_and_reported_without_the_key(status: int, make, caplog) -> None:
    caplog.set_level("DEBUG")
    with serving(lambda asked: Said(f"bad key {KEY}".encode(), status)) as server:
        with pytest.raises(RetrievalError, match=f"serper answered {status}: bad key \\[key\\]") as raised:
            make(load_provider("serper", server.url)).search(["orlune"], 2)
        assert len(server.asked) == 1
    assert ("SERPER_API_KEY" in str(raised.value)) == (status in (401, 403))
    assert KEY not in f"{raised.value}{raised.value.__cause__}{caplog.text}"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Said(SERPER, headers={"Content-Encoding": "gzip"}), "not compressed as its Content-Encoding says"),
        (Said(b"no plan", 402, {"Content-Type": "text/plain; charset=idna"}), "answered 402: no plan"),
    ],
)
def test_headers_that_do_not_fit_the_answer_fail_the_search(said: Said, message: str, make) -> None:
    with serving(lambda asked: said) as server, pytest.raises(RetrievalError, match=f"serper.*{message}"):
        make(load_provider("serper", server.url)).search(["orlune"], 2)


def test_an_answer_that_is_too_long_fails_the_search(make, monkeypatch) -> None:
    monkeypatch.setattr(base, "MAX_ANSWER_BYTES", 1 << 20)
    with serving(lambda asked: Said(by_hand=endless)) as server:
        with pytest.raises(RetrievalError, match="serper: the answer is longer than 1 MiB"):
            make(load_provider("serper", server.url)).search(["orlune"], 2)
        assert len(server.asked) == 1


@pytest.mark.parametrize("busy", [Said(b"slow down", 429, {"Retry-After": "7"}), Said(b"", 503)])
def test_a_busy_provider_is_retried(busy: Said, make) -> None:
    answers, waits = [busy, Said(SERPER)], Waits()
    with serving(lambda asked: answers.pop(0)) as server:
        retriever = make(load_provider("serper", server.url), waits)
        assert retriever.search(["orlune"], 2) == [FOUND]
        assert len(server.asked) == 2
    assert any(7 <= slept <= 8 for slept in waits.slept) == (busy.status == 429)
    metrics = retriever.take_metrics()
    assert metrics["retrieval/requests"] == 2 and metrics["retrieval/retries"] == 1
    assert metrics["retrieval/failures"] == metrics["retrieval/failures/serper"] == 1
    assert set(retriever.take_metrics().values()) == {0}


def test_a_closed_port_is_unavailable(make) -> None:
    server = Server(lambda asked: Said())
    server.kill()
    with pytest.raises(Unavailable, match="serper: ConnectError"):
        make(load_provider("serper", server.url)).search(["orlune"], 2)


# ddgs


def test_results_and_errors_of_ddgs(make) -> None:
    exceptions = pytest.importorskip("ddgs.exceptions")
    rows = [{"title": "Orlune & Sons", "href": URLS[0], "body": "A harbour town."}]
    answers: list[Any] = [
        exceptions.RatelimitException("202 Ratelimit"),
        rows,
        exceptions.DDGSException("No results found."),
        *[exceptions.TimeoutException("timed out")] * 4,
    ]

    def text(query: str, count: int) -> list[dict[str, str]]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    retriever = make(DdgsProvider(text))
    assert retriever.search(["orlune"], 1) == [FOUND[:1]]
    assert retriever.search(["nowhere"], 1) == [[]]
    with pytest.raises(Unavailable, match=r"ddgs: TimeoutException: timed out; gave up after 4 tries"):
        retriever.search(["slow"], 1)
    assert answers == []


def test_the_real_ddgs_accepts_our_call(monkeypatch) -> None:
    """With the real package; only its engines are replaced, because there is no web here."""
    pytest.importorskip("ddgs")
    import ddgs.ddgs
    from ddgs.results import TextResult

    class Local:
        name = provider = "local"
        priority = 1

        def __init__(self, **options: Any) -> None:
            pass

        def search(self, query: str, **options: Any) -> list[TextResult]:
            return [TextResult(title="Orlune", href=URLS[0], body=f"about {query}")]

    monkeypatch.setitem(ddgs.ddgs.ENGINES, "text", {"local": Local})
    provider = load_provider("ddgs")
    hits = asyncio.run(provider.search(httpx.AsyncClient(), "orlune", 3))
    assert hits == [WebHit("Orlune", URLS[0], "about orlune")]


# The rate


def test_searches_keep_the_rate_and_the_first_does_not_wait(make) -> None:
    waits, engine = Waits(), Engine()
    retriever = make(engine, waits, rate_per_s=2.0)
    for at in range(4):
        retriever.search([f"q{at}"], 1)
    assert waits.slept == [0.0, 0.5, 0.5, 0.5]
    waits.now += 60
    retriever.search(["late"], 1)
    assert waits.slept[-1] == 0.0  # idle time neither delays nor speeds up later searches


class Stopped(Waits):
    """A clock that stands still."""

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def test_a_queue_longer_than_the_patience_fails_at_once_and_names_the_remedy(make) -> None:
    engine = Engine()
    retriever = make(engine, Stopped(), rate_per_s=1.0, patience_s=3.9)
    with pytest.raises(
        RetrievalError, match=r"more searches are waiting than 1 per second can serve in 3.9 s; raise rate_per_s"
    ):
        retriever.search([f"q{at}" for at in range(10)], 1)
    assert len(engine.asked) == 4  # at 0, 1, 2 and 3 seconds; they are cached
    assert retriever.search(engine.asked, 1)


class Slow(Engine):
    """Reports after `takes_s` that it is busy."""

    def __init__(self, takes_s: float) -> None:
        super().__init__()
        self.takes_s = takes_s

    async def search(self, client: httpx.AsyncClient, query: str, count: int) -> list[WebHit]:
        self.asked.append(query)
        await asyncio.sleep(self.takes_s)
        raise ProviderBusy("busy")


def test_a_hanging_engine_is_given_up_when_the_patience_ends(make) -> None:
    engine = Slow(200)
    retriever = make(engine, patience_s=0.3)
    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"engine: no answer within 0.3 s.*patience_s"):
        retriever.search(["a"], 1)
    assert time.monotonic() - started < 60 and engine.asked == ["a"]
    metrics = retriever.take_metrics()
    assert metrics["retrieval/requests"] == metrics["retrieval/failures"] == 1


def test_a_retry_does_not_wait_for_a_turn_beyond_the_patience(make, monkeypatch) -> None:
    monkeypatch.setattr(web, "_GROWING", tenacity.wait_none())
    engine = Slow(1.0)
    retriever = make(engine, Stopped(), rate_per_s=0.4, patience_s=3.0)  # the next turn is in 2.5 s, and 2 s are left
    with pytest.raises(RetrievalError, match=r"can serve in 3 s"):
        retriever.search(["a"], 1)
    assert engine.asked == ["a"]


def test_retries_end_with_the_patience(make, monkeypatch) -> None:
    monkeypatch.setattr(web, "_GROWING", tenacity.wait_fixed(5))
    engine, waits = Slow(0), Waits()
    with pytest.raises(Unavailable, match="busy; gave up after 1 tries"):
        make(engine, waits, patience_s=3.0).search(["a"], 1)
    assert waits.slept == [0.0]


def test_a_failing_query_does_not_fail_the_rest_of_its_batch(make) -> None:
    retriever = make(Engine([RetrievalError("no"), RetrievalError("no")]))

    async def scenario() -> list[Any]:
        batcher = SearchBatcher(retriever, timeout_s=10)
        found = await asyncio.gather(*(batcher.search(q, 1) for q in "abc"), return_exceptions=True)
        await batcher.aclose()
        return found

    outcomes = asyncio.run(scenario())
    assert [isinstance(one, RetrievalError) for one in outcomes].count(True) == 0  # retried alone, each was found


def test_the_rate_is_shared_by_threads(tmp_path: Path) -> None:
    WebStore(tmp_path / "web.sqlite3")
    with ThreadPoolExecutor(8) as pool:
        turns = [turn for part in pool.map(take_turns, [tmp_path / "web.sqlite3"] * 8) for turn in part]
    assert sorted(round(turn) for turn in turns) == list(range(40))


def test_the_rate_is_shared_by_processes(tmp_path: Path) -> None:
    path = tmp_path / "web.sqlite3"
    WebStore(path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        turns = [turn for part in pool.map(take_turns, [path] * 4) for turn in part]
    assert len(turns) == len(set(turns)) == 20
    assert all(later - earlier > 0.9 for earlier, later in zip(sorted(turns), sorted(turns)[1:], strict=False))


def test_a_clock_that_is_set_back_does_not_stop_the_searches(tmp_path: Path) -> None:
    waits = Waits()
    store = WebStore(tmp_path / "web.sqlite3", clock=waits)
    take = partial(store.take_turn, "p", rate_per_s=0.5, within_s=25.0)
    assert [take(), take()] == [0.0, 2.0]
    waits.now -= 3600  # by NTP, or because a container resumes
    assert [take(), take()] == [4.0, 6.0]  # behind those that wait


def take_turns(path: Path) -> list[float]:
    def clock() -> float:
        time.sleep(0.005)  # between reading the next turn and taking it, when others could read it too
        return 1000.0

    store = WebStore(path, clock=clock)
    return [store.take_turn("p", rate_per_s=1.0, within_s=1e9) or 0.0 for _ in range(5)]


# The cache


def test_results_are_cached_across_restarts(make) -> None:
    first, second = Engine(), Engine([AssertionError("searched again")])
    found = make(first).search(["a", "b", "a"], 3)
    again = make(second)
    assert again.search(["a", "b", "a"], 3) == found and found[0] == found[2]
    assert again.search(["  a\n"], 2) == [found[0][:2]]  # fewer results from the same page
    assert (sorted(first.asked), second.asked) == (["a", "b"], [])
    assert again.take_metrics()["retrieval/from_cache"] == 3


def test_failures_and_empty_results_are_not_cached(make) -> None:
    engine = Engine([RetrievalError("no")])
    retriever = make(engine)
    with pytest.raises(RetrievalError, match="no"):
        retriever.search(["a"], 1)
    assert retriever.search(["a"], 1)[0][0].title == "a"
    assert retriever.search(["nothing"], 1) == retriever.search(["nothing"], 1) == [[]]
    assert engine.asked == ["a", "a", "nothing", "nothing"]


def test_threads_and_processes_may_write_to_the_cache_concurrently(tmp_path: Path) -> None:
    store = WebStore(tmp_path / "web.sqlite3")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: store.put(["k", at % 10], [at % 10]), range(100)))
    code = (
        "import sys; from pathlib import Path; from trl_search.retrieval.web.store import WebStore\n"
        "store = WebStore(Path(sys.argv[1]))\n"
        "print([store.put(['k', at], ['late'] if at < 10 else [at])[0] for at in range(15)])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "web.sqlite3")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate(timeout=600)[0].strip() for run in runs] == [str(list(range(15)))] * 2


def test_the_cache_works_after_a_fork(make) -> None:
    retriever = make(Engine())
    found = retriever.search(["a"], 1)
    child = os.fork()
    if child == 0:
        same = retriever.search(["a"], 1) == found and retriever.search(["b"], 1)[0][0].title == "b"
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_invalid_cache_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"not a database, and long enough to be looked at" * 50)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be the web cache"):
            WebStore(path)


# Pages


def test_readable_pages_replace_snippets(make) -> None:
    fetched: list[str] = []

    async def fetch(url: str) -> str:
        fetched.append(url)
        if url == "https://1.example":
            raise PageError("is application/pdf")
        return f"text of {url} " * 100

    retriever = make(Engine(), pages=True, page_chars=30, fetch=fetch)
    (found,) = retriever.search(["a"], 3)
    assert [passage.text for passage in found] == [
        "text of https://0.example text"[:30], "a", "text of https://2.example text"[:30],
    ]  # fmt: skip
    assert retriever.take_metrics()["retrieval/page_failures"] == 1
    assert make(Engine(), pages=True, page_chars=30, fetch=fetch).search(["a", "b"], 3)[0] == found
    assert len(fetched) == 3  # another query with the same results fetches neither the pages nor the failed one again


def test_a_page_with_a_temporary_error_is_tried_again(make) -> None:
    pages: list[Any] = [PageError("not read within 10 s", passing=True), "text of the page"]

    async def fetch(url: str) -> str:
        page = pages.pop(0)
        if isinstance(page, PageError):
            raise page
        return page

    retriever = make(Engine(), pages=True, fetch=fetch)
    assert [retriever.search(["a"], 1)[0][0].text for _ in range(3)] == ["a", "text of the page", "text of the page"]
    assert retriever.take_metrics()["retrieval/page_failures"] == 1


class Wiki(Engine):
    """Finds a page of each of two sites."""

    async def search(self, client: httpx.AsyncClient, query: str, count: int) -> list[WebHit]:
        return [WebHit(query, f"https://{site}.example/{query}", "snippet") for site in ("wiki", "news")]


def test_few_pages_of_a_site_and_in_all_are_fetched_at_a_time(make, monkeypatch) -> None:
    """Each batch of searches had its own limit on all pages: too low for one, and too high for eight."""
    fetching: Counter[str] = Counter()
    most: Counter[str] = Counter()
    monkeypatch.setattr(page_gates, "PAGES_PER_HOST", 2)
    monkeypatch.setattr(page_gates, "PAGES_AT_ONCE", 3)

    async def fetch(url: str) -> str:
        site = httpx.URL(url).host
        fetching[site] += 1
        most[site] = max(most[site], fetching[site])
        most["all"] = max(most["all"], fetching.total())
        await asyncio.sleep(0.02)
        fetching[site] -= 1
        return url

    retriever = make(Wiki(), pages=True, fetch=fetch)

    async def four_batches() -> None:
        await asyncio.gather(*(retriever.search_async([f"{at}", f"{at}0", f"{at}00"], 2) for at in range(1, 5)))

    asyncio.run(four_batches())
    assert most == {"wiki.example": 2, "news.example": 2, "all": 3}


def test_a_page_whose_site_is_busy_is_left_out_once_it_could_not_be_fetched_in_time(make, monkeypatch) -> None:
    """It waited ten seconds whatever the search had taken, so that the search and all others of its batch failed."""
    monkeypatch.setattr(page_gates, "PAGES_PER_HOST", 1)

    async def texts() -> list[str]:
        begun, ends = asyncio.Event(), asyncio.Event()

        async def fetch(url: str) -> str:
            if "wiki" in url:
                begun.set()
                await ends.wait()
            return url

        retriever = make(Wiki(), pages=True, fetch=fetch, patience_s=PageLimits.timeout_s)
        slow = asyncio.create_task(retriever.search_async(["slow"], 1))
        await begun.wait()
        async with asyncio.timeout(5):
            (passages,) = await retriever.search_async(["late"], 2)
        ends.set()
        assert (await slow)[0][0].text == "https://wiki.example/slow"
        assert retriever.take_metrics()["retrieval/page_failures"] == 1
        return [passage.text for passage in passages]

    assert asyncio.run(texts()) == ["snippet", "https://news.example/late"]


def test_pages_that_no_longer_fit_into_the_patience_are_left_out(make, monkeypatch) -> None:
    """All pages were fetched, however many, and the whole batch of searches timed out."""
    monkeypatch.setattr(page_gates, "PAGES_AT_ONCE", 2)

    async def texts() -> Counter[str]:
        async def fetch(url: str) -> str:
            while retriever._counts["page_failures"] < 2:
                await asyncio.sleep(0.001)
            return "page"

        retriever = make(Wiki(), pages=True, fetch=fetch, patience_s=PageLimits.timeout_s)
        async with asyncio.timeout(5):
            found = await retriever.search_async(["one", "two"], 2)
        return Counter(passage.text for passages in found for passage in passages)

    assert asyncio.run(texts()) == {"page": 2, "snippet": 2}


def test_for_a_page_on_a_private_address_the_snippet_is_kept(make) -> None:
    class Trap(Engine):
        async def search(self, client: httpx.AsyncClient, query: str, count: int) -> list[WebHit]:
            return [WebHit("Trap", "http://169.254.169.254/latest/meta-data", "snippet")]

    retriever = make(Trap(), pages=True)
    assert retriever.search(["a"], 1)[0][0].text == "snippet"
    assert retriever.take_metrics()["retrieval/page_failures"] == 1


# The contract of every retriever, and user errors


def test_strange_queries_have_a_defined_result(make) -> None:
    engine = Engine()
    retriever = make(engine)
    assert retriever.search([], 1) == []
    assert retriever.search(["", "  \n"], 1) == [[], []]
    (found,) = retriever.search(["Orlune " * 15_000 + "\ud800"], 2)
    assert len(found) == 2 and all(len(query) <= 400 for query in engine.asked)
    with pytest.raises(ValueError, match="k is"):
        retriever.search(["a"], 0)
    with pytest.raises(TypeError, match=r"pass \[query\]"):
        retriever.search("a", 1)
    retriever.close()
    retriever.close()
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["a"], 1)


def test_the_web_retriever_is_loaded_by_name(tmp_path: Path) -> None:
    with serving(lambda asked: Said(SEARXNG)) as server:
        retriever = load_retriever("web", provider="searxng", base_url=server.url, cache=tmp_path / "web.sqlite3")
        assert retriever.search(["orlune"], 2) == [FOUND]
        retriever.close()
    with sqlite3.connect(tmp_path / "web.sqlite3") as connection:
        assert KEY not in "".join(str(row) for row in connection.execute("SELECT * FROM answers"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "serpr"}, "did you mean 'serper'"),
        ({"provider": "searxng"}, "SEARXNG_URL"),
        ({"provider": "searxng", "base_url": "localhost:8080"}, "not the address of searxng"),
        ({"provider": "searxng", "base_url": "http://[::1"}, "not the address of searxng"),
        ({"provider": "brave"}, "set the environment variable BRAVE_API_KEY"),
        ({"provider": "serper", "rate_per_s": 0}, "above 0"),
        ({"provider": "ddgs", "base_url": "http://a"}, "no base_url"),
    ],
)
def test_mistakes_are_reported(options: dict[str, Any], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("BRAVE_API_KEY")
    with pytest.raises(UserError, match=message):
        load_retriever("web", cache=tmp_path / "web.sqlite3", **options)
