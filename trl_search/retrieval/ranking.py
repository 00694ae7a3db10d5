"""The best k rows of a ranking that breaks ties in its own way: fetch more until no tie reaches past k, then sort.

    asked for 3:   fetched  9.1  7.0  7.0  7.0  7.0     the third ties with the last one fetched: fetch 8 times as many
                   fetched  9.1  7.0  7.0  7.0  7.0  7.0  4.2  ...       the tie ends: its rows in corpus order

FAISS, tantivy and search engines order equal scores by how their data happens to lie. Passages of equal score are to
come in corpus order, whatever k is and whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MARGIN = 13  # fetched beyond k at first; most ties end within it
GROWTH = 8
TIE = 2e-6  # what batching changes in a score of 1 is a fifth of that; two different passages are far more apart
DECIMALS = 5

Hits = tuple[np.ndarray, np.ndarray]  # scores, best first, and their rows


def best_rows(
    fetch: Callable[[list[int], int], Sequence[Hits]],
    queries: int,
    k: int,
    most: int,
    *,
    tie: float = TIE,
    decimals: int | None = DECIMALS,
) -> list[list[tuple[int, float]]]:
    """The best `k` rows of each query with their scores, equal scores in corpus order.

    Args:
        fetch (`Callable`): `fetch(queries, n)` returns the best `n` hits of each of these queries, named by number;
            fewer where there are no more.
        queries (`int`): How many queries there are.
        k (`int`): Rows wanted per query.
        most (`int`): Rows that are fetched at most. In a tie that is longer, those that came first are taken.
        tie (`float`): Scores that differ by less, relative to the larger, are equal.
        decimals (`int`, *optional*): Decimals that scores are rounded to; by default those that batching leaves alone.
    """
    ranked: list[list[tuple[int, float]]] = [[] for _ in range(queries)]
    pending, wanted = list(range(queries)), k + MARGIN
    while pending:
        wanted = min(wanted, most)
        undecided = []
        for query, (scores, rows) in zip(pending, fetch(pending, wanted), strict=True):
            order, best = order_ties(scores, rows, tie)
            if len(order) == wanted < most and len(order) > k and best[k - 1] == best[-1]:
                undecided.append(query)
                continue
            ranked[query] = [
                (int(rows[at]), float(score) if decimals is None else round(float(score), decimals))
                for at, score in zip(order[:k], best[:k], strict=True)
            ]
        pending, wanted = undecided, GROWTH * wanted
    return ranked


def order_ties(scores: np.ndarray, rows: np.ndarray, tie: float = TIE) -> tuple[np.ndarray, np.ndarray]:
    """Puts scores that come best first, and within `tie` of the best among them are equal, in order of their rows.

    Rounding would not do: wherever it cuts, two equal scores that differ in the last bit may fall to both sides.

    Returns:
        `(order, best)`: positions in `scores`, and for each the score of the best it is equal to.
    """
    best = scores.astype(np.float64)
    if tie:
        for at in range(1, len(best)):
            if best[at - 1] - best[at] <= tie * max(1.0, abs(best[at - 1])):
                best[at] = best[at - 1]
    order = np.lexsort((rows, -best))
    return order, best[order]
