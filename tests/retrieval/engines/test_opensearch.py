"""The OpenSearch adapter with a fake server on loopback (`opensearch_server.py`), because no registry that these tests
can use has OpenSearch. The tests check which requests are sent and how each answer is used."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opensearchpy", reason="needs opensearch-py: pip install 'trl-search[opensearch]'")

from tests.support.opensearch_server import SHARDS, OpenSearchServer, error_body
from tests.support.servers import Said, endless
from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, base, load_retriever
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.engines import opensearch, opensearch_build
from trl_search.retrieval.engines.opensearch_build import OpenSearchBuilder
from trl_search.retrieval.index.folder import MANIFEST, build_index
from trl_search.types import Passage

PASSAGES = [Passage(f"p{row}", f"Town {row}", f"harbour word{row}", url=None) for row in range(11)]


@pytest.fixture
def server() -> Iterator[OpenSearchServer]:
    server = OpenSearchServer()
    yield server
    server.kill()


def build(server: OpenSearchServer, folder: Path, corpus: Any = PASSAGES, **options: Any) -> Path:
    build_index(corpus, folder / "index", "opensearch", url=server.url, collection="wiki", **options)
    return folder / "index"


def test_an_index_is_created_loaded_and_only_then_searchable(server: OpenSearchServer, tmp_path: Path) -> None:
    index = build(server, tmp_path, shards=6, replicas=2, analyzer="german")
    made = next(one.json for one in server.asked if one.method == "PUT" and one.target == "/wiki")
    assert made["settings"]["index"] == {"number_of_shards": 6, "number_of_replicas": 1, "refresh_interval": "-1"}
    fields = made["mappings"]["properties"]
    assert fields["contents"]["analyzer"] == "german"
    assert fields["title"]["copy_to"] == fields["text"]["copy_to"] == "contents"
    assert server.indices["wiki"]["settings"]["index"]["refresh_interval"] == "1s"
    last = server.asked[-1]
    assert last.target.startswith("/wiki/_mapping") and last.json["_meta"]["trl_search"]["passages"] == 11
    retriever = load_retriever("opensearch", index=index)
    assert retriever.search(["word7"], 3)[0][0].id == "p7"
    retriever.close()


def test_a_build_that_is_killed_sends_only_what_is_missing(
    server: OpenSearchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in PASSAGES))
    monkeypatch.setattr(opensearch_build, "BULK_ROWS", 2)
    server.fail = lambda asked: Said({}, 500) if "word6" in asked.body.decode() else None
    with pytest.raises(RetrievalError, match="answered 500"):
        build(server, tmp_path, corpus)
    with pytest.raises(UserError, match="being loaded now"):
        load_retriever("opensearch", url=server.url, collection="wiki")
    server.fail = lambda asked: None
    server.asked.clear()
    build(server, tmp_path, corpus)
    bulks = [one.body.decode().splitlines() for one in server.asked if "_bulk" in one.target]
    sent = [json.loads(line)["index"]["_id"] for lines in bulks for line in lines[::2]]
    assert sent == ["6", "7", "8", "9", "10"]
    assert sorted(server.indices["wiki"]["documents"], key=int) == [str(row) for row in range(11)]


def bulks(server: OpenSearchServer) -> list[int]:
    return [len(one.body.splitlines()) // 2 for one in server.asked if "_bulk" in one.target]


def test_requests_are_cut_by_their_bytes(
    server: OpenSearchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_search.retrieval.engines.build.MAX_BYTES", 1_000)
    passages = [Passage(str(row), "", "é" * length) for row, length in enumerate((10, 400, 10, 900, 10, 10))]
    build(server, tmp_path, passages)
    assert bulks(server) == [2, 1, 1, 2]
    assert sorted(server.indices["wiki"]["documents"]) == list("012345")


def test_a_request_that_is_too_large_is_halved(server: OpenSearchServer, tmp_path: Path) -> None:
    def limited(asked: Any) -> Said | None:
        return Said({}, 413) if "_bulk" in asked.target and len(asked.body.splitlines()) > 2 * 3 else None

    server.fail = limited
    build(server, tmp_path)
    assert bulks(server) == [11, 5, 2, 3, 6, 3, 3]
    assert len(server.indices["wiki"]["documents"]) == 11
    server.fail = lambda asked: Said({}, 413) if "word7" in asked.body.decode() else None
    with pytest.raises(RetrievalError, match=r"the passage in row 8 is too large for the engine: .*answered 413"):
        build(server, tmp_path / "other", replace=True)


@pytest.mark.parametrize("query", ["U.S.A. 1,000 3.14 node.js", "北京 «Été» C++ AT&T"])
def test_a_query_is_sent_unchanged(server: OpenSearchServer, tmp_path: Path, query: str) -> None:
    build(server, tmp_path)
    load_retriever("opensearch", url=server.url, collection="wiki").search([query], 1)
    assert json.loads(server.asked[-1].body.splitlines()[1])["query"]["match"]["contents"]["query"] == query


@pytest.mark.parametrize("word", ["a.b ", "京", "x" * 255])
def test_a_long_query_is_truncated_to_opensearchs_limit(server: OpenSearchServer, tmp_path: Path, word: str) -> None:
    build(server, tmp_path)
    load_retriever("opensearch", url=server.url, collection="wiki").search([word * 5_000], 1)
    sent = json.loads(server.asked[-1].body.splitlines()[1])["query"]["match"]["contents"]["query"]
    assert sent == (word * 5_000)[: len(sent)] and 250 <= len(sent) // len(word) * (2 if "." in word else 1) <= 256


def test_an_existing_index_is_replaced_only_on_request(server: OpenSearchServer, tmp_path: Path) -> None:
    index = build(server, tmp_path)
    with pytest.raises(UserError, match="--replace"):
        build(server, tmp_path / "other", PASSAGES[:3])
    build(server, tmp_path / "other", PASSAGES[:3], replace=True)
    with pytest.raises(UserError, match="was loaded with other passages"):
        load_retriever("opensearch", index=index)


def test_a_refused_passage_ends_the_build(server: OpenSearchServer, tmp_path: Path) -> None:
    def refuse(asked: Any) -> Said | None:
        if "_bulk" not in asked.target:
            return None
        item = {"_index": "wiki", "_id": "0", "status": 400, "error": {"type": "mapper", "reason": "too long"}}
        return Said({"took": 1, "errors": True, "items": [{"index": item}]})

    server.fail = refuse
    with pytest.raises(RetrievalError, match="refused passage 0: too long"):
        build(server, tmp_path)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (error_body(400, "query_shard_exception", "no field"), RetrievalError, "query_shard_exception: no field"),
        (error_body(429, "rejected_execution_exception", "queue"), Unavailable, "rejected_execution"),
        ({"timed_out": True, "_shards": SHARDS, "hits": {"hits": []}}, Unavailable, "in time"),
        (
            {"timed_out": False, "_shards": {"total": 6, "successful": 5, "failed": 1}, "hits": {"hits": []}},
            Unavailable,
            "5 of 6 shards",
        ),
    ],
)
def test_a_partial_answer_is_a_failure(
    server: OpenSearchServer, tmp_path: Path, answer: dict[str, Any], kind: type[Exception], said: str
) -> None:
    build(server, tmp_path)
    retriever = load_retriever("opensearch", url=server.url, collection="wiki")
    server.asked.clear()
    server.fail = lambda asked: Said({"took": 1, "responses": [answer]})
    with pytest.raises(kind, match=said):
        retriever.search(["harbour"], 3)
    assert len(server.asked) == (3 if kind is Unavailable else 1)


@pytest.mark.parametrize("body", [{}, [], b"null", {"responses": [None]}, {"responses": [{"error": "boom"}]}])
def test_an_answer_in_another_shape_is_a_failure(server: OpenSearchServer, tmp_path: Path, body: Any) -> None:
    retriever = load_retriever("opensearch", index=build(server, tmp_path))
    server.fail = lambda asked: Said(body)
    with pytest.raises(RetrievalError, match="OpenSearch answered in an unexpected shape"):
        retriever.search(["harbour"], 1)


def test_an_answer_that_is_too_long_is_given_up(
    server: OpenSearchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = load_retriever("opensearch", index=build(server, tmp_path))
    monkeypatch.setattr(base, "MAX_ANSWER_BYTES", 1 << 20)
    server.asked.clear()
    server.fail = lambda asked: Said(by_hand=endless)
    with pytest.raises(RetrievalError, match="OpenSearch: the answer is longer than 1 MiB"):
        retriever.search(["harbour"], 1)
    packed = gzip.compress(bytes(2 << 20))
    server.fail = lambda asked: Said(packed, headers={"Content-Encoding": "gzip", "Content-Length": str(len(packed))})
    with pytest.raises(RetrievalError, match="longer than 1 MiB"):
        retriever.search(["harbour"], 1)
    assert len(server.asked) == 2
    server.fail = lambda asked: None
    assert retriever.search(["word7"], 1)[0][0].id == "p7"


def test_temporary_errors_are_retried(server: OpenSearchServer, tmp_path: Path) -> None:
    build(server, tmp_path)
    retriever = load_retriever("opensearch", url=server.url, collection="wiki")
    troubles = [Said(error_body(503, "unavailable", "starting"), 503), Said({}, 429)]
    server.fail = lambda asked: troubles.pop() if troubles else None
    assert retriever.search(["word3"], 1)[0][0].id == "p3"
    server.kill()
    with pytest.raises(Unavailable, match="cannot be reached"):
        retriever.search(["word3"], 1)


def test_many_queries_are_sent_in_few_requests(
    server: OpenSearchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(server, tmp_path)
    retriever = load_retriever("opensearch", url=server.url, collection="wiki")
    monkeypatch.setattr(opensearch, "MAX_BATCH", 4)
    server.asked.clear()
    found = retriever.search([f"word{row}" for row in range(11)], 1)
    assert [passages[0].id for passages in found] == [f"p{row}" for row in range(11)]
    assert [len(one.body.splitlines()) for one in server.asked] == [8, 8, 6]
    monkeypatch.setattr(opensearch, "MAX_PASSAGES", 4)  # in an answer
    server.asked.clear()
    assert all(retriever.search(["harbour"] * 5, 2)) and all(retriever.search(["harbour"], 9))
    assert [len(one.body.splitlines()) for one in server.asked] == [4, 4, 2, 2]


def test_user_and_password_come_from_the_environment(
    server: OpenSearchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="OPENSEARCH_USER"):
        OpenSearchBuilder(url="https://admin:s3cret@host:9200")
    with pytest.raises(UserError, match="http://host:9200"):
        OpenSearchBuilder()
    monkeypatch.setenv("OPENSEARCH_USER", "admin")
    monkeypatch.setenv("OPENSEARCH_PASSWORD", "s3cret")
    index = build(server, tmp_path)
    expected = "Basic " + base64.b64encode(b"admin:s3cret").decode()
    assert all(one.headers["authorization"] == expected for one in server.asked)
    assert "s3cret" not in (index / MANIFEST).read_text()


def test_the_command_line_loads_and_searches(
    server: OpenSearchServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "1", "contents": "\\"Orlune\\"\\nA harbour town."}\n')
    made = ["index", "--kind", "opensearch", "--corpus", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "i")]
    assert main([*made, "--url", server.url, "--collection", "wiki"]) == 0
    assert main(["search", str(tmp_path / "i"), "harbour"]) == 0
    assert "Orlune   [id 1" in capsys.readouterr().out
    assert main([*made, "--url", server.url, "--collection", "wiki", "--overwrite"]) == 2
    assert "--replace" in capsys.readouterr().err
