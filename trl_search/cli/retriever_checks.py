"""Checks whether a retriever can be used here: packages, files of the index, one query to a server.

No index is loaded. `train`, `sft`, `eval` and `serve` run these checks first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trl_search.cli.preflight import Check, Status
from trl_search.common.errors import UserError
from trl_search.config.searched import Searched
from trl_search.retrieval.index.folder import check_sizes, read_manifest

_TIMEOUT_S = 5.0
_SERVERS = ("http", "qdrant", "opensearch")
# The modules that each kind needs, with the extra that installs them.
_MODULES = {
    "dense": (("sentence_transformers", "dense"),),
    "qdrant": (("qdrant_client", "qdrant"),),
    "opensearch": (("opensearchpy", "opensearch"),),
}


def retriever_checks(searched: Searched) -> Iterator[Check]:
    """Runs every check of a retriever and of the retrievers that it combines."""
    yield from (
        check for kind, options in _parts(searched.kind, searched.options) for check in _packages(kind, options)
    )
    yield _check_reach(searched)


def _packages(kind: str, options: Mapping[str, Any]) -> Iterator[Check]:
    wanted = list(_MODULES.get(kind, ()))
    if kind == "dense" and {"index", "faiss_file"} & options.keys():
        wanted += [("faiss", "faiss")]
    if kind == "web":
        wanted += [("ddgs", "web")] if options.get("provider", "ddgs") == "ddgs" else []
        wanted += [("trafilatura", "web")] if options.get("pages") else []
    for module, extra in wanted:
        if importlib.util.find_spec(module) is None:
            yield package_problem(f"retriever: {kind}", module, extra)


def package_problem(what: str, module: str, extra: str) -> Check:
    return Check("packages", Status.PROBLEM, f"{what} needs {module}", f"pip install 'trl-search[{extra}]'")


def _check_reach(searched: Searched) -> Check:
    """Checks that the index is complete and that the server answers a query."""
    kind, said = searched.kind, searched.kind
    try:
        for part, options in _parts(kind, searched.options):
            if part in _SERVERS:
                for url in filter(None, [options.get("url"), *(options.get("urls") or [])]):
                    _connect(url)  # fails at once; a retriever would wait for the server
            if "index" in options:
                folder = Path(options["index"]).expanduser()
                check_sizes(folder, read_manifest(folder))  # their content is checked on opening
        if kind in _SERVERS:
            with contextlib.closing(searched.load()) as retriever:
                retriever.search(["probe"], 1)
            said = f"{searched.options.get('url', kind)} answers"
    except UserError as error:
        return Check("retriever", Status.PROBLEM, str(error))
    except Exception as error:  # each server's client raises other errors
        where = searched.options.get("url") or kind
        said = " ".join(str(error).split()) or type(error).__name__
        return Check("retriever", Status.PROBLEM, f"{where}: {said}", "start its server: `trl-search serve`")
    return Check("retriever", Status.OK, said)


def _connect(url: str) -> None:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or url, port), timeout=_TIMEOUT_S).close()


def _parts(kind: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the retriever and those that it combines."""
    yield kind, options
    inner = [options.get("retriever"), *(options.get("retrievers") or [])]
    for part in inner:
        if isinstance(part, Mapping) and isinstance(part.get("kind"), str):
            yield from _parts(part["kind"], {name: value for name, value in part.items() if name != "kind"})
