"""Results by (query, k), in memory, the least recently used out first.

The cache keeps the bytes of the JSON that was sent. So a hit needs no formatting, and the limit is one of memory, not
of entries.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

_ENTRY_BYTES = 300  # for the key of an entry and its place in dictionaries


class _Entry(NamedTuple):
    result: bytes
    size: int  # with the query, which is in the key: cachetools sees only the entry


class ResultCache:
    """At most `max_bytes` of results; with 0 it keeps nothing."""

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
