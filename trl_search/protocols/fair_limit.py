"""Divides the tokens of an observation among its documents."""

from __future__ import annotations

from collections.abc import Sequence

MIN_DOCUMENT_TOKENS = 16


def fair_limit(lengths: Sequence[int], room: int) -> tuple[int, int]:
    """The largest limit L and number n such that the first n lengths, each cut to L, sum to at most `room`.

    n counts all lengths unless L would then be below `MIN_DOCUMENT_TOKENS` and cut something.

    Example:
        >>> fair_limit([50, 200, 300], 450)
        (200, 3)
    """
    for kept in range(len(lengths), 0, -1):
        remaining, limit = room, 0
        for i, length in enumerate(sorted(lengths[:kept])):
            limit = remaining // (kept - i)
            if length > limit:
                break
            # A document shorter than its share leaves room for the longer ones.
            remaining -= length
        else:
            return max(lengths[:kept]), kept
        if limit >= MIN_DOCUMENT_TOKENS:
            return limit, kept
    return 0, 0
