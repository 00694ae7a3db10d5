"""Compares two records of settings: the names of the changed settings, with both values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields each difference with its path. Dicts are compared by key, lists of the same length by position.

    Example:
        >>> list(differences({"k": 3, "part": [{"k1": 1.5}]}, {"k": 3, "part": [{"k1": 1.2}]}))
        [('part.0.k1', 1.5, 1.2)]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from differences(one, other, f"{name}.{place}".lstrip("."))
    elif old != new:
        yield name, old, new
