"""Retrievers, and the two ways to get one.

    load_retriever("bm25", index="indexes/wiki")     by kind, with that kind's options
    open_retriever("indexes/wiki")                   by one word, as on a command line: a folder, an address or a kind

`registry.py` lists the kinds, and says how a package adds one.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError, nearest_names
from trl_search.common.files import home_expanded
from trl_search.retrieval.base import RetrievalError, Retriever
from trl_search.retrieval.index.folder import read_manifest
from trl_search.retrieval.registry import RETRIEVERS

__all__ = [
    "RETRIEVERS",
    "RetrievalError",
    "Retriever",
    "as_retriever",
    "load_retriever",
    "open_retriever",
    "resolve_retriever",
]


def load_retriever(kind: str, **options: Any) -> Retriever:
    """Loads a retriever by kind.

    Args:
        kind (`str`): `"bm25"`, `"dense"`, `"hybrid"`, `"rerank"`, `"http"`, `"web"`, `"qdrant"`,
            `"opensearch"`, or a kind that an installed package adds.
        options: The options of that kind. A path may begin with `~`.

    Raises:
        UserError: for an unknown kind or option; the message lists those that exist.

    Example:
        >>> retriever = load_retriever("bm25", index="indexes/wiki")
        >>> retriever.search(["who founded Orlune?"], k=3)
    """
    load = RETRIEVERS.get(kind)
    signature = inspect.signature(load).replace(return_annotation=inspect.Signature.empty)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UserError(f"retriever {kind!r}: {error}; its options are {signature}") from None
    retriever = load(**{name: home_expanded(value) for name, value in options.items()})
    if not isinstance(retriever, Retriever):
        raise TypeError(f"retriever {kind!r} gave a {type(retriever).__name__}, not a Retriever")
    return retriever


def open_retriever(word: str | Path, options: Mapping[str, Any] | None = None) -> Retriever:
    """Loads the retriever that one word names: an index folder, the address of a server, or a kind.

    Args:
        word (`str | Path`): `"indexes/wiki"`, `"http://localhost:8000"` or `"bm25"`. Where a folder has the name of a
            kind, the kind is meant; write `./bm25` for the folder.
        options (`Mapping`, *optional*): Further options of the kind.

    Example:
        >>> open_retriever("indexes/wiki").search(["who founded Orlune?"], k=3)
        >>> open_retriever("web", {"provider": "serper"})
    """
    kind, resolved = resolve_retriever(word, options)
    return load_retriever(kind, **resolved)


def as_retriever(value: Any) -> Retriever:
    """A retriever as it is, and a word as [`open_retriever`] reads it.

    Raises:
        UserError: for anything else; says how to make a retriever of it.
    """
    if isinstance(value, Retriever):
        return value
    if isinstance(value, str | Path):
        return open_retriever(value)
    if isinstance(value, type) and issubclass(value, Retriever):
        raise UserError(f"retriever={value.__name__} is a class: give an instance, {value.__name__}(...)")
    if isinstance(value, list | tuple):
        raise UserError('retriever is a list: load_retriever("bm25", passages=[...]) searches passages in memory')
    raise UserError(f"a retriever is an instance of a subclass of Retriever, or a word, and this is {value!r:.80}")


def resolve_retriever(word: str | Path, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The kind and the options that `open_retriever` would load. Of a folder, its manifest is read and nothing else.

    Raises:
        UserError: if the word is neither, names a folder that is not a finished index, or names one place and the
            options another.

    Example:
        >>> resolve_retriever("http://localhost:8000", {"timeout_s": 5.0})
        ('http', {'url': 'http://localhost:8000', 'timeout_s': 5.0})
    """
    name, given = str(word), dict(options or {})
    for option in ("index", "faiss_file", "url"):
        if not isinstance(given.get(option, ""), str | Path):
            raise UserError(f"retriever_options: {option} is a text, and this is {given[option]!r:.60}")
    if name.startswith(("http://", "https://")):
        return "http", _with(given, "url", name)
    if isinstance(word, str) and name in RETRIEVERS:
        return name, given
    folder = Path(home_expanded(name))
    if folder.is_dir() or isinstance(word, Path) or os.sep in name or name.startswith((".", "~")):
        return read_manifest(folder).kind, _with(given, "index", str(folder))
    nearest = nearest_names(name, RETRIEVERS.names(), 1)
    hint = f"did you mean {nearest[0]!r}? Give" if nearest else "give"
    raise UserError(
        f"{name!r} is no retriever: {hint} an index folder, the address of a server (http://host:8000), or one of the "
        f"kinds {', '.join(RETRIEVERS.names())}"
    )


def _with(given: Mapping[str, Any], option: str, value: str) -> dict[str, Any]:
    """The options and the place that the word names; a recipe may still hold those of another place."""
    if given.get(option, value) != value:
        raise UserError(
            f"retriever {value} and the {option} {given[option]} of retriever_options are two places to search: give "
            "one; --retriever_options '{}' clears those of a recipe"
        )
    return {option: value, **given}
