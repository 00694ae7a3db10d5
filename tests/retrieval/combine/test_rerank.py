"""Reranking: a local cross-encoder, servers of both APIs, and each query scored with its own passages only."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import FixedRetriever
from tests.support.rerank_servers import Answer, jina, serving, shared_words, tei
from tests.support.servers import Said, endless
from tests.support.servers import serving as http_serving
from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, Retriever, base, load_retriever
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.combine.rerank import CrossEncoderScorer, RerankRetriever
from trl_search.types import Passage

TEXTS = [
    "A harbour town in Vesk.",
    "The lantern festival of Orlune.",
    "Mira Talvane was born in Orlune.",
    "The lantern festival of Orlune.",
    "Karsic founded the lantern works of Orlune in 1904.",
]
WORLD = [Passage(str(row), "", text, score=9.0 - row) for row, text in enumerate(TEXTS)]


def ids(found: Sequence[Passage]) -> str:
    return "".join(passage.id for passage in found)


class ByQuery(Retriever):
    """Returns fixed passages for each query."""

    def __init__(self, found: dict[str, list[Passage]]) -> None:
        self.found = found

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [self.found[query][:k] for query in queries]


# A cross-encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cross-encoder with random weights, like the published ones: BERT with one logit and a sigmoid."""
    pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("cross-encoder")
    words = sorted({word.strip(".").lower() for text in TEXTS for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    CrossEncoder(str(folder), device="cpu").save_pretrained(str(folder / "saved"))
    return folder / "saved"


def test_a_cross_encoder_ranks_by_its_logits(model: Path) -> None:
    from sentence_transformers import CrossEncoder

    retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), model=str(model), device="cpu")
    queries = ["Where was Mira Talvane born?", "lantern", "a harbour in Vesk?"]
    reference = CrossEncoder(str(model), device="cpu")
    for query, found in zip(queries, retriever.search(queries, k=5), strict=True):
        probabilities = reference.predict([(query, text) for text in TEXTS])
        assert ids(found) == "".join(str(row) for row in sorted(range(5), key=lambda row: (-probabilities[row], row)))
        for passage in found:
            expected = probabilities[int(passage.id)]
            assert 1 / (1 + 2.718281828459045**-passage.score) == pytest.approx(expected, abs=1e-4)
        assert len({passage.score for passage in found}) == 4  # the two copies have the same score
        assert ids(found).index("1") + 1 == ids(found).index("3")


def test_all_pairs_of_a_batch_are_scored_in_one_call(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = CrossEncoderScorer(str(model), device="cpu")
    predict, asked = scorer.model.predict, []

    def watched(pairs: list[tuple[str, str]], **options: Any) -> Any:
        asked.append(list(pairs))
        return predict(pairs, **options)

    monkeypatch.setattr(scorer.model, "predict", watched)
    retriever = RerankRetriever(ByQuery({"a": WORLD[:2], "b": WORLD[2:], "none": []}), scorer)
    retriever.search(["a", "none", "b"], k=1)
    assert asked == [
        [("a", TEXTS[0]), ("a", TEXTS[1]), ("b", TEXTS[2]), ("b", TEXTS[3]), ("b", TEXTS[4])]
    ]  # each query with its own texts
    retriever.search(["none"], k=1)
    assert len(asked) == 1


def test_a_result_does_not_depend_on_what_else_is_in_the_batch(model: Path) -> None:
    retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), model=str(model), batch_size=3, device="cpu")
    queries = ["lantern", "Where was Mira Talvane born in Orlune the works of 1904?", "vesk", "town"]
    alone = [retriever.search([query], k=5)[0] for query in queries]
    for found, expected in zip(retriever.search(queries, k=5), alone, strict=True):
        assert ids(found) == ids(expected)
        assert [passage.score for passage in found] == pytest.approx([p.score for p in expected], abs=2e-4)


def test_threads_and_strange_queries(model: Path) -> None:
    retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), model=str(model), device="cpu")
    queries = ["", "Orlune\ud800", "lantern " * 20_000, "\0 灯"]
    expected = retriever.search(queries, k=3)
    assert all(len(found) == 3 for found in expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(map(expected.__eq__, pool.map(lambda _: retriever.search(queries, k=3), range(8))))


def test_a_missing_model_and_a_model_that_is_not_a_reranker_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere' cannot be loaded"):
        load_retriever("rerank", retriever=FixedRetriever(WORLD), model=str(tmp_path / "nowhere"))
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(model, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="gives 3 numbers per pair"):
        load_retriever("rerank", retriever=FixedRetriever(WORLD), model=str(tmp_path / "three"))
    for file in ("config.json", "model.safetensors"):
        shutil.copy(model / file, tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_retriever("rerank", retriever=FixedRetriever(WORLD), model=str(tmp_path))


# A server


@pytest.mark.parametrize("api", ["jina", "tei"])
def test_a_server_ranks_by_its_scores_and_each_query_has_its_own_passages(api: str) -> None:
    found = {"where was Talvane born": WORLD[:3], "lantern festival": WORLD[1:], "none": []}
    with serving({"jina": jina, "tei": tei}[api]) as (url, asked):
        retriever = load_retriever("rerank", retriever=ByQuery(found), url=url, api=api)
        first, second, none = retriever.search(list(found), k=2)
        assert [(passage.id, passage.score) for passage in first] == [("2", 3.0), ("0", 0.0)]
        assert [(passage.id, passage.score) for passage in second] == [("1", 2.0), ("3", 2.0)]
        assert none == []
        documents = "documents" if api == "jina" else "texts"
        assert sorted((body["query"], body[documents]) for _, body in asked) == [
            ("lantern festival", TEXTS[1:]),
            ("where was Talvane born", TEXTS[:3]),
        ]


def test_the_requests_to_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_TOKEN", "secret")
    titled = FixedRetriever([Passage("1", "Orlune", "A town.")])
    with serving(jina) as (url, asked):
        options = {"model": "reranker-v2", "token_env": "RERANK_TOKEN", "fields": {"truncate_prompt_tokens": -1}}
        load_retriever("rerank", retriever=titled, url=url, **options).search(["town\ud800"], k=1)
        ((headers, body),) = asked
        assert headers["Authorization"] == "Bearer secret"
        assert body == {
            "model": "reranker-v2",
            "query": "town?",
            "documents": ["Orlune\nA town."],
            "top_n": 1,
            "truncate_prompt_tokens": -1,
        }
    with serving(tei) as (url, asked):
        load_retriever("rerank", retriever=titled, url=url, api="tei").search(["town"], k=1)
        assert asked[0][1] == {"query": "town", "texts": ["Orlune\nA town."], "raw_scores": True, "truncate": True}


def test_more_documents_than_a_server_accepts_are_split() -> None:
    world = [Passage(str(row), "", "lantern " if row in (3, 40, 69) else "harbour") for row in range(70)]
    with serving(tei) as (url, asked):
        retriever = load_retriever("rerank", retriever=FixedRetriever(world), url=url, api="tei", depth=70)
        assert [passage.id for passage in retriever.search(["lantern"], k=4)[0]] == ["3", "40", "69", "0"]
        assert sorted(len(body["texts"]) for _, body in asked) == [6, 32, 32]


def test_depth_or_k_are_fetched_and_k_returned() -> None:
    with serving(jina) as (url, asked):
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=url, depth=3)
        assert [len(retriever.search(["lantern"], k=k)[0]) for k in (1, 3, 5)] == [1, 3, 5]
        assert [len(body["documents"]) for _, body in asked] == [3, 3, 5]


def test_requests_of_a_batch_are_sent_concurrently() -> None:
    together = threading.Barrier(4, timeout=120)

    def answer(body: dict[str, Any]) -> Answer:
        together.wait()
        return jina(body)

    with serving(answer) as (url, _):
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=url, concurrency=4)
        assert len(retriever.search(["a", "b", "c", "d"], k=1)) == 4


def test_temporary_server_errors_are_retried_and_then_fail_the_search() -> None:
    answers = iter([503, 429, 200])

    def recovers(body: dict[str, Any]) -> Answer:
        status = next(answers)
        return jina(body) if status == 200 else (status, "busy")

    with serving(recovers) as (url, _):
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=url)
        assert ids(retriever.search(["harbour"], k=1)[0]) == "0"
    with serving(lambda body: (502, "no upstream")) as (url, asked):
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=url)
        with pytest.raises(Unavailable, match=r"answered 502.*no upstream"):
            retriever.search(["harbour"], k=1)
        assert len(asked) == 3
    with pytest.raises(Unavailable, match="Connect"):
        load_retriever("rerank", retriever=FixedRetriever(WORLD), url=url).search(["harbour"], k=1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((422, {"error": "`texts` is missing"}), "answered 422.*`texts` is missing"),
        ((200, b"<html>"), "did not return a reranking of 5 documents.*<html>"),
        ((200, {"results": []}), "did not return a reranking of 5 documents"),
        ((200, [{"index": 0, "score": 1.0}]), "did not return a reranking of 5 documents.*is api right"),
        ((200, {"results": [{"index": 0, "relevance_score": 1.0}] * 5}), "did not return a reranking of 5 documents"),
        (
            (200, {"results": [{"index": row, "relevance_score": "high"} for row in range(5)]}),
            "did not return a reranking",
        ),
        (
            (200, {"results": [{"index": row % 5, "relevance_score": row} for row in range(6)]}),
            "did not return a reranking",
        ),
        (
            (200, {"results": [{"index": row + 1, "relevance_score": 1.0} for row in range(5)]}),
            "did not return a reranking",
        ),
        (
            (200, {"results": [{"index": row, "relevance_score": 10**400} for row in range(5)]}),
            "did not return a reranking",
        ),
        (
            (200, {"results": [{"index": row, "relevance_score": float("nan")} for row in range(5)]}),
            "not a finite number",
        ),
    ],
)
def test_an_invalid_answer_fails_the_search_at_once(answer: Answer, message: str) -> None:
    with serving(lambda body: answer) as (url, asked):
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=url)
        with pytest.raises(RetrievalError, match=message) as raised:
            retriever.search(["harbour"], k=1)
        assert len(asked) == 1 and "harbour" not in str(raised.value)  # servers log it, but not queries


@pytest.mark.parametrize(
    ("headers", "message"),
    [({"Content-Encoding": "gzip"}, "not compressed as"), ({"Content-Type": "text/plain; charset=idna"}, "oops")],
)
def test_headers_that_do_not_fit_the_answer_fail_the_search(headers: dict[str, str], message: str) -> None:
    with http_serving(lambda asked: Said(b"oops", 404, headers)) as server:
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=server.url)
        with pytest.raises(RetrievalError, match=message):
            retriever.search(["harbour"], k=1)


def test_an_answer_without_an_end_is_given_up() -> None:
    def answer(wfile: Any) -> None:
        wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:  # until the client has gone
            wfile.write(b"1\r\n \r\n")

    with http_serving(lambda asked: Said(by_hand=answer)) as server:
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=server.url, timeout_s=0.2)
        with pytest.raises(Unavailable, match=r"no complete answer in 0\.2 s"):
            retriever.search(["harbour"], k=1)
        assert len(server.asked) == 3


def test_an_answer_that_is_too_long_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(base, "MAX_ANSWER_BYTES", 1 << 20)
    with http_serving(lambda asked: Said(by_hand=endless)) as server:
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD), url=server.url)
        with pytest.raises(RetrievalError, match="longer than 1 MiB"):
            retriever.search(["harbour"], k=1)
        assert len(server.asked) == 1


def test_if_the_retriever_fails_the_reranker_is_not_asked() -> None:
    with serving(jina) as (url, asked):
        retriever = load_retriever("rerank", retriever=FixedRetriever(WORLD, poison="fire"), url=url)
        with pytest.raises(RetrievalError, match="on fire"):
            retriever.search(["fire"], k=1)
        assert not asked
        retriever.close()
        with pytest.raises(RetrievalError, match="closed"):
            retriever.search(["harbour"], k=1)


def test_the_fake_servers_score_by_shared_words() -> None:
    assert shared_words("Where was Talvane born?", TEXTS[2]) == 3


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, 'needs model="cross-encoder'),
        ({"model": "m", "api": "tei"}, "api: of a server, and there is no url"),
        ({"url": "http://a/rerank", "device": "cpu"}, "device: of a local model"),
        ({"url": "http://a/rerank", "api": "tie"}, "unknown reranking api 'tie': did you mean 'tei'"),
        ({"url": "http://a/rerank", "api": "tei", "model": "m"}, "one model and no name for it"),
        ({"url": "a:8000"}, "as http://localhost:8080/rerank"),
        ({"url": "http://[::1/rerank"}, "as http://localhost:8080/rerank"),
        ({"url": "http://a:99999/rerank"}, "as http://localhost:8080/rerank"),
        ({"url": "http://a/rerank", "concurrency": 0}, "at least 1"),
        ({"url": "http://a/rerank", "token_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE.*is not set"),
        ({"url": "http://a/rerank", "depth": 0}, "depth=0 must be at least 1"),
        ({"model": "m", "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"url": "http://a/rerank", "retriever": {"kind": "bm52"}}, "did you mean 'bm25'"),
        ({"url": "http://a/rerank", "retriever": 3}, "part 1 of rerank must be a retriever"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_retriever("rerank", **{"retriever": FixedRetriever(WORLD), **options})


def test_without_sentence_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'trl-search\[dense\]'.*url="):
        load_retriever("rerank", retriever=FixedRetriever(WORLD), model="m")
