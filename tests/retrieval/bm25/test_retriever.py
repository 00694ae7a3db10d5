"""BM25: the edge cases that `bm25s` leaves to its caller, and that queries are split like passages."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_search.common.errors import UserError
from trl_search.retrieval import RetrievalError, load_retriever
from trl_search.retrieval.bm25.analyzer import Analyzer
from trl_search.retrieval.bm25.bm25s_engine import BM25SEngine
from trl_search.retrieval.bm25.retriever import BM25Builder, BM25Retriever
from trl_search.retrieval.index.folder import build_index, read_manifest
from trl_search.types import Passage

BACKENDS = ["numpy", "numba"] if importlib.util.find_spec("numba") else ["numpy"]


def passages(*texts: str) -> list[Passage]:
    return [Passage(str(row), "", text) for row, text in enumerate(texts)]


def ids(found: list[Passage]) -> list[str]:
    return [passage.id for passage in found]


def test_the_score_is_bm25() -> None:
    texts = [["harbour"], ["harbour", "lantern"], ["lantern", "lantern", "vesk", "vesk"]]
    (found,) = BM25Retriever.from_passages(passages(*map(" ".join, texts)), k1=1.2, b=0.5).search(["lantern"], k=3)
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    scores = {row: idf * tf / (tf + 1.2 * (1 - 0.5 + 0.5 * len(texts[row]) / (7 / 3))) for row, tf in ((1, 1), (2, 2))}
    assert ids(found) == ["2", "1"]
    assert [passage.score for passage in found] == pytest.approx([scores[2], scores[1]], rel=1e-6)


# Ties


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_equal_scores_are_in_corpus_order(backend: str) -> None:
    copies = 500
    retriever = BM25Retriever.from_passages(passages("vesk", *["lantern"] * copies, "vesk lantern"), backend=backend)
    for k in (1, 3, 13, copies):
        (found,) = retriever.search(["lantern"], k=k)
        assert ids(found) == [str(row) for row in range(1, k + 1)]


@settings(max_examples=80)
@given(
    corpus=st.lists(st.lists(st.sampled_from("abcde"), max_size=4).map(" ".join), min_size=1, max_size=60),
    queries=st.lists(st.lists(st.sampled_from("abcdxy"), max_size=3).map(" ".join), max_size=5),
    k=st.integers(1, 20),
    backend=st.sampled_from(BACKENDS),
)
def test_the_best_k_of_all_scores_ties_in_corpus_order(
    corpus: list[str], queries: list[str], k: int, backend: str
) -> None:
    retriever = BM25Retriever.from_passages(passages(*corpus, "z"), stopwords=None, backend=backend)
    found = retriever.search(queries, k)
    bm25s = BM25Builder(stopwords=None).score(passages(*corpus, "z"))
    for query, got in zip(queries, found, strict=True):
        known = [bm25s.vocab_dict[term] for term in query.split() if term in bm25s.vocab_dict]
        scores = bm25s.get_scores_from_ids(known)
        expected = [row for row in np.argsort(-scores, kind="stable")[:k] if scores[row] > 0]
        assert [(passage.id, passage.score) for passage in got] == [(str(row), scores[row]) for row in expected]


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs numba")
@settings(max_examples=30)
@given(
    corpus=st.lists(st.lists(st.sampled_from("abcde"), max_size=4).map(" ".join), min_size=1, max_size=60),
    queries=st.lists(st.lists(st.sampled_from("abcdxy"), max_size=3).map(" ".join), max_size=5),
    k=st.integers(1, 20),
)
def test_backends_agree_to_the_bit(corpus: list[str], queries: list[str], k: int) -> None:
    numpy, numba = (
        BM25Retriever.from_passages(passages(*corpus, "z"), backend=backend).search(queries, k) for backend in BACKENDS
    )
    assert numpy == numba


# No match, no words, too large a k


@pytest.mark.parametrize("backend", BACKENDS)
def test_passages_without_a_match_are_not_returned(backend: str) -> None:
    retriever = BM25Retriever.from_passages(passages("harbour", "lantern", "vesk"), backend=backend)
    assert [ids(found) for found in retriever.search(["zeppelin", "lantern zeppelin"], k=3)] == [[], ["1"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", ["", "zeppelin", "the of"])
def test_a_batch_whose_first_query_has_no_known_word(backend: str, empty: str) -> None:
    retriever = BM25Retriever.from_passages(passages("harbour", "lantern"), backend=backend)
    assert [ids(found) for found in retriever.search([empty, "lantern", empty], k=1)] == [[], ["1"], []]
    assert retriever.search([empty, empty], k=1) == [[], []]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_passage_and_a_large_k(backend: str) -> None:
    assert ids(BM25Retriever.from_passages(passages("lantern"), backend=backend).search(["lantern"], k=50)[0]) == ["0"]


def test_passages_without_words_between_others_do_not_matter() -> None:
    retriever = BM25Retriever.from_passages(passages("", "lantern", "...", "the", "lantern"))
    assert ids(retriever.search(["lantern"], k=5)[0]) == ["1", "4"]


def test_passages_without_any_word_cannot_be_indexed() -> None:
    with pytest.raises(UserError, match="no passage holds a word"):
        BM25Retriever.from_passages(passages("...", ""))


def test_a_whole_page_as_query_is_fast() -> None:
    common = [f"harbour lantern vesk word{row % 50}" for row in range(20_000)]
    retriever = BM25Retriever.from_passages(passages(*common))
    started = time.process_time()
    retriever.search(["harbour lantern vesk " * 5_000], k=3)
    assert time.process_time() - started < 3  # 15,000 terms with 20,000 postings each would take ten times as long


@pytest.mark.parametrize("backend", BACKENDS)
def test_searches_on_several_threads_are_independent(backend: str) -> None:
    texts = [" ".join(f"w{(row * step) % 97}" for step in range(1, 30)) for row in range(3_000)]
    retriever = BM25Retriever.from_passages(passages(*texts), backend=backend)
    queries = [f"w{number} w{number * 7 % 97} w{number * 31 % 97}" for number in range(97)]
    alone = [retriever.search([query], k=5) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(lambda query: retriever.search([query], k=5), queries)) == alone


# jax


FAKE_JAX = """
import builtins
builtins.jax_imports = getattr(builtins, "jax_imports", 0) + 1
"""


def run_with_a_fake_jax(folder: Path, code: str) -> str:
    (folder / "jax").mkdir()
    (folder / "jax" / "__init__.py").write_text(FAKE_JAX)
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SEARCH = """
from trl_search.retrieval.bm25.retriever import BM25Retriever
from trl_search.types import Passage
world = [Passage("1", "", "harbour"), Passage("2", "", "lantern")]
found = BM25Retriever.from_passages(world, backend="numpy").search(["lantern"], k=1)
assert [passage.id for passage in found[0]] == ["2"], found
"""


def test_an_installed_jax_is_not_even_imported(tmp_path: Path) -> None:
    code = SEARCH + "import builtins; print(hasattr(builtins, 'jax_imports')); import jax; print(builtins.jax_imports)"
    assert run_with_a_fake_jax(tmp_path, code).split() == ["False", "1"]


# On disk


def test_an_index_on_disk_is_mapped_and_gives_the_same_results(tmp_path: Path) -> None:
    texts = [f"harbour {'lantern ' * (row % 5)} vesk{row % 7}" for row in range(300)]
    build_index(passages(*texts), tmp_path / "index", stemmer=None, stopwords=None, k1=0.9, b=0.4)
    on_disk = load_retriever("bm25", index=tmp_path / "index")
    assert isinstance(on_disk, BM25Retriever) and isinstance(on_disk.engine, BM25SEngine)
    postings = on_disk.engine._postings
    assert all(isinstance(one.base, np.memmap) for one in (postings._rows, postings._scores, postings._starts))
    in_memory = load_retriever("bm25", passages=passages(*texts), stemmer=None, stopwords=None, k1=0.9, b=0.4)
    queries = ["lantern", "vesk3 lantern", "harbour", "vesk6", ""]
    assert on_disk.search(queries, k=20) == in_memory.search(queries, k=20)


def test_queries_are_stemmed_like_the_index(tmp_path: Path) -> None:
    world = passages("They were founding a harbour.", "Lanterns.")
    build_index(world, tmp_path / "stemmed")
    build_index(world, tmp_path / "plain", stemmer=None)
    build_index(world, tmp_path / "german", stemmer="german", stopwords="german")
    assert read_manifest(tmp_path / "german").options["stemmer"] == "german"
    found = {
        name: [ids(hits) for hits in load_retriever("bm25", index=tmp_path / name).search(["founded", "lantern"], k=2)]
        for name in ("stemmed", "plain", "german")
    }
    assert found == {"stemmed": [["0"], ["1"]], "plain": [[], []], "german": [[], []]}


def test_a_closed_retriever_says_so(tmp_path: Path) -> None:
    build_index(passages("lantern"), tmp_path / "index")
    retriever = load_retriever("bm25", index=tmp_path / "index")
    retriever.close()
    with pytest.raises(RetrievalError, match="closed"):
        retriever.search(["lantern"], k=1)


# From text to terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Mira Talvane's novels", ["mira", "talvan", "novel"]),
        ("Mira Talvane\u2019s novels", ["mira", "talvan", "novel"]),
        ("Vitamin C and the U.S.", ["vitamin", "c", "u", "s"]),
        ("Cafe\u0301 Ｎｏ １", ["café", "1"]),
        ("Zürich, 1904", ["zürich", "1904"]),
        ("the of and", []),
        ("İSTANBUL İstanbul istanbul", ["istanbul"] * 3),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("iPhone手机 2007年 雨", ["iphon", "手机", "2007", "年", "雨"]),
        ("서울은 수도", ["서울", "울은", "수도"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ক্ষমতা தமிழ்", ["ক্ষমতা", "தமிழ்"]),
        ("ไทยแท้", ["ไท", "ทย", "ยแ", "แท้"]),
        ("مُحَمَّد محمـد", ["محمد"] * 2),
        ("שָׁלוֹם שלום", ["שלום"] * 2),
        ("x̄ ❤️ 1️⃣", ["x̄", "1"]),
    ],
)
def test_terms(text: str, terms: list[str]) -> None:
    assert Analyzer().split(text)[0] == terms


@given(st.text(st.characters(codec="ascii")))
def test_english_terms_are_stemmed_words_without_stop_words(text: str) -> None:
    words = re.findall(r"\w+", re.sub(r"(?<=\w)'s\b", "", text.lower()))
    plain = Analyzer(stemmer=None, stopwords=None)
    assert plain.split(text)[0] == words
    assert Analyzer(stemmer=None).split(text)[0] == [word for word in words if word not in Analyzer()._dropped]


def test_accents_are_folded_on_request() -> None:
    assert Analyzer(fold_accents=True).split("Zürich naïve ไทยแท้")[0] == ["zurich", "naiv", "ไท", "ทย", "ยแ", "แท้"]
    retriever = BM25Retriever.from_passages(passages("Zürich", "Bern"), fold_accents=True)
    assert [ids(found) for found in retriever.search(["Zurich", "Zürich"], k=1)] == [["0"], ["0"]]


BAND = [
    Passage("town", "Orlune", "The harbour of Orlune is the largest of the country, and it is in the north."),
    Passage("band", "The The", "The The are an English band."),
    Passage("none", "", "Lanterns."),
]


@pytest.mark.parametrize("engine", ["bm25s", "tantivy"])
def test_a_query_of_only_stop_words_uses_them(tmp_path: Path, engine: str) -> None:
    if engine == "tantivy":
        pytest.importorskip("tantivy")
    build_index(BAND, tmp_path / "index", engine=engine)
    retriever = load_retriever("bm25", index=tmp_path / "index")
    found = retriever.search(["The The", "the lantern", "who are the band", "they"], k=3)
    assert [ids(one) for one in found] == [["band", "town"], ["none"], ["band"], []]


def test_stop_words_do_not_change_other_scores() -> None:
    with_stops, without = (
        BM25Retriever.from_passages(passages(*texts)).search(["harbour lantern"], k=3)
        for texts in (["the harbour of the lantern", "a harbour", "it is"], ["harbour lantern", "harbour", "..."])
    )
    scores = [[(passage.id, passage.score) for passage in found[0]] for found in (with_stops, without)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("text", "options", "warned"),
    [
        ("Der Hafen von Orlune liegt im Norden des Landes und hat viele Schiffe", {}, "stop words of 'english'"),
        ("Орлун город у моря на севере страны", {}, "100% of the words .* Cyrillic"),
        ("東京タワーは日本の東京にある", {}, "stemmer 'english'"),
        ("東京タワーは日本の東京にある", {"stemmer": None, "stopwords": None}, None),
        ("Орлун город у моря на севере страны", {"stemmer": "russian", "stopwords": None}, None),
        ("The harbour of Orlune is the largest of the country", {}, None),
    ],
)
def test_a_build_warns_if_the_analyzer_is_for_another_language(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, options: dict[str, None], warned: str | None
) -> None:
    build_index(passages(*[text] * 40), tmp_path / "index", **options)
    assert bool(re.search(warned or "does not suit", caplog.text)) == (warned is not None)


def test_an_index_with_another_way_of_splitting_text_is_refused(tmp_path: Path) -> None:
    build_index(passages("lantern"), tmp_path / "index")
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    del manifest["details"]["analyzer"]
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"splits text differently.*rebuild with: trl-search index"):
        load_retriever("bm25", index=tmp_path / "index")


@given(st.text())
def test_any_text_has_terms(text: str) -> None:
    assert all(term for term in Analyzer(stemmer=None).split(text)[0])


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of index=DIR"),
        ({"index": "a", "corpus": "b"}, "one of index=DIR"),
        ({"passages": [], "stemer": "english"}, "did you mean 'stemmer'"),
        ({"index": "a", "stemmer": None}, "fixed when a was built"),
        ({"passages": passages("x"), "stemmer": "klingon"}, "unknown stemmer 'klingon'.*There are .*arabic"),
        ({"passages": passages("x"), "stopwords": "klingon"}, "unknown stop words"),
        ({"passages": passages("x"), "backend": "auto"}, "unknown BM25 backend 'auto'.*numba, numpy"),
        ({"passages": passages("x"), "b": 2}, "b=2 must be a number from 0 to 1"),
        ({"passages": [*passages("x"), *passages("y")]}, "passages 1 and 2 have the same id '0'"),
        ({"corpus": "nowhere.jsonl"}, "no corpus file nowhere.jsonl"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_retriever("bm25", **options)


def test_an_unknown_kind_lists_what_exists() -> None:
    with pytest.raises(UserError, match="unknown retriever 'bm52': did you mean 'bm25'"):
        load_retriever("bm52")


def test_an_installed_package_adds_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(
        "from trl_search.retrieval.bm25.retriever import BM25Retriever\n"
        "from trl_search.types import Passage\n"
        "def load(word='lantern'):\n"
        "    return BM25Retriever.from_passages([Passage('toy', '', word)])\n"
        "def wrong():\n"
        "    return 3\n"
    )
    (tmp_path / "toy-1.dist-info").mkdir()
    (tmp_path / "toy-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    (tmp_path / "toy-1.dist-info" / "entry_points.txt").write_text(
        "[trl_search.retrievers]\ntoy = toy:load\nwrong = toy:wrong\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert ids(load_retriever("toy", word="vesk").search(["vesk"], k=1)[0]) == ["toy"]
    with pytest.raises(UserError, match="unexpected keyword argument 'wrod'; its options are: word"):
        load_retriever("toy", wrod="vesk")
    with pytest.raises(TypeError, match="returned a int, not a Retriever"):
        load_retriever("wrong")
    with pytest.raises(UserError, match=r"There are: bm25, .*toy, .*wrong"):
        load_retriever("xyzzy")
