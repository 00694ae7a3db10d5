"""BM25 with tantivy: the same terms as with bm25s, the contract of every retriever, and what only tantivy has."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, Retriever, load_retriever
from trl_search.retrieval.bm25 import retriever as bm25
from trl_search.retrieval.bm25 import tantivy_engine
from trl_search.retrieval.bm25.analyzer import ANALYZER_VERSION
from trl_search.retrieval.bm25.retriever import BM25Retriever
from trl_search.retrieval.index.folder import build_index, read_manifest
from trl_search.retrieval.ranking import MARGIN
from trl_search.types import Passage

pytest.importorskip("tantivy")


def passages(*texts: str) -> list[Passage]:
    return [Passage(str(row), "", text) for row, text in enumerate(texts)]


def ids(found: list[Passage]) -> list[str]:
    return [passage.id for passage in found]


def indexed(folder: Path, *texts: str, threads: int | None = None, **options: object) -> Retriever:
    build_index(passages(*texts), folder / "index", engine="tantivy", overwrite=True, **options)
    return load_retriever("bm25", index=folder / "index", threads=threads)


def engine_of_segments(folder: Path, texts: list[str], segments: list[list[int]]) -> tantivy_engine.TantivyEngine:
    """An engine with the given rows in each segment: with real merges, the segments depend on timing."""
    module = tantivy_engine.import_tantivy()
    writer = module.Index(tantivy_engine.schema(), path=str(folder)).writer(15_000_000, 1)
    for rows in segments:
        for row in rows:
            writer.add_document(tantivy_engine.document(row, texts[row].split()))
        writer.commit()
    writer.wait_merging_threads()
    engine = tantivy_engine.TantivyEngine(folder, len(texts))
    assert engine.searcher.num_segments == len(segments)
    return engine


# Results


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    corpus=st.lists(st.lists(st.sampled_from("abcdé"), max_size=4).map(" ".join), min_size=1, max_size=30),
    queries=st.lists(st.lists(st.sampled_from("abcdéxy"), max_size=3).map(" ".join), min_size=1, max_size=5),
    k=st.integers(1, 40),
)
def test_the_same_words_match_as_with_bm25s(corpus: list[str], queries: list[str], k: int, tmp_path: Path) -> None:
    retriever = indexed(tmp_path, *corpus, "z", stopwords=None)
    reference = BM25Retriever.from_passages(passages(*corpus, "z"), stopwords=None, backend="numpy")
    everything = retriever.search(queries, k=100)
    for found, expected in zip(everything, reference.search(queries, k=100), strict=True):
        assert set(ids(found)) == set(ids(expected))
        assert [(-p.score, int(p.id)) for p in found] == sorted((-p.score, int(p.id)) for p in found)
    assert retriever.search(queries, k) == [found[:k] for found in everything]


def test_the_score_is_bm25(tmp_path: Path) -> None:
    texts = [["harbour"], ["harbour", "lantern"], ["lantern", "lantern", "vesk", "vesk"]]
    (found,) = indexed(tmp_path, *map(" ".join, texts)).search(["lantern"], k=3)
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    scores = {
        row: 2.2 * idf * tf / (tf + 1.2 * (1 - 0.75 + 0.75 * len(texts[row]) / (7 / 3)))
        for row, tf in ((1, 1), (2, 2))
    }
    assert ids(found) == ["2", "1"]
    assert [passage.score for passage in found] == pytest.approx([scores[2], scores[1]], rel=1e-6)


def test_a_repeated_word_counts_twice(tmp_path: Path) -> None:
    retriever = indexed(tmp_path, "lantern vesk", "harbour vesk")
    once, twice = retriever.search(["lantern", "lantern lantern"], k=1)
    assert twice[0].score == pytest.approx(2 * once[0].score)


# Ties


def test_a_tie_beyond_the_fetched_rows_is_in_corpus_order(tmp_path: Path) -> None:
    copies = 40 * MARGIN
    retriever = indexed(tmp_path, "vesk", *["lantern"] * copies, "vesk lantern")
    for k in (1, 3, MARGIN, copies):
        (found,) = retriever.search(["lantern"], k=k)
        assert ids(found) == [str(row) for row in range(1, k + 1)]


def test_ties_across_segments_of_any_order_are_in_corpus_order(tmp_path: Path) -> None:
    texts = ["lantern"] * 60 + ["lantern lantern"] * 60
    rows = list(range(120))
    random.Random(0).shuffle(rows)
    engine = engine_of_segments(tmp_path, texts, [rows[80:], rows[40:80], rows[:40]])
    for k in (1, 5, 59, 60, 61, 119):
        (found,) = engine.rank([["lantern"]], k)
        assert [row for row, _ in found] == [*range(60, 120), *range(60)][:k]


def test_copies_score_the_same_to_the_bit_at_every_k(tmp_path: Path) -> None:
    """The sum over query terms must not depend on the position of a passage or on skipped blocks."""
    generator = random.Random(1)
    words = [f"w{int(generator.paretovariate(0.7)) % 400}" for _ in range(5_000)]
    texts = [" ".join(generator.choices(words, k=generator.randint(3, 50))) for _ in range(700)]
    texts += generator.choices(texts, k=2_300)
    engine = engine_of_segments(tmp_path, texts, [list(range(start, 3_000, 3)) for start in range(3)])
    for _ in range(40):
        query = generator.choices(words, k=generator.randint(3, 12))
        (everything,) = engine.rank([query], len(texts))
        by_text: dict[str, set[float]] = {}
        for row, score in everything:
            by_text.setdefault(texts[row], set()).add(score)
        assert all(len(scores) == 1 for scores in by_text.values())
        for k in (1, 3, 10, 100):
            assert engine.rank([query], k) == [everything[:k]]


# No match, no words, too large a k


@pytest.mark.parametrize("empty", ["", "zeppelin", "the of"])
def test_a_batch_whose_first_query_finds_nothing(tmp_path: Path, empty: str) -> None:
    retriever = indexed(tmp_path, "harbour", "lantern")
    assert [ids(found) for found in retriever.search([empty, "lantern zeppelin", empty], k=5)] == [[], ["1"], []]
    assert retriever.search([empty, empty], k=1) == [[], []]


def test_passages_without_words_between_others_do_not_matter(tmp_path: Path) -> None:
    assert ids(indexed(tmp_path, "", "lantern", "...", "the", "lantern").search(["lantern"], k=50)[0]) == ["1", "4"]


def test_passages_without_any_word_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no passage holds a word"):
        indexed(tmp_path, "...", "")
    assert list(tmp_path.iterdir()) == []


def test_queries_are_stemmed_like_the_index(tmp_path: Path) -> None:
    world = ("They were founding a harbour.", "Lanterns.")
    found = {
        name: [ids(hits) for hits in indexed(tmp_path, *world, **options).search(["founded", "lantern"], k=2)]
        for name, options in {
            "stemmed": {},
            "plain": {"stemmer": None},
            "german": {"stemmer": "german", "stopwords": "german"},
        }.items()
    }
    assert found == {"stemmed": [["0"], ["1"]], "plain": [[], []], "german": [[], []]}


# Threads and processes


def test_any_number_of_threads_gives_the_same_results(tmp_path: Path) -> None:
    texts = [f"harbour {'lantern ' * (row % 5)} vesk{row % 7}" for row in range(300)]
    queries = [f"lantern vesk{row}" for row in range(30)]
    one = indexed(tmp_path, *texts, threads=1).search(queries, k=9)
    assert load_retriever("bm25", index=tmp_path / "index", threads=7).search(queries, k=9) == one
    with pytest.raises(UserError, match="threads=0 must be at least 1"):
        load_retriever("bm25", index=tmp_path / "index", threads=0)


def test_a_forked_process_can_search(tmp_path: Path) -> None:
    retriever = indexed(tmp_path, "harbour", "lantern", threads=2)
    queries = ["lantern", "harbour"]
    expected = retriever.search(queries, k=1)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=lambda: send.send(retriever.search(queries, k=1)))
    child.start()
    assert receive.poll(20) and receive.recv() == expected
    child.join(20)


# On disk


def test_opening_maps_the_files_and_writes_nothing(tmp_path: Path) -> None:
    build_index(passages("harbour", "lantern"), tmp_path / "index", engine="tantivy")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    assert {path.stat().st_mode for path in (tmp_path / "index" / "tantivy").iterdir() if path.is_file()} == {
        (tmp_path / "index" / "corpus.jsonl").stat().st_mode  # meta.json must be as readable as the corpus
    }
    retriever = load_retriever("bm25", index=tmp_path / "index")
    if sys.platform == "linux":
        (postings,) = (tmp_path / "index" / "tantivy").glob("*.idx")
        assert str(postings) in Path("/proc/self/maps").read_text()
    assert ids(retriever.search(["lantern"], k=1)[0]) == ["1"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == before


def test_a_closed_retriever_says_so(tmp_path: Path) -> None:
    retriever = indexed(tmp_path, "lantern")
    retriever.close()
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["lantern"], k=1)


def test_the_build_writes_a_segment_when_its_buffer_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer limits memory: a larger corpus is written in several segments, and all of it is found."""
    monkeypatch.setattr(tantivy_engine, "HEAP_BYTES", 15_000_000)  # the minimum of tantivy
    unlike = [" ".join(f"{row}x{word}" for word in range(12)) for row in range(25_000)]
    retriever = indexed(tmp_path, *unlike, stemmer=None)
    assert isinstance(retriever, BM25Retriever) and isinstance(retriever.engine, tantivy_engine.TantivyEngine)
    assert retriever.engine.searcher.num_segments > 1
    assert [ids(found) for found in retriever.search(["0x3", "24999x11", "12000x0"], k=2)] == [
        ["0"],
        ["24999"],
        ["12000"],
    ]


# The choice of the engine


def test_the_number_of_passages_decides_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "BM25S_LIMIT", 3)
    for count, folder in ((3, "bm25"), (4, "tantivy")):
        build_index(passages(*["lantern"] * count), tmp_path / folder)
        assert (tmp_path / folder / folder).is_dir()
        details = read_manifest(tmp_path / folder).details
        assert details.pop("analyzer") == ANALYZER_VERSION
        assert details == (
            {"engine": "bm25s", "k1": 1.5, "b": 0.75} if count == 3 else {"engine": "tantivy", "k1": 1.2, "b": 0.75}
        )
        retriever = load_retriever("bm25", index=tmp_path / folder, backend="numpy" if count == 3 else None)
        assert ids(retriever.search(["lantern"], k=9)[0]) == list("0123")[:count]
    build_index(passages(*["lantern"] * 4), tmp_path / "told", engine="bm25s")
    assert (tmp_path / "told" / "bm25").is_dir()


def test_without_tantivy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tantivy", None)
    with pytest.raises(UserError, match=r"pip install 'trl-search\[tantivy\]'.*engine='bm25s'"):
        build_index(passages("lantern"), tmp_path / "index", engine="tantivy")
    monkeypatch.setattr(bm25, "BM25S_LIMIT", 0)
    with pytest.raises(UserError, match=r"trl-search\[tantivy\]"):
        build_index(passages("lantern"), tmp_path / "index")


def test_the_engine_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "text": "harbour"}\n{"id": "2", "text": "lantern"}\n')
    made = ["--corpus", str(tmp_path / "corpus.jsonl"), "--output", str(tmp_path / "index"), "--engine", "tantivy"]
    for name, arguments in (("index", made), ("search", [str(tmp_path / "index"), "lanterns"])):
        module = import_module(f"trl_search.cli.commands.{name}")
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert module.run(parser.parse_args(arguments)) == 0
    assert "[id 2, score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tantiwy"}, "unknown BM25 engine 'tantiwy': did you mean 'tantivy'"),
        ({"engine": "tantivy", "k1": 0.9}, "fixed at 1.2 and 0.75, got k1=0.9"),
        ({"engine": "tantivy", "b": 0.4}, "fixed at 1.2 and 0.75.*b=0.4"),
        ({"engine": "bm25s", "b": 1.5}, "b=1.5 must be a number from 0 to 1"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_index(passages("lantern"), tmp_path / "index", **options)


def test_an_option_of_the_other_engine_is_refused(tmp_path: Path) -> None:
    build_index(passages("lantern"), tmp_path / "bm25s")
    build_index(passages("lantern"), tmp_path / "tantivy", engine="tantivy")
    with pytest.raises(UserError, match="threads is an option of the tantivy engine"):
        load_retriever("bm25", index=tmp_path / "bm25s", threads=2)
    with pytest.raises(UserError, match="backend is an option of the bm25s engine"):
        load_retriever("bm25", index=tmp_path / "tantivy", backend="numpy")
    with pytest.raises(UserError, match="searched by bm25s"):
        load_retriever("bm25", passages=passages("lantern"), threads=2)


def test_a_killed_build_is_resumed(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from trl_search.retrieval.bm25 import tantivy_engine
from trl_search.retrieval.bm25.analyzer import ANALYZER_VERSION
from trl_search.retrieval.index.folder import build_index
write = tantivy_engine.document
def write_some(row, *terms):
    if row == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(row, *terms)
if sys.argv[3] == "killed":
    tantivy_engine.document = write_some
build_index(sys.argv[1], sys.argv[2], engine="tantivy")
"""
    lines = [json.dumps({"id": str(n), "contents": f'"Title {n}"\nword{n} lantern'}) for n in range(4)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    for outcome, status in (("killed", -signal.SIGKILL), ("whole", 0)):
        command = [sys.executable, "-c", code, str(tmp_path / "corpus.jsonl"), str(tmp_path / "index"), outcome]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    retriever = load_retriever("bm25", index=tmp_path / "index")
    assert [passage.id for passage in retriever.search(["word3"], 1)[0]] == ["3"]
    retriever.close()
