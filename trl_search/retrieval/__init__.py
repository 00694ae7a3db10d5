"""Retrievers, and the two ways to get one.

    load_retriever("bm25", index="indexes/wiki")     by kind, with the options of that kind
    open_retriever("indexes/wiki")                   by one word, as on the command line: a folder, address or kind

`registry.py` lists the kinds and explains how a package adds one.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError, nearest_names
from trl_search.common.files import home_expanded
from trl_search.common.registry import check_options
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
        UserError: for an unknown kind or option; the message lists the valid ones.

    Example:
        >>> retriever = load_retriever("bm25", index="indexes/wiki")
        >>> retriever.search(["who founded Orlune?"], k=3)
    """
    if isinstance(kind, str) and kind not in RETRIEVERS and (os.sep in kind or Path(kind).is_dir()):
        raise UserError(
            f"{kind!r} is not a kind of retriever: an index folder or the address of a server is opened by "
            f"open_retriever({kind!r}), imported from trl_search.retrieval"
        )
    load = RETRIEVERS.get(kind)
    check_options(f"retriever {kind!r}", load, options)
    retriever = load(**{name: home_expanded(value) for name, value in options.items()})
    if not isinstance(retriever, Retriever):
        raise TypeError(f"retriever {kind!r} returned a {type(retriever).__name__}, not a Retriever")
    return retriever


def open_retriever(word: str | Path, options: Mapping[str, Any] | None = None) -> Retriever:
    """Loads the retriever that one word names: an index folder, the address of a server, or a kind.

    Args:
        word (`str | Path`): `"indexes/wiki"`, `"http://localhost:8000"` or `"bm25"`. If a folder has the name of a
            kind, the kind takes precedence; write `./bm25` for the folder.
        options (`Mapping`, *optional*): Further options of the kind.

    Example:
        >>> open_retriever("indexes/wiki").search(["who founded Orlune?"], k=3)
        >>> open_retriever("web", {"provider": "serper"})
    """
    kind, resolved = resolve_retriever(word, options)
    return load_retriever(kind, **resolved)


def as_retriever(value: Any) -> Retriever:
    """Returns a retriever unchanged, and opens a word with [`open_retriever`].

    Raises:
        UserError: for anything else; the message says how to make a retriever from it.
    """
    if isinstance(value, Retriever):
        return value
    if isinstance(value, str | Path):
        return open_retriever(value)
    if isinstance(value, type) and issubclass(value, Retriever):
        raise UserError(f"retriever={value.__name__} is a class: give an instance, {value.__name__}(...)")
    if isinstance(value, list | tuple):
        raise UserError('retriever is a list: load_retriever("bm25", passages=[...]) searches passages in memory')
    raise UserError(f"a retriever must be an instance of a subclass of Retriever, or a word, not {value!r:.80}")


def resolve_retriever(word: str | Path, options: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The kind and the options that `open_retriever` would load. Of an index folder, only the manifest is read.

    Raises:
        UserError: if the word is no folder, address or kind, if the folder is not a finished index, or if the word and
            the options name different places.

    Example:
        >>> resolve_retriever("http://localhost:8000", {"timeout_s": 5.0})
        ('http', {'url': 'http://localhost:8000', 'timeout_s': 5.0})
    """
    name, given = str(word), dict(options or {})
    for option in ("index", "faiss_file", "url"):
        if not isinstance(given.get(option, ""), str | Path):
            raise UserError(f"retriever_options: {option} must be a string, not {given[option]!r:.60}")
    if name.startswith(("http://", "https://")):
        return "http", _with(given, "url", name)
    if isinstance(word, str) and name in RETRIEVERS:
        return name, given
    folder = Path(home_expanded(name))
    if folder.is_file():
        raise UserError(
            f"{name} is a file, and a retriever searches an index: build one with trl-search index --corpus "
            f"{shlex.quote(name)} --output NEW_FOLDER, and give NEW_FOLDER"
        )
    if folder.is_dir() or isinstance(word, Path) or os.sep in name or name.startswith((".", "~")):
        return read_manifest(folder).kind, _with(given, "index", str(folder))
    nearest = nearest_names(name, RETRIEVERS.names(), 1)
    hint = f"did you mean {nearest[0]!r}? Give" if nearest else "give"
    raise UserError(
        f"{name!r} is not a retriever, and not a folder here: {hint} an index folder, the address of a server "
        f"(http://host:8000), or one of the kinds {', '.join(RETRIEVERS.names())}"
    )


def _with(given: Mapping[str, Any], option: str, value: str) -> dict[str, Any]:
    """Adds the place that the word names to the options. A recipe's options may still name a different place."""
    if given.get(option, value) != value:
        raise UserError(
            f"retriever {value} and the {option} {given[option]} of retriever_options are two places to search: give "
            "one; --retriever_options '{}' clears the options of a recipe"
        )
    return {option: value, **given}
