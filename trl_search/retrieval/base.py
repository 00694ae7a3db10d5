"""`Retriever`: the one interface that everything which finds passages implements."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from trl_search.types import Passage


class RetrievalError(RuntimeError):
    """A search failed. It reaches the environment as a failed observation, never as an empty result."""


class Retriever(abc.ABC):
    """Finds passages for queries: always batched, thread-safe, deterministic (ties in corpus order)."""

    @abc.abstractmethod
    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Returns, for each query in order, up to `k` passages, best first; `[]` where nothing matches.

        Raises:
            ValueError: if `k < 1`.
            RetrievalError: if the search could not be done; the message says what failed and what to do.
        """

    def close(self) -> None:
        """Releases files and connections. Safe to call twice."""
