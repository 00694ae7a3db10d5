"""What the adapters of search engines on other hosts (`qdrant.py`, `opensearch.py`) have in common.

What an engine was loaded with is written into the engine itself, so a gateway needs its address and nothing on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.retrying import repeated
from trl_search.retrieval.base import RetrievalError, Unavailable
from trl_search.retrieval.index.folder import read_manifest

ABOUT = "trl_search"  # the key under which an engine keeps what it was loaded with


def repeat_trouble(ask: Callable[[], Any]) -> Any:
    """Repeats a request that raised `Unavailable`. Searching or loading twice does no harm."""
    return repeated(ask, on=Unavailable)


def from_folder(
    index: str | Path | None, kind: str, url: str | None, collection: str | None, path: str | Path | None = None
) -> tuple[str | None, str | None, str | Path | None, str | None]:
    """Address, collection, path and corpus hash. Where they are not given, those of the index folder are taken.

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
    """What an engine was loaded with, as `read()` finds it in the engine.

    Args:
        name (`str`): Of the collection, for messages: `"the collection 'wiki'"`.
        remark (`str`): Another reason for which an engine may know nothing.

    Raises:
        UserError: if there is no such collection, or if another program made it.
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
    """Fails if the engine was loaded with other passages than the index folder says.

    Raises:
        UserError: if the corpus is another one.
    """
    if expected is not None and about["corpus"] != expected:
        raise UserError(
            f"{name} was loaded with other passages than {folder}: another build has replaced it; load that one's "
            "folder, or load the engine again"
        )
