"""Whether what is to be searched can be searched here: packages, the index's files, one query to a server.

An index is not loaded for this. `train`, `sft`, `eval` and `serve` ask in their first second.
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
from trl_search.retrieval import resolve_retriever
from trl_search.retrieval.index.folder import read_manifest

_TIMEOUT_S = 5.0
_SERVERS = ("http", "qdrant", "opensearch")
# The modules whose absence is a problem, each with the extra that brings it.
_MODULES = {
    "dense": (("sentence_transformers", "dense"),),
    "qdrant": (("qdrant_client", "qdrant"),),
    "opensearch": (("opensearchpy", "opensearch"),),
}


def retriever_checks(searched: Searched) -> Iterator[Check]:
    """Every check of what a word means as something to search. The parts of a hybrid are looked at one by one."""
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
    """The index is whole, the server answers a query."""
    kind, said = searched.kind, searched.kind
    try:
        for part, options in _parts(kind, searched.options):
            if part in _SERVERS:
                for url in filter(None, [options.get("url"), *(options.get("urls") or [])]):
                    _connect(url)  # a retriever would wait for its server to come back
            if "index" in options:
                _check_files(Path(options["index"]).expanduser())
        if kind in _SERVERS:
            with contextlib.closing(searched.load()) as retriever:
                retriever.search(["probe"], 1)
            said = f"{searched.options.get('url', kind)} answers"
    except UserError as error:
        return Check("retriever", Status.PROBLEM, str(error))
    except Exception as error:  # the clients of three kinds of server have errors of their own
        where = searched.options.get("url") or kind
        said = " ".join(str(error).split()) or type(error).__name__
        return Check("retriever", Status.PROBLEM, f"{where}: {said}", "start its server: `trl-search serve`")
    return Check("retriever", Status.OK, said)


def _connect(url: str) -> None:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or url, port), timeout=_TIMEOUT_S).close()


def _check_files(folder: Path) -> None:
    """The files of an index have the sizes that its manifest names; their content is checked when it is opened."""
    resolve_retriever(folder)
    for name, size in read_manifest(folder).files.items():
        there = (folder / name).stat().st_size if (folder / name).exists() else None
        if there != size:
            raise UserError(
                f"{folder / name} should have {size} bytes and "
                f"{'is missing' if there is None else f'has {there}'}: copy or build it again"
            )


def _parts(kind: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The retriever itself, and those that it combines."""
    yield kind, options
    inner = [options.get("retriever"), *(options.get("retrievers") or [])]
    for part in inner:
        if isinstance(part, Mapping) and isinstance(part.get("kind"), str):
            yield from _parts(part["kind"], {name: value for name, value in part.items() if name != "kind"})
