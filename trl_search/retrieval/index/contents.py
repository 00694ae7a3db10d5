"""Replaces the path of an index by a description of its content, so that a moved or rebuilt index compares as equal.

{"index": "kit/index", "threads": 4}
{"index": {"kind": "bm25", "options": {"k1": 1.2, ...}, "corpus_sha256": "073b..."}, "threads": 4}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_search.common.files import home_expanded
from trl_search.retrieval.index.build_folder import MANIFEST
from trl_search.retrieval.index.folder import read_manifest


def index_folder(name: Any, value: Any) -> Path | None:
    """The index folder that an option of a retriever names; `None` if it names none."""
    if name != "index" or not isinstance(value, str | Path):
        return None
    folder = Path(home_expanded(value))
    return folder if (folder / MANIFEST).is_file() else None


def with_contents(options: Any) -> Any:
    """The options of a retriever, with each path of an index folder replaced by its content, at any depth: `hybrid`
    and `rerank` contain other retrievers."""
    if isinstance(options, Mapping):
        return {
            name: with_contents(value) if (folder := index_folder(name, value)) is None else _content(folder)
            for name, value in options.items()
        }
    if isinstance(options, list | tuple):
        return [with_contents(value) for value in options]
    return str(options) if isinstance(options, Path) else options


def _content(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    # The options name an encoder; the details contain the hash of its weights.
    encoder = {"encoder": manifest.details["encoder"]} if "encoder" in manifest.details else {}
    return {"kind": manifest.kind, "options": manifest.options, **encoder, "corpus_sha256": manifest.corpus.sha256}
