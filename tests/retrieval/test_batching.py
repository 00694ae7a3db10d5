"""The search batcher: which queries share a batch, which fail alone, and that nothing waits forever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_search.retrieval import RetrievalError, Retriever
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.batching import SearchBatcher
from trl_search.retrieval.threads import MAX_HUNG
from trl_search.types import Passage

pytestmark = pytest.mark.slow

TIMEOUT_S = 0.9  # for calls that hang; all others take a hundredth of it


class Echo(Retriever):
    """Returns the query `k` times. "poison" raises; "hang" waits until `released`."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s, self.released = delay_s, threading.Event()
        self.batches: list[list[str]] = []

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.batches.append(list(queries))
        time.sleep(self.delay_s)
        if "poison" in queries:
            raise KeyError("poison")
        if "hang" in queries:
            self.released.wait(200)
        return [[Passage(f"{query}{rank}", "", "") for rank in range(k)] for query in queries]


class AsyncEcho(Echo):
    async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.batches.append(list(queries))
        await asyncio.sleep(self.delay_s)
        while "hang" in queries and not self.released.is_set():
            await asyncio.sleep(0.001)
        if "poison" in queries:
            raise KeyError("poison")
        return [[Passage(f"{query}{rank}", "", "") for rank in range(k)] for query in queries]

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        raise AssertionError("search was called although search_async exists")


@pytest.fixture(params=[Echo, AsyncEcho])
def echo(request: pytest.FixtureRequest) -> Echo:
    made: Echo = request.param()
    return made


def run(
    scenario: Callable[[SearchBatcher], Coroutine[Any, Any, Any]],
    retriever: Retriever,
    timeout_s: float = 60.0,
    **options: Any,
) -> SearchBatcher:
    async def whole() -> SearchBatcher:
        complaints: list[dict[str, Any]] = []  # an exception in a callback, which asyncio would only log
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        batcher = SearchBatcher(retriever, timeout_s=timeout_s, **options)
        await asyncio.wait_for(scenario(batcher), 200)
        await asyncio.wait_for(batcher.aclose(), 60)
        await asyncio.sleep(0)
        assert complaints == []
        return batcher

    return asyncio.run(whole())


async def outcomes(batcher: SearchBatcher, *queries: str, k: int = 1) -> list[str]:
    """For each query, the id of its first passage, or its failure; all are searched concurrently."""
    found = await asyncio.gather(*(batcher.search(query, k) for query in queries), return_exceptions=True)
    return [one[0].id if isinstance(one, list) else repr(one) for one in found]


def test_concurrent_queries_share_one_batch(echo: Echo) -> None:
    async def scenario(batcher: SearchBatcher) -> None:
        assert await outcomes(batcher, "a", "b", "c") == ["a0", "b0", "c0"]

    batcher = run(scenario, echo)
    assert echo.batches == [["a", "b", "c"]]
    assert (batcher.stats.queries, batcher.stats.batches, batcher.stats.failures) == (3, 1, 0)


def test_queries_wait_in_a_batch_while_another_is_searched(echo: Echo) -> None:
    echo.delay_s = 0.15

    async def scenario(batcher: SearchBatcher) -> None:
        asked = [asyncio.create_task(batcher.search("hang", 1))]
        while not echo.batches:
            await asyncio.sleep(0.001)
        for query in "bcd":
            asked.append(asyncio.create_task(batcher.search(query, 1)))
            await asyncio.sleep(0.01)
        echo.released.set()
        await asyncio.gather(*asked)

    started = time.monotonic()
    batcher = run(scenario, echo)
    assert echo.batches == [["hang"], ["b", "c", "d"]]
    assert 0.29 < batcher.stats.seconds < time.monotonic() - started


@pytest.mark.parametrize("turns", range(16))
def test_a_query_that_arrives_when_the_last_batch_ends_is_searched(turns: int) -> None:
    async def later(batcher: SearchBatcher) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await batcher.search("b", 1)

    async def scenario(batcher: SearchBatcher) -> None:
        await asyncio.wait_for(asyncio.gather(batcher.search("a", 1), later(batcher)), 60)

    run(scenario, AsyncEcho(), timeout_s=5)


def test_a_retriever_may_get_several_concurrent_batches(echo: Echo) -> None:
    echo.delay_s, echo.max_concurrent_batches = 0.1, 3

    async def scenario(batcher: SearchBatcher) -> None:
        asked = []
        for number, query in enumerate("abc", start=1):
            asked.append(asyncio.create_task(batcher.search(query, 1)))
            while len(echo.batches) < number:
                await asyncio.sleep(0.001)
        await asyncio.gather(*asked, *(batcher.search(query, 1) for query in "def"))
        assert await outcomes(batcher, *"ghijk") == [f"{query}0" for query in "ghijk"]

    run(scenario, echo, timeout_s=5, max_batch=4)
    assert echo.batches[:4] == [["a"], ["b"], ["c"], ["d", "e", "f"]]
    # These two begin at the same time, on separate threads.
    assert sorted(echo.batches[4:]) == [["g", "h", "i", "j"], ["k"]]


def test_a_hanging_batch_does_not_delay_concurrent_batches(echo: Echo) -> None:
    echo.max_concurrent_batches = 2

    async def scenario(batcher: SearchBatcher) -> None:
        hanging = asyncio.create_task(outcomes(batcher, "hang"))
        await asyncio.sleep(0.01)
        for query in "abc":
            assert await outcomes(batcher, query) == [f"{query}0"]
        assert not hanging.done()
        assert "timed out" in (await hanging)[0]

    run(scenario, echo, TIMEOUT_S)
    echo.released.set()


def test_if_the_service_is_down_queries_are_not_retried_one_by_one() -> None:
    class Down(Echo):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            self.batches.append(list(queries))
            raise Unavailable("nobody listens")

    down = Down()

    async def scenario(batcher: SearchBatcher) -> None:
        assert await outcomes(batcher, "a", "b") == ["Unavailable('nobody listens')"] * 2

    run(scenario, down)
    assert down.batches == [["a", "b"]]


def test_a_single_query_does_not_wait_for_a_timer(echo: Echo) -> None:
    took = []

    async def scenario(batcher: SearchBatcher) -> None:
        for at in range(50):
            started = time.monotonic()
            await batcher.search(f"q{at}", 1)
            took.append(time.monotonic() - started)

    run(scenario, echo)
    assert min(took) < 0.02  # a timer would delay all of them, a busy machine only some
    assert len(echo.batches) == 50


def test_a_batch_is_within_its_maximum_and_has_one_k(echo: Echo) -> None:
    async def scenario(batcher: SearchBatcher) -> None:
        found = await asyncio.gather(*(batcher.search(f"{at}", 1 + at % 2) for at in range(10)))
        assert [len(passages) for passages in found] == [1, 2] * 5

    run(scenario, echo, max_batch=3)
    assert echo.batches == [["0", "2", "4"], ["1", "3", "5"], ["6", "8"], ["7", "9"]]


def test_the_same_query_is_searched_once_while_it_is_in_flight(echo: Echo) -> None:
    echo.delay_s = 0.1

    async def scenario(batcher: SearchBatcher) -> None:
        first = asyncio.create_task(batcher.search("a", 1))
        await asyncio.sleep(0.02)
        assert await outcomes(batcher, "a", "a", "b") == ["a0", "a0", "b0"]
        one, other = await asyncio.gather(batcher.search("c", 1), batcher.search("c", 1))
        assert one == other and one is not other  # the caller may change its list
        assert await outcomes(batcher, "a") == [(await first)[0].id]

    run(scenario, echo)
    assert echo.batches == [["a"], ["b"], ["c"], ["a"]]


def test_a_failing_query_fails_alone(echo: Echo) -> None:
    async def scenario(batcher: SearchBatcher) -> None:
        a, poison, b = await outcomes(batcher, "a", "poison", "b")
        assert (a, b) == ("a0", "b0")
        assert poison.startswith("Crashed") and "KeyError" in poison
        with pytest.raises(RetrievalError) as raised:
            await batcher.search("poison", 1)
        assert isinstance(raised.value.__cause__, KeyError)
        assert await outcomes(batcher, "c") == ["c0"]

    batcher = run(scenario, echo)
    assert echo.batches == [["a", "poison", "b"], ["a"], ["poison"], ["b"], ["poison"], ["c"]]
    assert batcher.stats.failures == 2


def test_a_dead_server_is_not_called_once_per_query() -> None:
    class Dead(Retriever):
        calls = 0

        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            self.calls += 1
            time.sleep(0.05)
            raise RetrievalError("connection refused")

    dead = Dead()

    async def scenario(batcher: SearchBatcher) -> None:
        failures = await outcomes(batcher, *map(str, range(200)))
        assert len(failures) == 200 and all("connection refused" in failure for failure in failures[:2])

    run(scenario, dead, timeout_s=0.3)  # for a batch and all its single queries
    assert dead.calls < 10


def test_a_hanging_call_fails_its_queries_and_delays_no_others(echo: Echo) -> None:
    async def scenario(batcher: SearchBatcher) -> None:
        hanging = asyncio.create_task(outcomes(batcher, "hang", "beside"))
        await asyncio.sleep(0.01)
        assert await outcomes(batcher, "a", "b") == ["a0", "b0"]
        assert all(f"timed out after {TIMEOUT_S} s" in failure for failure in await hanging)

    started = time.monotonic()
    batcher = run(scenario, echo, TIMEOUT_S)
    assert time.monotonic() - started < 30
    assert batcher.stats.failures == 2
    assert echo.batches == [["hang", "beside"], ["a", "b"]]  # after a timeout, queries are not retried one by one
    echo.released.set()


def test_a_late_result_is_ignored() -> None:
    echo = Echo()

    async def scenario(batcher: SearchBatcher) -> None:
        assert "timed out" in (await outcomes(batcher, "hang"))[0]
        echo.released.set()
        await asyncio.sleep(0.05)
        assert await outcomes(batcher, "hang", "a") == ["hang0", "a0"]

    run(scenario, echo, TIMEOUT_S)


def test_a_retriever_that_always_hangs_is_no_longer_called() -> None:
    echo = Echo()

    async def scenario(batcher: SearchBatcher) -> None:
        for _ in range(MAX_HUNG):
            assert "timed out" in (await outcomes(batcher, "hang"))[0]
        assert "calls have not returned" in (await outcomes(batcher, "a"))[0]  # at once: no call is made
        echo.released.set()
        await asyncio.sleep(0.05)
        assert await outcomes(batcher, "a") == ["a0"]

    run(scenario, echo, timeout_s=0.3)


def test_closing_fails_waiting_queries_at_once(echo: Echo) -> None:
    async def scenario(batcher: SearchBatcher) -> None:
        waiting = [asyncio.create_task(outcomes(batcher, query)) for query in ("hang", "a")]
        await asyncio.sleep(0.01)
        waiting.append(asyncio.create_task(outcomes(batcher, "b")))
        await asyncio.sleep(0.01)
        await batcher.aclose()
        failures = [failure for (failure,) in await asyncio.gather(*waiting)]
        assert all(failure.startswith("Unavailable('the search batcher was closed before") for failure in failures)
        with pytest.raises(Unavailable, match="is closed"):
            await batcher.search("c", 1)

    started = time.monotonic()
    run(scenario, echo, timeout_s=200)
    assert time.monotonic() - started < 60
    echo.released.set()


def test_a_hanging_search_does_not_keep_the_process_alive() -> None:
    code = """
import asyncio, threading
from trl_search.retrieval.base import RetrievalError, Retriever
from trl_search.retrieval.batching import SearchBatcher
class Hangs(Retriever):
    def search(self, queries, k):
        threading.Event().wait()
async def main():
    batcher = SearchBatcher(Hangs(), timeout_s=0.05)
    try:
        await batcher.search("a", 1)
    except RetrievalError as error:
        print(error)
    await batcher.aclose()
asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=600, check=True
    )
    assert "timed out" in done.stdout


def test_a_cancelled_caller_does_not_cancel_others(echo: Echo) -> None:
    echo.delay_s = 0.1

    async def scenario(batcher: SearchBatcher) -> None:
        first, second = (asyncio.create_task(batcher.search("a", 1)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert (await second)[0].id == "a0"
        assert first.cancelled()

    run(scenario, echo)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda queries: [[]] * (len(queries) + 1), "returned 2 results for 1 queries"),
        (lambda queries: None, r"returned None: return one list of Passage\(id, title, text\) per query$"),
        (lambda queries: [None], "returned None for a query: return one list of Passage"),
        (lambda queries: ["text"], "returned 'text' for a query: return one list of Passage"),
        (lambda queries: [[{"id": "1", "text": "x"}]], "returned the passage {'id': '1', 'text': 'x'}: return one"),
        (lambda queries: [[Passage("1", "a", 5)]], "returned the passage Passage.*text=5"),
        (
            lambda queries: asyncio.Future(loop=asyncio.new_event_loop()),
            "returned <Future .*, and call an asynchronous search search_async",
        ),
        (lambda queries: sys.exit(3), "SystemExit"),
        (lambda queries: next(iter(())), "StopIteration"),
    ],
)
def test_any_mistake_of_a_retriever_is_a_failed_search(answer: Callable[[Sequence[str]], Any], message: str) -> None:
    class Broken(Retriever):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            found: list[list[Passage]] = [[]] if queries == ["good"] else answer(queries)
            return found

    async def scenario(batcher: SearchBatcher) -> None:
        with pytest.raises(RetrievalError, match=message):
            await batcher.search("a", 1)
        assert await batcher.search("good", 1) == []

    run(scenario, Broken(), timeout_s=2)


def test_a_retriever_that_cancels_itself_is_a_failed_search() -> None:
    class Cancels(AsyncEcho):
        async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            raise asyncio.CancelledError

    async def scenario(batcher: SearchBatcher) -> None:
        with pytest.raises(RetrievalError, match="cancelled its own"):
            await batcher.search("a", 1)

    run(scenario, Cancels())


@settings(max_examples=25)
@given(
    asked=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 3), st.integers(0, 4)), max_size=30),
    max_batch=st.integers(1, 5),
    at_once=st.integers(1, 3),
)
def test_every_caller_gets_its_own_result(asked: list[tuple[str, int, int]], max_batch: int, at_once: int) -> None:
    echo = Echo()
    echo.max_concurrent_batches = at_once

    async def ask(batcher: SearchBatcher, query: str, k: int, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        assert [passage.id for passage in await batcher.search(query, k)] == [f"{query}{rank}" for rank in range(k)]

    async def scenario(batcher: SearchBatcher) -> None:
        await asyncio.gather(*(ask(batcher, *one) for one in asked))

    batcher = run(scenario, echo, timeout_s=5, max_batch=max_batch)
    assert batcher.stats.queries == len(asked)
    assert batcher.stats.batches == len(echo.batches)
    assert all(len(set(batch)) == len(batch) <= max_batch for batch in echo.batches)


@pytest.mark.parametrize(("timeout_s", "max_batch"), [(0, 1), (-1, 1), (1, 0)])
def test_impossible_limits_are_refused(timeout_s: float, max_batch: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        SearchBatcher(Echo(), timeout_s=timeout_s, max_batch=max_batch)


def test_impossible_numbers_of_batches_are_refused() -> None:
    idle = Echo()
    idle.max_concurrent_batches = 0
    with pytest.raises(ValueError, match="Echo has 0"):
        SearchBatcher(idle, timeout_s=1)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused_whatever_the_retriever_does(k: int) -> None:
    """An environment's tool may pass on the policy's k. A user's retriever that does not look at it lost a passage."""

    async def scenario(batcher: SearchBatcher) -> None:
        with pytest.raises(ValueError, match=f"at least 1; got {k}"):
            await batcher.search("a", k)

    run(scenario, Echo())
