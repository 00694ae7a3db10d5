"""The best rows by postings equal those by summing and sorting all scores, bit for bit, with both backends."""

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
# The rows of a term: few or many, so that a query has fewer or more postings than there are rows.
TERM = st.one_of(st.sets(st.integers(0, PASSAGES - 1), min_size=1, max_size=4), st.just(set(range(PASSAGES))))


def postings(terms: list[set[int]], scores: np.ndarray, backend: str) -> Postings:
    rows = np.array([row for term in terms for row in sorted(term)], dtype=np.int32)
    starts = np.cumsum([0, *map(len, terms)], dtype=np.int64)
    return Postings(rows, scores[: len(rows)], starts, PASSAGES, backend)


@settings(max_examples=150)
@given(
    terms=st.lists(TERM, min_size=1, max_size=5),
    # Multiples of a quarter: ties are common, and sums are exact.
    quarters=st.lists(st.integers(1, 8), min_size=5 * PASSAGES, max_size=5 * PASSAGES),
    queries=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=4),
    k=st.integers(1, 2 * PASSAGES),
    backend=st.sampled_from(BACKENDS),
)
def test_the_best_rows_equal_those_by_summing_and_sorting(terms, quarters, queries, k, backend):
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
    assert index.best(queries, k) == expected, "a search left scores behind"


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_plain_python_values(backend):
    ((found,),) = postings([{3}], np.ones(1, dtype=np.float32), backend).best([[0]], 5)
    assert found == (3, 1.0) and [type(value) for value in found] == [int, float]


def test_an_interrupted_search_leaves_no_scores_behind(monkeypatch):
    index = postings([{0, 1}, {2}], np.ones(3, dtype=np.float32), "numpy")

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "flatnonzero", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.best([[0]], 3)
    assert index.best([[1]], 3) == [[(2, 1.0)]]


def test_a_backend_is_chosen_by_name():
    assert choose_backend("numpy") == "numpy" and choose_backend(None) in BACKENDS
    with pytest.raises(UserError, match="unknown BM25 backend 'jax'"):
        choose_backend("jax")


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs numba")
def test_compiled_code_is_cached_for_the_next_process(tmp_path, monkeypatch):
    from trl_search.retrieval.bm25.compiled_search import compiled, find

    assert find.stats.cache_path
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    first, next_one = compiled(twice), compiled(twice)
    assert first(4) == next_one(4) == 8
    assert first.stats.cache_misses and next_one.stats.cache_hits and not next_one.stats.cache_misses


@pytest.mark.skipif(len(BACKENDS) < 2, reason="needs numba")
def test_without_a_cache_folder_the_code_is_compiled_each_time():
    from trl_search.retrieval.bm25.compiled_search import compiled

    made: dict = {}
    exec("def twice(number):\n    return 2 * number", made)  # not from a file, so numba has no cache folder
    assert compiled(made["twice"])(4) == 8


def twice(number: int) -> int:
    return 2 * number
