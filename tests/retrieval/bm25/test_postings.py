"""The best rows by postings: what adding everything up and sorting it gives, for both backends to the bit."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_search.common.errors import UserError
from trl_search.retrieval.bm25.postings import Postings, choose_backend

BACKENDS = ["numpy", "numba"] if importlib.util.find_spec("numba") else ["numpy"]
PASSAGES = 30
# A term's rows. Few or many of them, so that queries point to less than all rows and to more.
TERM = st.one_of(st.sets(st.integers(0, PASSAGES - 1), min_size=1, max_size=4), st.just(set(range(PASSAGES))))


def postings(terms: list[set[int]], scores: np.ndarray, backend: str) -> Postings:
    rows = np.array([row for term in terms for row in sorted(term)], dtype=np.int32)
    starts = np.cumsum([0, *map(len, terms)], dtype=np.int64)
    return Postings(rows, scores[: len(rows)], starts, PASSAGES, backend)


@settings(max_examples=150)
@given(
    terms=st.lists(TERM, min_size=1, max_size=5),
    # Halves and quarters: ties are common, and sums are exact.
    quarters=st.lists(st.integers(1, 8), min_size=5 * PASSAGES, max_size=5 * PASSAGES),
    queries=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=4),
    k=st.integers(1, 2 * PASSAGES),
    backend=st.sampled_from(BACKENDS),
)
def test_the_best_are_those_of_adding_up_and_sorting(terms, quarters, queries, k, backend):
    scores = np.array(quarters, dtype=np.float32) / 4
    queries = [[term % len(terms) for term in query] for query in queries]
    index = postings(terms, scores, backend)
    offsets = np.cumsum([0, *map(len, terms)])
    expected = []
    for query in queries:
        totals = np.zeros(PASSAGES, dtype=np.float32)
        for term in query:
            totals[sorted(terms[term])] += scores[offsets[term] : offsets[term + 1]]
        best = [row for row in np.argsort(-totals, kind="stable")[:k] if totals[row] > 0]
        expected.append([(row, totals[row]) for row in best])
    assert index.best(queries, k) == expected
    assert index.best(queries, k) == expected, "a search left something behind"


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_plain_python(backend):
    ((found,),) = postings([{3}], np.ones(1, dtype=np.float32), backend).best([[0]], 5)
    assert found == (3, 1.0) and [type(value) for value in found] == [int, float]


def test_an_interrupted_search_leaves_nothing_behind(monkeypatch):
    index = postings([{0, 1}, {2}], np.ones(3, dtype=np.float32), "numpy")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "flatnonzero", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.best([[0]], 3)
    assert index.best([[1]], 3) == [[(2, 1.0)]]


def test_a_backend_is_taken_at_its_word():
    assert choose_backend("numpy") == "numpy" and choose_backend(None) in BACKENDS
    with pytest.raises(UserError, match="unknown BM25 backend 'jax'"):
        choose_backend("jax")


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs numba")
def test_what_was_compiled_is_kept_for_the_next_process(tmp_path, monkeypatch):
    from trl_search.retrieval.bm25.compiled_search import compiled, find

    assert find.stats.cache_path
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    first, next_one = compiled(twice), compiled(twice)
    assert first(4) == next_one(4) == 8
    assert first.stats.cache_misses and next_one.stats.cache_hits and not next_one.stats.cache_misses


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs numba")
def test_where_nothing_can_be_kept_it_is_compiled_each_time():
    from trl_search.retrieval.bm25.compiled_search import compiled

    made: dict = {}
    exec("def twice(number):\n    return 2 * number", made)  # of no file, so numba finds no folder for it
    assert compiled(made["twice"])(4) == 8


def twice(number: int) -> int:
    return 2 * number
