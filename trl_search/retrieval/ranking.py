"""The best k rows, with ties in corpus order: fetches more rows until no tie extends past k, then sorts.

    k = 3:         fetched  9.1  7.0  7.0  7.0  7.0     the third ties with the last one fetched: fetch 8 times as many
                   fetched  9.1  7.0  7.0  7.0  7.0  7.0  4.2  ...       the tie ends: its rows in corpus order

FAISS, tantivy and search engines order equal scores by their storage layout. Here passages of equal score come in
corpus order, whatever k is and whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MARGIN = 13  # fetched beyond k at first; most ties end within it
GROWTH = 8
TIE = 2e-6  # 5 times what batching changes in a score of 1; scores of different passages differ by far more
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
        fetch (`Callable`): `fetch(queries, n)` returns the best `n` hits of each of these queries, given by number;
            fewer if there are no more.
        queries (`int`): The number of queries.
        k (`int`): Rows wanted per query.
        most (`int`): Most rows to fetch. In a longer tie, the rows that came first are taken.
        tie (`float`): Scores are equal if they differ by at most this, times the larger score if that exceeds 1.
        decimals (`int`, *optional*): Decimals that scores are rounded to; the default hides what batching changes.
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
    """Sorts scores, given best first, so that ties are in the order of their rows.

    Rounding does not work: two equal scores that differ in the last bit may round to different values.

    Returns:
        `(order, best)`: positions in `scores`, and for each the best score that it is tied with.
    """
    best = scores.astype(np.float64)
    if tie:
        for at in range(1, len(best)):
            if best[at - 1] - best[at] <= tie * max(1.0, abs(best[at - 1])):
                best[at] = best[at - 1]
    order = np.lexsort((rows, -best))
    return order, best[order]
