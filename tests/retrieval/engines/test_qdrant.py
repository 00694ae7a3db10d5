"""The Qdrant adapter with the local engine of the official client; server-only features over HTTP on loopback.

No Qdrant server runs here. The tests check that the settings for shards and replicas are sent, not what a cluster does
with them.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

qdrant_client = pytest.importorskip("qdrant_client", reason="needs qdrant-client: pip install 'trl-search[qdrant]'")

from tests.support.encoders import save_random_bert  # noqa: E402
from tests.support.servers import Asked, Said, endless, serving  # noqa: E402
from trl_search.cli.main import main  # noqa: E402
from trl_search.common.errors import UserError  # noqa: E402
from trl_search.data.world import generate_world  # noqa: E402
from trl_search.retrieval import RetrievalError, base, load_retriever  # noqa: E402
from trl_search.retrieval.base import Unavailable  # noqa: E402
from trl_search.retrieval.bm25.analyzer import Analyzer  # noqa: E402
from trl_search.retrieval.engines import qdrant, qdrant_build  # noqa: E402
from trl_search.retrieval.engines.qdrant_build import QdrantBuilder  # noqa: E402
from trl_search.retrieval.index.build_folder import build_path  # noqa: E402
from trl_search.retrieval.index.folder import MANIFEST, build_index, read_manifest  # noqa: E402
from trl_search.retrieval.ranking import best_rows  # noqa: E402
from trl_search.types import Passage  # noqa: E402

PASSAGES = [Passage(f"p{row}", f"Town {row}", f"harbour {'lantern ' * (row % 4)} word{row}") for row in range(11)]


def write(passages: list[Passage], path: Path) -> Path:
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in passages]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(folder: Path, passages: Any = PASSAGES, **options: Any) -> Path:
    build_index(passages, folder / "index", "qdrant", path=str(folder / "engine"), **{"vectors": "sparse"} | options)
    return folder / "index"


def found(index: Path, query: str, k: int = 3, **options: Any) -> list[Passage]:
    retriever = load_retriever("qdrant", index=index, **options)
    try:
        return retriever.search([query], k)[0]
    finally:
        retriever.close()


def test_sparse_scores_are_bm25(tmp_path: Path) -> None:
    passages = list(generate_world(passages=120, seed=1).passages)
    index = build(tmp_path, passages)
    analyzer = Analyzer()
    terms = [analyzer.split(f"{passage.title}\n{passage.text}")[0] for passage in passages]
    mean = sum(map(len, terms)) / len(terms)

    def bm25(query: list[str], row: int) -> float:
        score = 0.0
        for term in query:
            holding = sum(term in one for one in terms)
            idf = math.log(1 + (len(terms) - holding + 0.5) / (holding + 0.5))
            count = terms[row].count(term)
            score += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(terms[row]) / mean))
        return score

    query = f"where was {passages[7].title} born, and in which town?"
    expected = {passages[row].id: bm25(analyzer.split(query)[0], row) for row in range(len(passages))}
    best = sorted(expected.values(), reverse=True)[:5]
    hits = found(index, query, 5)
    assert [hit.score for hit in hits] == pytest.approx(best, rel=1e-4)
    assert [expected[hit.id] for hit in hits] == pytest.approx(best, rel=1e-4)


def test_ties_beyond_the_first_fetch_are_in_corpus_order(tmp_path: Path) -> None:
    index = build(tmp_path, [Passage(f"c{row}", "", "lantern festival") for row in range(60)])
    assert [hit.id for hit in found(index, "lantern", 3)] == ["c0", "c1", "c2"]


def test_many_passages_are_read_in_several_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path)
    expected = found(index, "harbour", 11)
    monkeypatch.setattr(qdrant, "MAX_PASSAGES", 4)
    assert found(index, "harbour", 11) == expected and len(expected) == 11


def test_the_order_of_ties_does_not_depend_on_the_engine() -> None:
    """Two queries: one with 60 equal scores, last rows first, and one with different scores."""
    fetched: list[tuple[list[int], int]] = []

    def fetch(queries: list[int], count: int) -> list[Any]:
        fetched.append((queries, count))
        rows = np.arange(60)
        alike, unlike = (np.ones(60), rows[::-1]), (1 / (1.0 + rows), rows)
        return [tuple(part[:count] for part in (alike, unlike)[query]) for query in queries]

    assert best_rows(fetch, 2, 3, most=4096) == [
        [(0, 1.0), (1, 1.0), (2, 1.0)],
        [(0, 1.0), (1, 0.5), (2, 0.33333)],
    ]
    assert fetched == [([0, 1], 16), ([0], 128)]
    # A tie longer than the engine's maximum keeps the rows that the engine returned first.
    assert best_rows(fetch, 1, 3, most=20) == [[(40, 1.0), (41, 1.0), (42, 1.0)]]


def test_a_build_that_is_killed_sends_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write(PASSAGES, tmp_path / "corpus.jsonl")
    monkeypatch.setattr(qdrant_build, "MAX_UPSERT", 2)
    upsert, sent = qdrant_client.QdrantClient.upsert, []

    def failing(self: Any, *, points: list[Any], **options: Any) -> Any:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append([point.id for point in points])
        return upsert(self, points=points, **options)

    monkeypatch.setattr(qdrant_client.QdrantClient, "upsert", failing)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, corpus)
    assert not (tmp_path / "index").exists() and build_path(tmp_path / "index").exists()
    with pytest.raises(UserError, match="is being loaded now"):
        load_retriever("qdrant", path=tmp_path / "engine", collection="passages")
    sent.append([])
    index = build(tmp_path, corpus)
    assert sent == [[0, 1], [2, 3], [4, 5], [], [6, 7], [8, 9], [10]]
    assert {hit.id for hit in found(index, "harbour", 50)} == {passage.id for passage in PASSAGES}


def test_an_existing_collection_is_replaced_only_on_request(tmp_path: Path) -> None:
    index = build(tmp_path)
    for replace in (False, True):
        other = tmp_path / f"other-{replace}"
        options = {"path": str(tmp_path / "engine"), "vectors": "sparse", "replace": replace}
        if not replace:
            with pytest.raises(UserError, match="--replace"):
                build_index(PASSAGES[:4], other, "qdrant", **options)
            assert len(found(index, "harbour", 50)) == 11
        else:
            build_index(PASSAGES[:4], other, "qdrant", **options)
            assert len(found(other, "harbour", 50)) == 4
    # The collection of the first folder now contains other passages.
    with pytest.raises(UserError, match="was loaded with other passages"):
        load_retriever("qdrant", index=index)


def test_a_gateway_needs_only_the_manifest_or_no_files(tmp_path: Path) -> None:
    index = build(tmp_path)
    expected = found(index, "lantern word3")
    for file in index.iterdir():
        if file.name != MANIFEST:
            file.unlink()
    assert found(index, "lantern word3") == expected
    retriever = load_retriever("qdrant", path=tmp_path / "engine", collection="passages")
    assert retriever.search(["lantern word3"], 3) == [expected]
    retriever.close()
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["lantern"], 3)


def test_dense_vectors_are_searched_only_with_their_encoder(tmp_path: Path) -> None:
    mine, other = (save_random_bert(tmp_path / name / "e5-base-v2", seed=seed) for seed, name in enumerate("ab"))
    index = build(tmp_path, vectors="dense", encoder=str(mine), quantization="int8", on_disk=True, shards=2)
    assert read_manifest(index).details["encoder"]["query_prompt"] == "query: "
    expected = load_retriever("dense", passages=PASSAGES, encoder=str(mine)).search(["lantern word3"], 4)[0]
    hits = found(index, "lantern word3", 4, exact=True)
    assert [hit.id for hit in hits] == [hit.id for hit in expected]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-4)
    with pytest.raises(UserError, match="its weights is"):
        load_retriever("qdrant", index=index, encoder=str(other))


def test_the_command_line_loads_and_searches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write(PASSAGES, tmp_path / "corpus.jsonl")
    place = ["--path", str(tmp_path / "engine"), "--collection", "towns"]
    made = ["index", "--kind", "qdrant", "--corpus", str(corpus), "--output", str(tmp_path / "index"), *place]
    assert main([*made, "--vectors", "sparse", "--stemmer", "none"]) == 0
    assert main(["search", str(tmp_path / "index"), "word7", "--passages_per_query", "1"]) == 0
    assert "Town 7   [id p7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "path=DIR"),
        ({"url": "http://a:6333", "path": "x"}, "path=DIR"),
        ({"url": "http://u:p@a:6333"}, "QDRANT_API_KEY"),
        ({"path": "x", "vectors": "spares"}, "did you mean 'sparse'"),
        ({"path": "x", "quantization": "int8"}, "sparse ones"),
        ({"path": "x", "shards": 0}, "at least 1"),
    ],
)
def test_mistakes_are_found_before_any_work(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        QdrantBuilder(**{"vectors": "sparse"} | options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "nowhere"}, "not a folder of Qdrant's client"),
        ({"path": __file__}, "not a folder of Qdrant's client"),
        ({"url": "http://[::1"}, "not the address of a Qdrant server"),
        ({"url": "ftp://host"}, "not the address of a Qdrant server"),
        ({"url": "http://host", "hnsw_ef": 0}, "at least 1"),
    ],
)
def test_a_place_that_holds_no_collection_is_refused(
    options: dict[str, Any], said: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        load_retriever("qdrant", collection="passages", **options)
    assert not list(tmp_path.iterdir())


def test_options_that_qdrant_does_not_take_are_refused(tmp_path: Path) -> None:
    index = build(tmp_path)
    with pytest.raises(UserError, match="exact"):
        load_retriever("qdrant", index=index, exact="perhaps")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("meta.json", b"{", "cannot be opened: JSONDecodeError"),
        ("meta.json", b"[]", "cannot be opened: TypeError"),
        ("collection/passages/storage.sqlite", b"x" * 9000, "cannot be opened: DatabaseError"),
        ("collection/passages/storage.sqlite", None, "holds 0 of 11 passages"),
    ],
)
def test_damaged_files_of_the_client_are_named(file: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    index = build(tmp_path)
    path = tmp_path / "engine" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_retriever("qdrant", index=index)


def result(value: Any) -> Said:
    return Said({"result": value, "status": "ok", "time": 0.001})


def collection(metadata: dict[str, Any]) -> Said:
    """The answer of Qdrant 1.16 to `GET /collections/NAME`."""
    params = {"shard_number": 2, "replication_factor": 2, "on_disk_payload": True}
    hnsw = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000}
    optimizer = {"deleted_threshold": 0.2, "vacuum_min_vector_number": 1000, "default_segment_number": 0}
    optimizer["flush_interval_sec"] = 5
    config = {"params": params, "hnsw_config": hnsw, "optimizer_config": optimizer, "metadata": metadata}
    counts = {"points_count": 2, "segments_count": 1, "indexed_vectors_count": 0}
    return result({"status": "green", "optimizer_status": "ok", **counts, "config": config, "payload_schema": {}})


ABOUT = {
    "corpus": "0",
    "passages": 2,
    "vectors": "sparse",
    "analyzer": 2,
    "stemmer": "english",
    "stopwords": "english",
}


def test_settings_for_shards_replicas_and_memory_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_random_bert(tmp_path / "e5-base-v2")
    monkeypatch.setenv("QDRANT_API_KEY", "s3cret")

    def answer(asked: Asked) -> Said:
        path = asked.target.partition("?")[0]
        if path.endswith("/exists"):
            return result({"exists": False})
        if path.endswith("/points/count"):
            return result({"count": len(PASSAGES)})
        return result({"operation_id": 0, "status": "completed"} if "/points" in path else True)

    with serving(answer) as server:
        build_index(
            PASSAGES,
            tmp_path / "index",
            "qdrant",
            **{"url": server.url, "encoder": str(checkpoint), "collection": "wiki"},
            **{"shards": 12, "replicas": 2, "quantization": "binary", "on_disk": True},
        )
    asked = {(one.method, one.target.partition("?")[0]): one for one in server.asked}
    made = asked["PUT", "/collections/wiki"].json
    assert (made["shard_number"], made["replication_factor"], made["on_disk_payload"]) == (12, 2, True)
    assert made["vectors"]["dense"] == {"size": 32, "distance": "Dot", "on_disk": True}
    assert made["quantization_config"]["binary"]["always_ram"] is True
    upserted = asked["PUT", "/collections/wiki/points"]
    assert len(upserted.json["points"]) == len(PASSAGES) and "wait=true" in upserted.target
    # The metadata of the collection is written last.
    assert server.asked[-1].method == "PATCH" and server.asked[-1].json["metadata"]["trl_search"]["passages"] == 11
    assert upserted.headers["api-key"] == "s3cret"
    assert "s3cret" not in (tmp_path / "index" / MANIFEST).read_text()


def test_requests_are_split_by_bytes_and_halved_if_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def answer(asked: Asked) -> Said:
        path = asked.target.partition("?")[0]
        if path.endswith("/exists"):
            return result({"exists": False})
        if path.endswith("/points/count"):
            return result({"count": len(PASSAGES)})
        if path.endswith("/points"):
            sent.append(len(asked.json["points"]))
            if sent[-1] > 3:
                return Said({"status": {"error": "Payload too large"}}, 413)
        return result({"operation_id": 0, "status": "completed"} if "/points" in path else True)

    checkpoint = save_random_bert(tmp_path / "e5-base-v2")
    dense = 32 * qdrant_build.NUMBER_BYTES + 100
    with serving(answer) as server:
        for vectors, limit in (("sparse", 8 << 20), ("dense", 4 * dense), ("dense", dense // 2)):
            monkeypatch.setattr("trl_search.retrieval.engines.build.MAX_BYTES", limit)
            options = {"vectors": vectors, "url": server.url, "encoder": str(checkpoint)}
            build_index(PASSAGES, tmp_path / f"{vectors} {limit}", "qdrant", **options)
            sent.append(0)
    assert sent == [11, 5, 2, 3, 6, 3, 3, 0, *[4, 2, 2] * 2, 3, 0, *[1] * 11, 0]


def test_failures_are_reported_and_temporary_errors_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    troubles: list[Said] = []
    hits = result([{"points": [{"id": 1, "version": 0, "score": 2.0}]}])
    read = result([{"id": 1, "payload": {"id": "p1", "title": "T", "text": "x"}}])

    def answer(asked: Asked) -> Said:
        if asked.method == "GET":
            return collection({"trl_search": ABOUT})
        if troubles:
            return troubles.pop()
        return hits if asked.target.split("?")[0].endswith("/query/batch") else read

    with serving(answer) as server:
        retriever = load_retriever("qdrant", url=server.url, collection="wiki")
        troubles += [Said({"status": {"error": "busy"}}, 503), Said({"status": {"error": "slow down"}}, 429)]
        assert retriever.search(["harbour", "?!"], 3) == [[Passage("p1", "T", "x", score=2.0)], []]
        troubles += [Said({"status": {"error": "busy"}}, 503)] * 3
        with pytest.raises(Unavailable, match=r"answered 503.*busy"):
            retriever.search(["harbour"], 3)
        asked = len(server.asked)
        troubles.append(Said({"status": {"error": "Wrong input: no such vector"}}, 400))
        with pytest.raises(RetrievalError, match="no such vector"):
            retriever.search(["harbour"], 3)
        assert len(server.asked) == asked + 1
        for body in ({}, [], b"<html>"):  # of a proxy
            troubles += [Said(body)] * 3
            with pytest.raises(RetrievalError, match="Qdrant"):
                retriever.search(["harbour"], 3)
            troubles.clear()
        monkeypatch.setattr(qdrant, "MAX_BATCH", 2)
        server.asked.clear()
        hits.body["result"] *= 2
        retriever.search(["a harbour", "a town", "two towns", "the lantern"], 3)
        sizes = [len(one.json["searches"]) for one in server.asked if "query/batch" in one.target]
        assert sizes == [2, 2]
    with pytest.raises(Unavailable, match="cannot be reached"):
        retriever.search(["harbour"], 3)


def test_an_answer_that_is_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(bytes(2 << 20))
    troubles = [Said(packed, headers={"Content-Encoding": "gzip"}), Said(by_hand=endless)]

    def answer(asked: Asked) -> Said:
        return collection({"trl_search": ABOUT}) if asked.method == "GET" else troubles.pop()

    with serving(answer) as server:
        retriever = load_retriever("qdrant", url=server.url, collection="wiki")
        monkeypatch.setattr(base, "MAX_ANSWER_BYTES", 1 << 20)
        for _ in range(2):
            with pytest.raises(RetrievalError, match="Qdrant: the answer is longer than 1 MiB"):
                retriever.search(["harbour"], 3)
    assert not troubles
