"""What the adapters of search engines on other hosts (`qdrant.py`, `opensearch.py`) have in common.

An engine ranks rows, the numbers of passages in the corpus, and breaks ties as it likes, on several shards differently
each time. So more is fetched than asked for, until no tie reaches past it, and scores that are equal stand in corpus
order: what `dense.py` does over one index on this machine.

What an engine was loaded with is written into the engine itself, so a gateway needs its address and nothing on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tenacity

from trl_search.common.errors import UserError
from trl_search.retrieval.base import Unavailable
from trl_search.retrieval.corpus.passages import ROWS
from trl_search.retrieval.dense.retriever import DECIMALS, MARGIN, order_ties
from trl_search.retrieval.index.build_folder import SCRATCH

TRIES = 3
TROUBLE = frozenset({429, 502, 503, 504})
_JOURNAL = "loaded.json"

Hits = tuple[np.ndarray, np.ndarray]  # scores, best first, and their rows


def best_rows(
    fetch: Callable[[list[int], int], Sequence[Hits]], queries: int, k: int, most: int
) -> list[list[tuple[int, float]]]:
    """The best `k` rows of each query with their scores, equal scores in corpus order.

    Args:
        fetch (`Callable`): `fetch(queries, n)` gives the best `n` of each query, by the queries' numbers.
        queries (`int`): How many there are.
        k (`int`): Rows wanted.
        most (`int`): Rows an engine gives at most; of a longer tie those that it gave first.
    """
    ranked: list[list[tuple[int, float]]] = [[] for _ in range(queries)]
    pending, wanted = list(range(queries)), k + MARGIN
    while pending:
        wanted = min(wanted, most)
        undecided = []
        for query, (scores, rows) in zip(pending, fetch(pending, wanted), strict=True):
            order, best = order_ties(scores, rows)
            if len(order) == wanted < most and len(order) > k and best[k - 1] == best[-1]:
                undecided.append(query)
                continue
            ranked[query] = [
                (int(rows[at]), round(float(score), DECIMALS)) for at, score in zip(order[:k], best[:k], strict=True)
            ]
        pending, wanted = undecided, 8 * wanted
    return ranked


def repeat_trouble(ask: Callable[[], Any]) -> Any:
    """Asks, and asks again what raised `Unavailable`: three times in all. To search or to load twice does no harm."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )
    return retrying(ask)


def corpus_hash(folder: Path) -> str:
    """Of the passages as an index folder holds them: `manifest.json` has the same under `corpus`."""
    with open(folder / ROWS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_another_corpus(found: Any, expected: str, name: str, folder: str | Path) -> None:
    if found != expected:
        raise UserError(
            f"{name} was loaded with other passages than {folder}: another build has replaced it; load that one's "
            "folder, or load the engine again"
        )


class Journal:
    """How far the loading of an engine has come, in the scratch of a build: a killed one goes on from there."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / SCRATCH / _JOURNAL
        self._path.parent.mkdir(exist_ok=True)
        there = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        self.made: bool = there.get("made", False)  # the collection is ours, and empty or half full
        self.rows: int = there.get("rows", 0)

    def note(self, rows: int) -> None:
        self.made, self.rows = True, rows
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"made": True, "rows": rows}), encoding="utf-8")
        os.replace(new, self._path)
