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
_TROUBLE = frozenset({429, 502, 503, 504})


class TooLarge(RetrievalError):
    """The engine refused a request for its size (413). A smaller one may be accepted."""


def failure(status: int | str, said: str) -> RetrievalError:
    """The error for an HTTP status: of what may pass, `Unavailable`; of a request that was too large, `TooLarge`."""
    if status == 413:
        return TooLarge(said)
    return Unavailable(said) if status in _TROUBLE else RetrievalError(said)


def repeat_trouble(ask: Callable[[], Any]) -> Any:
    """Asks again what raised `Unavailable`: to search or to load twice does no harm."""
    return repeated(ask, on=Unavailable)


def from_folder(
    index: str | Path | None, kind: str, url: str | None, collection: str | None, path: str | Path | None = None
) -> tuple[str | None, str | None, str | Path | None, str | None]:
    """Address, collection and path, of which the index folder has what is not given; and the hash of its corpus.

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


def refuse_another_corpus(about: dict[str, Any], expected: str | None, name: str, folder: str | Path | None) -> None:
    """Fails where the engine was loaded with other passages than those of the folder, if one was given."""
    if expected is not None and about["corpus"] != expected:
        raise UserError(
            f"{name} was loaded with other passages than {folder}: another build has replaced it; load that one's "
            "folder, or load the engine again"
        )
