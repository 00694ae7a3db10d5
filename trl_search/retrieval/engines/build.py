"""`load_engine` sends passages to Qdrant or OpenSearch in batches. A killed build resumes after the last batch.

The index folder keeps all passages in order, so that the engine can be loaded from it again. The record of what was
loaded is written into the engine last; until then, opening the collection fails because it is being loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.common.files import write_json
from trl_search.retrieval.base import RetrievalError, TooLarge
from trl_search.retrieval.corpus.passages import ROWS, Corpus
from trl_search.retrieval.corpus.sources import Fingerprint
from trl_search.retrieval.index.build_folder import SCRATCH

# Bytes per request: the default limits are 32 MB for Qdrant, 100 MB for OpenSearch, and 10 MB for hosted services.
MAX_BYTES = 8 << 20
_JOURNAL = "sent.json"


class Engine(Protocol):
    """A collection of Qdrant or an index of OpenSearch that is being loaded."""

    name: str  # for messages: "Qdrant's collection 'wiki'"

    def exists(self) -> bool: ...

    def delete(self) -> None: ...

    def make(self) -> None: ...

    def item(self, row: int) -> tuple[Any, int]:
        """A passage in the form of a request, and its approximate size in bytes of JSON."""

    def send(self, items: Sequence[Any]) -> None:
        """Sends passages and returns when they are on the engine's disk. Sending a passage twice changes nothing.

        Raises:
            TooLarge: if the engine rejects a request of this size.
        """

    def count(self) -> int:
        """The number of searchable passages."""

    def describe(self, about: dict[str, Any]) -> None:
        """Writes the record of what was loaded into the engine."""


def load_engine(
    engine: Engine, corpus: Corpus, folder: Path, about: dict[str, Any], *, replace: bool, max_rows: int
) -> dict[str, Any]:
    """Creates the collection, sends the passages and checks their number.

    Args:
        about (`dict`): The record to store in the engine, besides the corpus and the number of passages.
        replace (`bool`): Whether a collection of that name may be deleted.
        max_rows (`int`): Passages per request.

    Raises:
        UserError: if there is already a collection of that name, or another program wrote to it during the build.
    """
    journal = folder / SCRATCH / _JOURNAL  # the number of passages sent, once the collection is ours
    journal.parent.mkdir(exist_ok=True)
    if not journal.exists():
        if engine.exists():
            if not replace:
                raise UserError(f"{engine.name} exists already; choose another name, or --replace it")
            engine.delete()
        engine.make()
        write_json(journal, 0)
    sent = json.loads(journal.read_bytes())
    with tqdm(total=len(corpus), initial=sent, desc="loading", unit=" passages", disable=None) as bar:
        for items in _batches(engine, range(sent, len(corpus)), max_rows):
            _send(engine, items, sent)
            sent += len(items)
            write_json(journal, sent)
            bar.update(len(items))
    stored = engine.count()
    if stored != len(corpus):
        raise UserError(
            f"{engine.name} has {stored:,} passages, not {len(corpus):,}: another program wrote to it or deleted it; "
            "load it again with --replace"
        )
    # `manifest.json` has the same hash under `corpus`.
    about = {"corpus": Fingerprint.of(folder / ROWS, ROWS).sha256, "passages": len(corpus), **about}
    engine.describe(about)
    return about


def _batches(engine: Engine, rows: range, max_rows: int) -> Iterator[list[Any]]:
    """The passages of these rows, in requests of at most `max_rows` and about `MAX_BYTES`."""
    batch: list[Any] = []
    total = 0
    for row in rows:
        item, size = engine.item(row)
        if batch and (len(batch) == max_rows or total + size > MAX_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def _send(engine: Engine, items: list[Any], first: int) -> None:
    """Sends passages. If the engine rejects the size, sends each half separately."""
    try:
        engine.send(items)
    except TooLarge as error:
        if len(items) == 1:
            raise RetrievalError(f"the passage in row {first + 1} is too large for the engine: {error}") from error
        half = len(items) // 2
        _send(engine, items[:half], first)
        _send(engine, items[half:], first + half)
