"""An in-memory LRU cache of results by (query, k).

The cache stores the bytes of the JSON that was sent, so that a hit needs no formatting and the limit can be in bytes.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

_ENTRY_BYTES = 300  # for an entry's key and its dictionary slots


class _Entry(NamedTuple):
    result: bytes
    size: int  # including the query in the key, because cachetools sees only the entry


class ResultCache:
    """Stores at most `max_bytes` of results; with 0, nothing."""

    def __init__(self, max_bytes: int) -> None:
        from cachetools import LRUCache

        self._max_bytes = max_bytes
        self._kept: LRUCache[tuple[str, int, bool], _Entry] = LRUCache(max_bytes, lambda entry: entry.size)
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        return int(self._kept.currsize)

    def get(self, query: str, k: int, return_scores: bool) -> bytes | None:
        entry = self._kept.get((query, k, return_scores))
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        return entry.result

    def put(self, query: str, k: int, return_scores: bool, result: bytes) -> None:
        size = sys.getsizeof(query) + len(result) + _ENTRY_BYTES
        if size <= self._max_bytes:
            self._kept[query, k, return_scores] = _Entry(result, size)
