"""Results by (query, k), in memory, the least recently used out first.

What is kept is the JSON that was sent, as bytes: a hit costs no formatting, and memory is bounded by what it really
takes and not by a number of entries. The keys carry the fingerprint of the index, so that results of another index, or
of the same one rebuilt, are never found.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

_ENTRY_BYTES = 300  # of the key and the dictionaries around one entry


class _Entry(NamedTuple):
    result: bytes
    size: int  # cachetools asks an entry for its size, and the query is in its key


class ResultCache:
    """At most `max_bytes` of results; with 0 it keeps nothing."""

    def __init__(self, max_bytes: int, fingerprint: str) -> None:
        from cachetools import LRUCache

        self._fingerprint, self._max_bytes = fingerprint, max_bytes
        self._kept: LRUCache[tuple[str, str, int, bool], _Entry] = LRUCache(max_bytes, lambda entry: entry.size)
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size_bytes(self) -> int:
        return int(self._kept.currsize)

    def get(self, query: str, k: int, return_scores: bool) -> bytes | None:
        entry = self._kept.get((self._fingerprint, query, k, return_scores))
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        return entry.result

    def put(self, query: str, k: int, return_scores: bool, result: bytes) -> None:
        size = sys.getsizeof(query) + len(result) + _ENTRY_BYTES
        if size <= self._max_bytes:
            self._kept[self._fingerprint, query, k, return_scores] = _Entry(result, size)
