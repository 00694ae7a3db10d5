"""BM25 as sparse vectors, for engines that compute inner products and document frequencies.

    passage   the weight of each term, from its count and the passage's length
    query     the count of each term
    engine    the inverse document frequency of each term, and the sum of products

`analyzer.py` makes the terms. The number of a term is a 32-bit hash, so no vocabulary is stored. Among ten million
terms, one in 430 shares its number with another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

from trl_search.retrieval.bm25.analyzer import Analyzer
from trl_search.retrieval.corpus.passages import Passages
from trl_search.types import Passage

K1, B = 1.2, 0.75  # as in tantivy and OpenSearch
LENGTH_SAMPLE = 100_000  # passages sampled for the mean length; BM25 needs no exact value


def term_counts(terms: Iterable[str]) -> dict[int, int]:
    """The count of each term, keyed by its number."""
    return dict(Counter(map(_number, terms)))


def mean_length(passages: Passages, analyzer: Analyzer) -> float:
    """The mean number of terms per passage, from a sample spread over the corpus."""
    step = max(1, len(passages) // LENGTH_SAMPLE)
    rows = range(0, len(passages), step)
    return max(1.0, sum(len(analyzer.split(passages[row].titled_text)[0]) for row in rows) / len(rows))


def weigh(passage: Passage, analyzer: Analyzer, mean: float) -> dict[int, float]:
    """The passage's half of BM25: the number of each term and its weight. Stop words do not count as length."""
    terms, stops = analyzer.split(passage.titled_text)
    longer = K1 * (1 - B + B * len(terms) / mean)
    return {number: count * (K1 + 1) / (count + longer) for number, count in term_counts(terms + stops).items()}


def _number(term: str) -> int:
    return int.from_bytes(hashlib.blake2b(term.encode(), digest_size=4).digest(), "big")
