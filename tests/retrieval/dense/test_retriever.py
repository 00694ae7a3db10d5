"""Dense retrieval: questions find their passages, stable ties, indexes and their encoders, published files."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.encoders import minilm, minilm_encoder, needs_minilm, save_random_bert
from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, load_retriever
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.corpus.published import find_lines, open_jsonl
from trl_search.retrieval.dense.encoder import Encoder, load_encoder
from trl_search.retrieval.dense.fingerprint import EncoderFingerprint
from trl_search.retrieval.dense.retriever import DenseRetriever
from trl_search.retrieval.dense.vectors import VECTOR_INDEXES
from trl_search.retrieval.dense.vectors.gpu import search_in_memory
from trl_search.retrieval.index.folder import build_index, read_manifest
from trl_search.retrieval.ranking import MARGIN, TIE, order_ties
from trl_search.types import Passage

WORLD = [
    Passage("0", "Mira Talvane", "Mira Talvane is a novelist born in Orlune."),
    Passage("1", "Tin", "The price of tin fell in 1904."),
    Passage("2", "Vesk", "Vesk is a country with many harbours."),
]


class Fake(Encoder):
    """Encodes a query, the number of a dimension, as the unit vector of that dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__(None, EncoderFingerprint("fake", "", None, "", "", "", 8, True, dim))

    def encode_queries(self, texts: Sequence[str], **_: Any) -> np.ndarray:
        return np.eye(self.dim, dtype=np.float32)[[int(text) for text in texts]]


def fake(scores: Sequence[Sequence[float]]) -> DenseRetriever:
    """A retriever where query "i" gives row r the score `scores[r][i]`."""
    rows = np.array(scores, dtype=np.float32)
    passages = tuple(Passage(str(row), "", "") for row in range(len(rows)))
    return DenseRetriever(Fake(rows.shape[1]), search_in_memory(rows), passages)


def ids(found: list[Passage]) -> list[str]:
    return [passage.id for passage in found]


# Ties


def test_a_tie_beyond_the_fetched_rows_is_in_corpus_order() -> None:
    # Copies differ in the last bit, as after batching; later ones are higher.
    scores = [[0.1], *([0.5 + 1e-9 * row] for row in range(20 * MARGIN)), [0.9]]
    for k in (1, 2, MARGIN, 15 * MARGIN):
        (found,) = fake(scores).search(["0"], k=k)
        assert ids(found) == [str(len(scores) - 1), *map(str, range(1, k))]


def test_scores_on_two_sides_of_a_rounding_boundary_are_equal() -> None:
    for cut in np.linspace(0.5, 0.50001, 23, dtype=np.float32):  # some of these pairs lie on two sides of any boundary
        below, above = np.nextafter(cut, np.float32(0)), np.nextafter(cut, np.float32(1))
        assert ids(fake([[below], [above]]).search(["0"], k=1)[0]) == ["0"]


@given(st.lists(st.integers(0, 12), max_size=30), st.randoms())
def test_ties_are_ordered_by_row_and_other_rows_stay(steps: list[int], random: Any) -> None:
    scores = -np.sort(-np.array([step * TIE / 3 for step in steps], dtype=np.float64))
    rows = np.array(random.sample(range(100), len(steps)), dtype=np.int64)
    order, best = order_ties(scores, rows)
    assert sorted(order) == list(range(len(steps))) and (np.diff(best) <= 0).all()
    for at in range(len(order)):
        assert 0 <= best[at] - scores[order[at]] <= TIE * 1.0001
        if at and best[at - 1] == best[at]:
            assert rows[order[at - 1]] < rows[order[at]]


def test_a_query_without_a_letter_or_digit_finds_nothing() -> None:
    assert [ids(found) for found in fake([[1.0, 0.0], [0.0, 1.0]]).search(["", "1", "?!", "0"], k=1)] == [
        [],
        ["1"],
        [],
        ["0"],
    ]


def test_a_closed_retriever_says_so() -> None:
    retriever = fake([[1.0]])
    retriever.close()
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["0"], k=1)


# Index folders


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_bert(tmp_path_factory.mktemp("checkpoints") / "e5-base-v2")


@pytest.fixture(scope="module")
def random_world() -> list[Passage]:
    words = ["harbour", "lantern", "town", "festival", "country"]
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, size=6)) + f" {row}" for row in range(300)]
    return [Passage(str(row), f"T{row}", text) for row, text in enumerate(texts)]


@pytest.mark.parametrize("word", VECTOR_INDEXES)
def test_every_type_of_index_is_built_measured_and_searched(
    tmp_path: Path, checkpoint: Path, random_world: list[Passage], word: str
) -> None:
    build_index(random_world, tmp_path / "index", "dense", encoder=str(checkpoint), index_type=word)
    measured = read_manifest(tmp_path / "index").details["vectors"]
    assert measured["word"] == word and measured["recall_at_3"] > 0.8
    retriever = load_retriever("dense", index=tmp_path / "index", device="cpu")
    exact = load_retriever("dense", passages=random_world, encoder=checkpoint, device="cpu")
    queries = [passage.text for passage in random_world[:20]]
    pairs = zip(retriever.search(queries, k=3), exact.search(queries, k=3), strict=True)
    assert sum(len({*ids(found)} & {*ids(best)}) for found, best in pairs) >= (60 if word == "flat" else 48)


def test_an_index_accepts_only_its_own_encoder(tmp_path: Path, checkpoint: Path) -> None:
    build_index(WORLD, tmp_path / "i", "dense", encoder=str(checkpoint), query_prompt="ask: ", max_length=64)
    retriever = load_retriever("dense", index=tmp_path / "i", device="cpu")
    own = retriever.encoder.fingerprint  # type: ignore[attr-defined]
    assert (own.query_prompt, own.passage_prompt, own.max_length) == ("ask: ", "passage: ", 64)
    os.rename(checkpoint, checkpoint.with_name("moved"))
    try:
        with pytest.raises(UserError, match="no encoder folder"):
            load_retriever("dense", index=tmp_path / "i")
        moved = load_retriever("dense", index=tmp_path / "i", encoder=checkpoint.with_name("moved"), device="cpu")
        assert moved.search(["harbour"], k=2) == retriever.search(["harbour"], k=2)
    finally:
        os.rename(checkpoint.with_name("moved"), checkpoint)
    other = save_random_bert(tmp_path / "e5-base-v2", seed=1)
    with pytest.raises(UserError, match=r"is not the one .* was built with .*: its weights is"):
        load_retriever("dense", index=tmp_path / "i", encoder=other)
    with pytest.raises(UserError, match="its max_length is 256, not 64"):
        load_retriever("dense", index=tmp_path / "i", encoder=load_encoder(checkpoint, query_prompt="ask: "))
    with pytest.raises(UserError, match=r"query_prompt: fixed when .* was built"):
        load_retriever("dense", index=tmp_path / "i", query_prompt="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index_type": "smal"}, "did you mean 'small'"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"batch_size": 0}, "batch_size"),
        ({"encoder": "/nowhere/e5"}, "no encoder folder"),
        ({"encodr": "x"}, "option of a dense index"),
    ],
)
def test_wrong_options_are_refused_before_the_corpus_is_read(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_index(iter(()), tmp_path / "i", "dense", **options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"passages": WORLD, "corpus": "x"}, {"faiss_file": "x"}])
def test_one_source_is_needed(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="dense needs one of index=DIR"):
        load_retriever("dense", **options)


@needs_minilm
def test_the_command_prints_the_cost_first_and_the_recall_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in WORLD)
    (tmp_path / "c.jsonl").write_text("".join(lines))
    build = ["index", "--corpus", str(tmp_path / "c.jsonl"), "--kind", "dense", "--index-type", "fp16"]
    assert main([*build, "--encoder", minilm(), "--output", str(tmp_path / "i")]) == 0
    before, after = capsys.readouterr().out.split(f"{tmp_path / 'i'}: 3 passages")
    assert "fp16 (SQfp16): 3 x 384: RAM" in before and "disk" in before and "recall@3" in before
    assert "recall@3 1.000 of exact search" in after
    assert main(["search", str(tmp_path / "i"), "where was the writer born?", "--passages_per_query", "1"]) == 0
    assert "1. Mira Talvane   [id 0, score 0." in capsys.readouterr().out
    assert main([*build, "--output", str(tmp_path / "j"), "--stemmer", "none"]) == 2
    assert "unknown option of a dense index 'stemmer'" in capsys.readouterr().err


# Published files


def publish(folder: Path, passages: list[Passage], encoder: Encoder) -> tuple[Path, Path]:
    """Makes `wiki-18.jsonl` and `e5_Flat.index` like the published ones: encoded contents in an IndexFlatIP."""
    contents = [f'"{passage.title}"\n{passage.text}' for passage in passages]
    lines = (json.dumps({"id": str(row), "contents": text}) for row, text in enumerate(contents))
    (folder / "wiki-18.jsonl").write_text("\n".join(lines) + "\n")
    index = faiss.IndexFlatIP(encoder.dim)
    index.add(encoder.encode_passages(contents))
    faiss.write_index(index, str(folder / "e5_Flat.index"))
    return folder / "e5_Flat.index", folder / "wiki-18.jsonl"


def test_a_published_index_and_corpus_open_unchanged(
    tmp_path: Path, checkpoint: Path, random_world: list[Passage]
) -> None:
    encoder = load_encoder(checkpoint, device="cpu")
    index, corpus = publish(tmp_path, random_world, encoder)
    before = index.read_bytes(), corpus.read_bytes()
    retriever = load_retriever("dense", faiss_file=index, corpus=corpus, encoder=checkpoint, device="cpu")
    queries = [passage.text for passage in random_world[:20]]
    in_memory = load_retriever("dense", passages=random_world, encoder=encoder).search(queries, k=3)
    for ours, theirs in zip(retriever.search(queries, k=3), in_memory, strict=True):
        assert [replace(one, score=0.0) for one in ours] == [replace(one, score=0.0) for one in theirs]
        # FAISS and torch sum in different orders, so a score at a rounding boundary may be rounded either way.
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1.1e-5)
    assert (index.read_bytes(), corpus.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "e5_Flat.index",
        "wiki-18.jsonl",
        "wiki-18.jsonl.offsets.npy",
    ]
    made = (tmp_path / "wiki-18.jsonl.offsets.npy").stat().st_mtime_ns
    open_jsonl(corpus).close()
    assert (tmp_path / "wiki-18.jsonl.offsets.npy").stat().st_mtime_ns == made


def test_a_published_index_of_one_byte_rows_opens(
    tmp_path: Path, checkpoint: Path, random_world: list[Passage]
) -> None:
    """Its codes used to be compared with vectors, so the right encoder was refused."""
    encoder = load_encoder(checkpoint, device="cpu")
    path, corpus = publish(tmp_path, random_world, encoder)
    exact = faiss.read_index(str(path))
    vectors = exact.reconstruct_n(0, exact.ntotal)
    index = faiss.index_factory(encoder.dim, "SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    retriever = load_retriever("dense", faiss_file=path, corpus=corpus, encoder=encoder, device="cpu")
    assert retriever.search([random_world[7].text], k=1)[0]


def test_a_published_index_of_another_encoder_or_corpus_is_refused(
    tmp_path: Path, checkpoint: Path, random_world: list[Passage]
) -> None:
    encoder = load_encoder(checkpoint, device="cpu")
    index, corpus = publish(tmp_path, random_world, encoder)
    for wrong in ({"passage_prompt": ""}, {"pooling": "cls"}):
        with pytest.raises(UserError, match=r"does not reproduce the vectors of .*e5_Flat"):
            load_retriever("dense", faiss_file=index, corpus=corpus, encoder=checkpoint, device="cpu", **wrong)
    load_retriever("dense", faiss_file=index, corpus=corpus, encoder=checkpoint, pooling="cls", check_source=False)
    with pytest.raises(UserError, match="32 dimensions and the index holds vectors of 16"):
        faiss.write_index(faiss.IndexFlatIP(16), str(tmp_path / "other.index"))
        load_retriever("dense", faiss_file=tmp_path / "other.index", corpus=corpus, encoder=encoder)
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="299 passages and the index 300 vectors"):
        load_retriever("dense", faiss_file=index, corpus=corpus, encoder=encoder)
    with pytest.raises(UserError, match="no FAISS file"):
        load_retriever("dense", faiss_file=tmp_path / "nowhere", corpus=corpus, encoder=encoder)


@given(
    lines=st.lists(st.sampled_from([b"{}", b"[1]", b"", b"\r", b" ", b"{ }", b"x" * 40]), max_size=12),
    end=st.booleans(),
    mark=st.booleans(),
)
def test_lines_are_found_at_their_offsets(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bool, mark: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    lines = [b"first", *lines]
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + b"\n".join(lines) + (b"\n" if end else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_search.common.blocks.BLOCK_BYTES", 7)
        starts = find_lines(path)
    data = path.read_bytes()
    found = [data[start:stop].strip() for start, stop in pairwise(starts)]
    assert found == [line.strip() for line in lines if line.strip()]


def test_a_large_corpus_is_not_loaded_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    path.write_bytes(
        b"".join(b'{"id": "%d", "contents": "\\"T\\"\\n%s"}\n' % (row, b"x" * 200) for row in range(50_000))
    )
    gc.collect()
    tracemalloc.start()
    corpus = open_jsonl(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus) == 50_000 and corpus[49_999] == Passage("49999", "T", "x" * 200)
    assert held < 100_000  # bytes; the offsets are memory-mapped too


def test_offsets_are_rebuilt_after_a_change_and_cached_if_the_folder_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "1", "contents": "a"}\n')
    assert len(open_jsonl(path)) == 1
    path.write_text('{"id": "1", "contents": "a"}\n{"id": "2", "contents": "b"}\n')
    assert [passage.id for passage in open_jsonl(path)] == ["1", "2"]
    (tmp_path / "c.jsonl.offsets.npy").unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert isinstance(open_jsonl(path), Corpus)
    assert not (tmp_path / "c.jsonl.offsets.npy").exists()
    (made,) = (tmp_path / "cache" / "trl-search").iterdir()
    assert made.name.startswith("c.jsonl.")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("x.jsonl", b"", "no passages"), ("x.jsonl", b"\n \n", "no passages"), ("x.jsonl.gz", b"x", "gunzip")],
)
def test_a_corpus_that_cannot_be_read_by_row_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_jsonl(tmp_path / name)


@needs_minilm
def test_real_questions_find_their_passages() -> None:
    retriever = load_retriever("dense", passages=WORLD, encoder=minilm_encoder())
    asked = ["Where was the writer born?", "What happened to metal prices?", "Which nation has ports?"]
    found = retriever.search(asked, k=1)
    assert [ids(passages) for passages in found] == [["0"], ["1"], ["2"]]
    assert replace(found[0][0], score=0.0) == WORLD[0] and found[0][0].score > 0.3
