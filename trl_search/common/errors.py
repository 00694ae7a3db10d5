"""`UserError`: what was asked for cannot be done. The message says why, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a file, a recipe, a dataset, a name. The command line prints its message alone,
    without a traceback, so the message names the cause and the remedy."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist: what exists, and the nearest of it.

    Example:
        >>> raise unknown_name("reward", "fromat", ["em", "f1", "format"])
        UserError: unknown reward 'fromat': did you mean 'format'? There are: em, f1, format.
    """
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f": did you mean {nearest[0]!r}?" if nearest else "."
    return UserError(f"unknown {kind} {name!r}{hint} There are: {', '.join(names)}.")
