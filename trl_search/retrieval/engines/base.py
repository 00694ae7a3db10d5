"""Shared code of the adapters for search engines on other hosts (`qdrant.py`, `opensearch.py`).

The engine itself records what was loaded into it, so a gateway needs only its address and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.retrying import repeated
from trl_search.retrieval.base import RetrievalError, Unavailable
from trl_search.retrieval.index.folder import read_manifest

ABOUT = "trl_search"  # the key under which an engine records what was loaded into it
MAX_PASSAGES = 20_000  # per answer: `MAX_ANSWER_BYTES` is enough for 13 kB each


def repeat_trouble(ask: Callable[[], Any]) -> Any:
    """Retries a request that raised `Unavailable`. Searching or loading twice does no harm."""
    return repeated(ask, on=Unavailable)


def from_folder(
    index: str | Path | None, kind: str, url: str | None, collection: str | None, path: str | Path | None = None
) -> tuple[str | None, str | None, str | Path | None, str | None]:
    """Returns address, collection, path and corpus hash; missing ones are read from the index folder.

    Raises:
        UserError: for a folder of another kind.
    """
    if index is None:
        return url, collection, path, None
    manifest = read_manifest(index)
    if manifest.kind != kind:
        raise UserError(f"{index} is an index of kind {manifest.kind!r}, not {kind!r}; load it as such")
    if url is None and path is None:
        url, path = manifest.options["url"], manifest.options.get("path")
    return url, collection or manifest.options["collection"], path, manifest.corpus.sha256


def find_about(read: Callable[[], dict[str, Any] | None], name: str, remark: str = "") -> dict[str, Any]:
    """Returns the engine's record of what was loaded into it, from `read()`.

    Args:
        name (`str`): The collection, for messages: `"the collection 'wiki'"`.
        remark (`str`): Another possible reason for a missing record.

    Raises:
        UserError: if there is no such collection, or another program made it.
    """
    try:
        about = repeat_trouble(read)
    except Unavailable:
        raise
    except RetrievalError as error:
        raise UserError(f"there is no {name.removeprefix('the ')} to search: {error}") from error
    if about is None:
        raise UserError(f"{name} was not loaded by `trl-search index`, or is being loaded now{remark}")
    return dict(about)


def refuse_another_corpus(about: dict[str, Any], expected: str | None, name: str, folder: str | Path | None) -> None:
    """Raises if the engine holds other passages than the index folder says.

    Raises:
        UserError: if the corpus differs.
    """
    if expected is not None and about["corpus"] != expected:
        raise UserError(
            f"{name} was loaded with other passages than {folder}: another build has replaced it; open the index "
            "folder of that build, or load the engine again"
        )
