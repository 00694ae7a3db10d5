"""Errors with a message for users. The command line prints only that message; other errors keep their traceback.

Explained                   the message names the cause and the remedy
  UserError                 a mistake in the user's input: a file, a recipe, a dataset, a name
  RetrievalError            a search failed (retrieval/base.py)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_FEW = 30  # names that fit into two lines of a terminal


class Explained(Exception):
    """An error whose message tells the user how to fix it."""


class UserError(Explained, ValueError):
    """A mistake in the user's input. The message names the cause and the remedy."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for an unknown name. It lists the nearest names, and all names if they are few.

    Example:
        >>> raise unknown_name("reward", "fromat", ["em", "f1", "format"])
        UserError: unknown reward 'fromat': did you mean 'format'? There are: em, f1, format.
    """
    names = sorted(known)
    parts = name.split(",") if isinstance(name, str) and "," in name else []
    if parts and all(part.strip() in names for part in parts):
        return UserError(f"unknown {kind} {name!r}: give separate words, {' '.join(part.strip() for part in parts)}")
    nearest = nearest_names(name, names, 1 if len(names) <= _FEW else 3) if isinstance(name, str) else []
    hint = f": did you mean {' or '.join(map(repr, nearest))}?" if nearest else "."
    return UserError(f"unknown {kind} {name!r}{hint}{_listed(names, nearest)}")


def nearest_names(name: str, names: Sequence[str], most: int) -> list[str]:
    """The names that `name` may be a misspelling of, nearest first."""
    return difflib.get_close_matches(name, names, n=most, cutoff=0.5)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _listed(names: Sequence[str], nearest: Sequence[str]) -> str:
    """The list of all names if they are few, else of three examples if there is no near name."""
    if len(names) <= _FEW:
        return f" There are: {', '.join(names)}."
    return "" if nearest else f" There are {len(names)}, such as {', '.join(names[:3])}."
