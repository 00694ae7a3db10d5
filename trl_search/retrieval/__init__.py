"""Retrievers and the one way to get one by name: `load_retriever("bm25", index="indexes/wiki")`.

A kind is a function `(**options) -> Retriever`. Packages add kinds of their own through the entry-point group
`trl_search.retrievers`:

    [project.entry-points."trl_search.retrievers"]
    elastic = "my_package.elastic:load"
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from typing import Any

from trl_search.common.errors import UserError, unknown_name
from trl_search.retrieval.base import RetrievalError, Retriever

__all__ = ["RetrievalError", "Retriever", "load_retriever"]

ENTRY_POINTS = "trl_search.retrievers"
_BUILT_IN = {
    "bm25": "trl_search.retrieval.bm25.retriever:load",
    "dense": "trl_search.retrieval.dense.retriever:load",
    "http": "trl_search.retrieval.remote.http_retriever:load",
    "hybrid": "trl_search.retrieval.combine.hybrid:load",
    "opensearch": "trl_search.retrieval.engines.opensearch:load",
    "qdrant": "trl_search.retrieval.engines.qdrant:load",
    "rerank": "trl_search.retrieval.combine.rerank:load",
    "web": "trl_search.retrieval.web.retriever:load",
}


def load_retriever(kind: str, **options: Any) -> Retriever:
    """Loads a retriever by name.

    Args:
        kind (`str`): `"bm25"`, `"dense"`, `"hybrid"`, `"rerank"`, `"http"`, `"web"`, `"qdrant"`,
            `"opensearch"`, or a kind that an installed package declares.
        options: What that kind takes; an option it does not know is an error that lists those it does.

    Example:
        >>> retriever = load_retriever("bm25", index="indexes/wiki")
        >>> retriever.search(["who founded Orlune?"], k=3)
    """
    loaders = {**{entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}, **_BUILT_IN}
    if kind not in loaders:
        raise unknown_name("retriever", kind, loaders)
    module, _, function = loaders[kind].partition(":")
    load = getattr(importlib.import_module(module), function)
    signature = inspect.signature(load)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UserError(f"retriever {kind!r}: {error}; its options are {signature}") from None
    retriever = load(**options)
    if not isinstance(retriever, Retriever):
        raise TypeError(f"retriever {kind!r} ({loaders[kind]}) gave a {type(retriever).__name__}, not a Retriever")
    return retriever
