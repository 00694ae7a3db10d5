"""What an index holds, in place of where it lies: the folder may have moved, or have been built again elsewhere.

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


def with_contents(options: Any) -> Any:
    """The options of a retriever with the content of each index folder in place of its path, at any depth, as `hybrid`
    and `rerank` hold retrievers of their own."""
    if isinstance(options, Mapping):
        return {
            name: _content(value) if name == "index" and isinstance(value, str | Path) else with_contents(value)
            for name, value in options.items()
        }
    return [with_contents(value) for value in options] if isinstance(options, list | tuple) else options


def _content(index: str | Path) -> Any:
    folder = Path(home_expanded(index))
    if not (folder / MANIFEST).is_file():
        return str(index)
    manifest = read_manifest(folder)
    # The options name an encoder, and the details have the hash of its weights.
    encoder = {"encoder": manifest.details["encoder"]} if "encoder" in manifest.details else {}
    return {"kind": manifest.kind, "options": manifest.options, **encoder, "corpus_sha256": manifest.corpus.sha256}
