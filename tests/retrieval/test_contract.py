"""The contract of every kind of retriever. A new kind adds one function to `KINDS` and must pass all these tests."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support import rerank_servers
from tests.support.encoders import HAS_MINILM, minilm, minilm_encoder
from tests.support.opensearch_server import OpenSearchServer
from tests.support.servers import Asked, Said, Server, retrieve_from
from trl_search.retrieval import Retriever, load_retriever
from trl_search.retrieval.index.folder import build_index
from trl_search.retrieval.remote.wire import Limits
from trl_search.retrieval.web.retriever import WebRetriever
from trl_search.types import Passage

WORLD = [
    Passage("p0", "Mira Talvane", "Mira Talvane is a novelist born in Orlune."),
    Passage("p1", "Orlune", "Orlune is a harbour town in Vesk.", url="https://example.org/orlune"),
    Passage("p2", "Vesk", "Vesk is a country with many harbours."),
    # Three copies: their scores are equal, so they come in corpus order.
    Passage("c", "Copy", "The lantern festival of Orlune."),
    Passage("a", "Copy", "The lantern festival of Orlune."),
    Passage("b", "Copy", "The lantern festival of Orlune."),
    Passage("p6", "", "?!"),
    Passage("p7", "Karsic & Sons", "Karsic & Sons was founded by Ade Karsic in 1904."),
]
QUERIES = ["where was Mira Talvane born?", "lantern festival", "country with harbours", "Karsic", "Orlune"]

HAS_QDRANT, HAS_OPENSEARCH = (importlib.util.find_spec(name) is not None for name in ("qdrant_client", "opensearchpy"))


def bm25_in_memory(passages: list[Passage], folder: Path) -> Retriever:
    return load_retriever("bm25", passages=passages)


def bm25_on_disk(passages: list[Passage], folder: Path) -> Retriever:
    build_index(passages, folder / "index", "bm25")
    return load_retriever("bm25", index=folder / "index")


def dense_in_memory(passages: list[Passage], folder: Path) -> Retriever:
    return load_retriever("dense", passages=passages, encoder=minilm_encoder())


def dense_on_disk(passages: list[Passage], folder: Path) -> Retriever:
    build_index(passages, folder / "index", "dense", encoder=minilm())
    return load_retriever("dense", index=folder / "index")


def http_over_bm25(passages: list[Passage], folder: Path) -> Retriever:
    serves = retrieve_from(bm25_in_memory(passages, folder), Limits(max_query_chars=200_000, max_topk=10_000))
    return load_retriever("http", url=Server(serves).url)  # its thread is a daemon: it ends with the tests


def http_over_a_server_of_one_query(passages: list[Passage], folder: Path) -> Retriever:
    """Like SkyRL's example server: FastAPI with one required `query`, and documents without a URL."""
    serves = retrieve_from(bm25_in_memory(passages, folder), Limits(max_query_chars=200_000, max_topk=10_000))

    def answer(asked: Asked) -> Said:
        if "query" not in asked.json:
            return Said({"detail": [{"type": "missing", "loc": ["body", "query"], "msg": "Field required"}]}, 422)
        return serves(asked)

    return load_retriever("http", url=Server(answer).url)


def bm25_tantivy(passages: list[Passage], folder: Path) -> Retriever:
    build_index(passages, folder / "tantivy", "bm25", engine="tantivy")
    return load_retriever("bm25", index=folder / "tantivy")


def hybrid_of_bm25_twice(passages: list[Passage], folder: Path) -> Retriever:
    parts = [bm25_tantivy(passages, folder), {"kind": "bm25", "passages": passages, "backend": "numpy"}]
    return load_retriever("hybrid", retrievers=parts)


def rerank_of_bm25(passages: list[Passage], folder: Path) -> Retriever:
    _, url, _ = rerank_servers.start(rerank_servers.jina)  # its thread is a daemon: it ends with the tests
    return load_retriever("rerank", retriever={"kind": "bm25", "passages": passages, "backend": "numpy"}, url=url)


def qdrant_sparse(passages: list[Passage], folder: Path) -> Retriever:
    build_index(passages, folder / "qdrant", "qdrant", path=str(folder / "engine"), vectors="sparse")
    return load_retriever("qdrant", index=folder / "qdrant")


def qdrant_dense(passages: list[Passage], folder: Path) -> Retriever:
    with pytest.MonkeyPatch.context() as patch:  # loaded once for all tests
        patch.setattr("trl_search.retrieval.dense.corpus_vectors.load_encoder", lambda *_, **__: minilm_encoder())
        build_index(passages, folder / "qdrant", "qdrant", path=str(folder / "engine"), encoder=minilm())
    return load_retriever("qdrant", index=folder / "qdrant", encoder=minilm_encoder())


def opensearch(passages: list[Passage], folder: Path) -> Retriever:
    server = OpenSearchServer()  # its thread is a daemon: it ends with the tests
    build_index(passages, folder / "opensearch", "opensearch", url=server.url, collection="world")
    return load_retriever("opensearch", url=server.url, collection="world")


def web_over_bm25(passages: list[Passage], folder: Path) -> Retriever:
    engine = bm25_in_memory(passages, folder)

    def searxng(asked: Asked) -> Said:
        query = parse_qs(urlsplit(asked.target).query)["q"]
        (found,) = engine.search(query, len(passages))
        results = [{"title": one.title, "url": one.id, "content": one.text} for one in found]
        return Said({"results": results, "unresponsive_engines": []})

    url = Server(searxng).url  # its thread is a daemon: it ends with the tests
    return load_retriever("web", provider="searxng", base_url=url, cache=folder / "web.sqlite3", rate_per_s=1000.0)


KINDS: dict[str, Callable[[list[Passage], Path], Retriever]] = {
    "bm25_in_memory": bm25_in_memory,
    "bm25_on_disk": bm25_on_disk,
    "bm25_tantivy": bm25_tantivy,
    "hybrid": hybrid_of_bm25_twice,
    "rerank": rerank_of_bm25,
    "http": http_over_bm25,
    "http_one_query": http_over_a_server_of_one_query,
    "web": web_over_bm25,
    **({"dense_in_memory": dense_in_memory, "dense_on_disk": dense_on_disk} if HAS_MINILM else {}),
    **({"qdrant_sparse": qdrant_sparse} if HAS_QDRANT else {}),
    **({"qdrant_dense": qdrant_dense} if HAS_QDRANT and HAS_MINILM else {}),
    **({"opensearch": opensearch} if HAS_OPENSEARCH else {}),
}


@pytest.fixture(scope="module", params=KINDS)
def retriever(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Retriever]:
    """One retriever per kind for all tests, because building and opening an index takes time."""
    made = KINDS[request.param](WORLD, tmp_path_factory.mktemp(request.param))
    yield made
    made.close()


def test_results_are_in_the_order_of_queries_best_first(retriever: Retriever) -> None:
    found = retriever.search(QUERIES, k=3)
    assert [passages[0].id for passages in found] == ["p0", "c", "p2", "p7", "p1"]
    for passages in found:
        assert len(passages) <= 3
        assert [passage.score for passage in passages] == sorted((p.score for p in passages), reverse=True)


def test_results_are_complete_passages(retriever: Retriever) -> None:
    (found,) = retriever.search(["Orlune"], k=len(WORLD))
    by_id = {passage.id: passage for passage in WORLD}
    for passage in found:
        original = by_id[passage.id]
        url = (
            passage.id if isinstance(retriever, WebRetriever) else original.url
        )  # on the web, id and url are the same
        assert (passage.title, passage.text, passage.url) == (original.title, original.text, url)


def test_equal_scores_are_in_corpus_order_at_every_k(retriever: Retriever) -> None:
    for k in range(1, 4):
        (found,) = retriever.search(["lantern festival"], k=k)
        assert [passage.id for passage in found] == ["c", "a", "b"][:k]


def test_a_result_does_not_depend_on_what_else_is_in_the_batch(retriever: Retriever) -> None:
    together = retriever.search([*QUERIES, "", *reversed(QUERIES)], k=4)
    alone = [retriever.search([query], k=4)[0] for query in QUERIES]
    assert together == [*alone, [], *reversed(alone)]


@pytest.mark.parametrize("query", ["", "   ", "?!", "\n\0"])
def test_a_query_without_words_finds_nothing_in_any_batch(retriever: Retriever, query: str) -> None:
    assert retriever.search([query], k=3) == [[]]
    first, last = retriever.search([query, "Karsic"], k=3), retriever.search(["Karsic", query], k=3)
    assert first == last[::-1] == [[], retriever.search(["Karsic"], k=3)[0]]


@pytest.mark.parametrize(
    "query", ["Orlune " * 15_000, "Orlune\ud800", "Orlune \U0001f30a كتاب 灯", "Orlune" + "x" * 100_000]
)
def test_a_strange_query_has_a_result(retriever: Retriever, query: str) -> None:
    (found,) = retriever.search([query], k=2)
    assert len(found) <= 2


def test_k_may_exceed_the_corpus(retriever: Retriever) -> None:
    (found,) = retriever.search(["Orlune"], k=10_000)
    assert 0 < len(found) <= len(WORLD)


def test_an_empty_batch_is_an_empty_result(retriever: Retriever) -> None:
    assert retriever.search([], k=3) == []


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(retriever: Retriever, k: int) -> None:
    with pytest.raises(ValueError, match="k "):
        retriever.search(QUERIES, k=k)


def test_one_string_is_not_a_batch_of_letters(retriever: Retriever) -> None:
    with pytest.raises(TypeError, match=r"pass \[query\]"):
        retriever.search("Orlune", k=3)


def test_threads_get_what_one_thread_gets(retriever: Retriever) -> None:
    expected = retriever.search(QUERIES, k=3)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(lambda _: retriever.search(QUERIES, k=3), range(64)))


@pytest.mark.parametrize("kind", KINDS)
def test_closing_twice_is_safe(kind: str, tmp_path: Path) -> None:
    retriever = KINDS[kind](WORLD, tmp_path)
    retriever.close()
    retriever.close()
