"""Reciprocal-rank fusion: the formula, ties, parts that disagree or fail, and concurrent search."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import FixedRetriever
from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, Retriever, load_retriever
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.batching import SearchBatcher
from trl_search.retrieval.combine.hybrid import HybridRetriever, fuse
from trl_search.retrieval.threads import MAX_HUNG
from trl_search.types import Passage


def ranking(ids: str, text: str = "") -> list[Passage]:
    return [Passage(identity, "", text, score=99.0 - rank) for rank, identity in enumerate(ids)]


def ids(found: Sequence[Passage]) -> str:
    return "".join(passage.id for passage in found)


def hybrid(*rankings: str, **options: object) -> Retriever:
    return load_retriever("hybrid", retrievers=[FixedRetriever(ranking(each)) for each in rankings], **options)


class Awaited(FixedRetriever):
    """Has only the async search."""

    def __init__(self, passages: Sequence[Passage], *, seconds: float = 0.0, fails: bool = False) -> None:
        super().__init__(passages)
        self.wait_s, self.fails, self.cancelled = seconds, fails, False

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        raise AssertionError("searched on a thread")

    async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        try:
            await asyncio.sleep(self.wait_s)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.fails:
            raise Unavailable("port 8000 is closed")
        return [self.passages[:k] for _ in queries]


# The fusion


def test_the_score_follows_the_paper() -> None:
    (found,) = hybrid("abc", "bda").search(["?"], k=10)
    assert ids(found) == "badc"
    assert [passage.score for passage in found] == pytest.approx(
        [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 1 / 63], rel=1e-12
    )


def test_weights_count() -> None:
    assert ids(hybrid("ab", "cd", weights=[1, 2]).search(["?"], k=4)[0]) == "cdab"
    assert ids(hybrid("ab", "cd", weights=[2, 1]).search(["?"], k=4)[0]) == "abcd"


def test_equal_scores_are_in_the_order_of_the_first_retriever() -> None:
    assert ids(hybrid("ab", "ba").search(["?"], k=2)[0]) == "ab"
    assert ids(hybrid("ba", "ab").search(["?"], k=2)[0]) == "ba"
    assert ids(hybrid("b", "a").search(["?"], k=2)[0]) == "ba"
    # The last bit of 1/61 + 1/62 + 1/67 depends on the order of the sum; the score must not.
    (found,) = hybrid("ab0123c", "bc4567a", "ca89xyb").search(["?"], k=3)
    assert ids(found) == "abc"
    assert len({passage.score for passage in found}) == 1


@given(st.lists(st.permutations("abcdefgh"), min_size=2, max_size=4), st.integers(1, 8))
def test_fusion_keeps_every_passage_once_best_first(rankings: list[list[str]], cut: int) -> None:
    lists = [ranking("".join(each[:cut])) for each in rankings]
    fused = fuse(lists, [1.0] * len(lists))
    assert sorted(ids(fused)) == sorted({passage.id for each in lists for passage in each})
    assert [passage.score for passage in fused] == sorted((passage.score for passage in fused), reverse=True)


def test_if_parts_disagree_about_an_id_the_first_counts() -> None:
    parts = [FixedRetriever(ranking("ab", "old")), FixedRetriever(ranking("bc", "new"))]
    (found,) = load_retriever("hybrid", retrievers=parts).search(["?"], k=3)
    assert [(passage.id, passage.text) for passage in found] == [("b", "old"), ("a", "old"), ("c", "new")]


def test_an_id_that_one_part_finds_twice_counts_once() -> None:
    (found,) = hybrid("aba", "b").search(["?"], k=9)
    assert ids(found) == "ba"
    assert found[1].score == pytest.approx(1 / 61)


def test_a_small_k_gives_the_first_results_of_a_large_k() -> None:
    retriever = hybrid("abcdefgh", "hgfedcba", "eh", depth=8)
    (everything,) = retriever.search(["?"], k=8)
    assert all(retriever.search(["?"], k=k) == [everything[:k]] for k in range(1, 9))


def test_every_part_searches_with_the_larger_of_depth_and_k() -> None:
    asked: list[int] = []

    class Asked(FixedRetriever):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            asked.append(k)
            return super().search(queries, k)

    retriever = HybridRetriever([Asked([]), Asked([])], depth=7)
    retriever.search(["?"], k=3)
    retriever.search(["?"], k=30)
    assert asked == [7, 7, 30, 30]


# The parts


def test_parts_are_searched_concurrently() -> None:
    both = threading.Barrier(2, timeout=120)  # one after the other, the first would time out here

    class Meeting(FixedRetriever):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            both.wait()
            return super().search(queries, k)

    retriever = HybridRetriever([Meeting(ranking("a")), Meeting(ranking("b"))])
    assert ids(retriever.search(["?"], k=2)[0]) == "ab"
    assert ids(asyncio.run(retriever.search_async(["?"], k=2))[0]) == "ab"


def test_async_parts_are_awaited() -> None:
    async def rollout() -> list[Passage]:
        retriever = HybridRetriever([FixedRetriever(ranking("ab")), Awaited(ranking("bc"))])
        batcher = SearchBatcher(retriever, timeout_s=10)
        try:
            return await batcher.search("?", 3)
        finally:
            await batcher.aclose()

    assert ids(asyncio.run(rollout())) == "bac"


def test_a_part_that_fails_fails_the_search() -> None:
    retriever = load_retriever(
        "hybrid", retrievers=[FixedRetriever(ranking("a")), FixedRetriever(ranking("b"), poison="fire")]
    )
    with pytest.raises(RetrievalError, match="on fire"):
        retriever.search(["fire"], k=1)
    assert ids(retriever.search(["water"], k=2)[0]) == "ab"


def test_an_awaited_part_that_fails_fails_the_search_and_stops_the_others() -> None:
    slow = Awaited([], seconds=60)
    retriever = HybridRetriever([slow, Awaited([], fails=True)])
    started = time.monotonic()
    with pytest.raises(Unavailable, match="port 8000 is closed"):
        asyncio.run(retriever.search_async(["?"], k=1))
    assert slow.cancelled and time.monotonic() - started < 30


def test_a_part_that_always_hangs_is_no_longer_called() -> None:
    released = threading.Event()

    class Hanging(FixedRetriever):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            self.batches.append(list(queries))
            released.wait(60)
            return [self.passages[:k] for _ in queries]

    hanging = Hanging(ranking("b"))
    retriever = HybridRetriever([FixedRetriever(ranking("a")), hanging])

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(retriever.search_async(["?"], k=1), 0.1)

    async def scenario() -> None:
        for _ in range(MAX_HUNG):
            await give_up()
        with pytest.raises(Unavailable, match=f"the retriever hangs: {MAX_HUNG} calls have not returned"):
            await retriever.search_async(["?"], k=1)
        assert len(hanging.batches) == MAX_HUNG

    async def until_it_is_back() -> list[Passage]:
        while True:
            try:
                return (await retriever.search_async(["?"], k=2))[0]
            except Unavailable:
                await asyncio.sleep(0.01)

    try:
        asyncio.run(scenario())
    finally:
        released.set()
    assert ids(asyncio.run(asyncio.wait_for(until_it_is_back(), 120))) == "ab"


def test_a_part_that_loses_a_query_fails_the_search() -> None:
    class Lossy(FixedRetriever):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            return super().search(queries[1:], k)

    with pytest.raises(RetrievalError, match="Lossy returned 1 results for 2 queries"):
        HybridRetriever([FixedRetriever([]), Lossy([])]).search(["a", "b"], k=1)


def test_metrics_are_those_of_all_parts() -> None:
    class Counting(FixedRetriever):
        def take_metrics(self) -> dict[str, float]:
            return {"retrieval/requests": 2.0, "retrieval/latency_max_s": self.seconds, "retrieval/latency_p50_s": 1.0}

    retriever = HybridRetriever([Counting([], seconds=0.5), Counting([], seconds=0.25), FixedRetriever([])])
    assert retriever.take_metrics() == {
        "retrieval/requests": 4.0,
        "retrieval/latency_max_s": 0.5,
        "retrieval/latency_p50_s": 1.0,
    }


def test_closing_closes_every_part() -> None:
    closed: list[str] = []

    class Closing(FixedRetriever):
        def close(self) -> None:
            closed.append("part")

    retriever = HybridRetriever([Closing([]), Closing([])])
    retriever.close()
    assert closed == ["part"] * 2
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["?"], k=1)


# Options


def test_parts_are_loaded_by_kind() -> None:
    world = [Passage("1", "", "harbour"), Passage("2", "", "lantern")]
    retriever = load_retriever(
        "hybrid",
        retrievers=[
            {"kind": "bm25", "passages": world, "backend": "numpy"},
            {"kind": "bm25", "passages": world, "backend": "numpy", "stemmer": None},
        ],
    )
    assert ids(retriever.search(["lantern"], k=2)[0]) == "2"


def test_if_a_part_cannot_be_loaded_only_the_loaded_parts_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    class Closing(FixedRetriever):
        def close(self) -> None:
            closed.append(ids(self.passages))

    monkeypatch.setattr("trl_search.retrieval.bm25.retriever.load", lambda: Closing(ranking("l")))
    with pytest.raises(UserError, match="did you mean 'bm25'"):
        load_retriever("hybrid", retrievers=[Closing(ranking("g")), {"kind": "bm25"}, {"kind": "bm52"}])
    assert closed == ["l"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrievers": []}, "two or more retrievers; got 0"),
        ({"retrievers": [{"kind": "bm25"}]}, "two or more retrievers; got 1"),
        ({"retrievers": "bm25"}, "hybrid needs a list"),
        ({"retrievers": [{}, {}]}, "part 1 of hybrid must be a retriever, or options with its kind"),
        ({"retrievers": [{}, {}], "weights": [1]}, "a weight for each of its 2 retrievers; got 1"),
        ({"retrievers": [{}, {}], "weights": [1, 0]}, "must be above 0.*leave it out"),
        ({"retrievers": [{}, {}], "weights": [1, float("nan")]}, "must be above 0"),
        ({"retrievers": [{}, {}], "depth": 0}, "depth=0 must be at least 1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_retriever("hybrid", **options)
