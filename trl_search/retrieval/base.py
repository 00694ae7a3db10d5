"""`Retriever`: the interface of everything that finds passages."""

from __future__ import annotations

import abc
import email.utils
import time
from collections.abc import Iterable, Mapping, Sequence

import httpx

from trl_search.common.errors import Explained, UserError
from trl_search.types import Passage


class RetrievalError(Explained, RuntimeError):
    """A search failed. The policy sees a failed observation, never an empty result."""


class Unavailable(RetrievalError):
    """The backend is unavailable; retrying with fewer queries does not help."""


class TooLarge(RetrievalError):
    """A server refused a request for its size (413). A smaller one may be accepted."""


class AnswerTooLong(RetrievalError):
    """A server's answer is longer than `MAX_ANSWER_BYTES`; an answer without an end would fill the memory."""


# 500 queries with 100 passages of 1,000 characters each have a fifth of it.
MAX_ANSWER_BYTES = 256 << 20
# After this time a client closes an idle connection itself. uvicorn closes it after 5 s, which is httpx' default, too:
# a request that crosses the close would be lost.
KEEP_ALIVE_S = 2.0
TROUBLE = frozenset({429, 502, 503, 504})  # HTTP statuses of temporary trouble


def failure(status: int | str, said: str) -> RetrievalError:
    """The error for an HTTP status: `Unavailable` for temporary trouble, `TooLarge` for a request that was too
    large."""
    if status == 413:
        return TooLarge(said)
    return Unavailable(said) if status in TROUBLE else RetrievalError(said)


def is_address(url: str) -> bool:
    """Whether a request can be sent to this URL."""
    try:
        parsed = httpx.URL(url)
        return parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 65536
    except (httpx.InvalidURL, UnicodeError):
        return False


def add_part(content: bytearray, part: bytes, name: str) -> None:
    """Adds a part of an answer to its body.

    Raises:
        AnswerTooLong: above `MAX_ANSWER_BYTES`.
    """
    content += part
    if len(content) > MAX_ANSWER_BYTES:
        raise AnswerTooLong(
            f"{name}: the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB; is it the right server? If it is, send "
            "fewer queries in a request or ask for fewer passages"
        )


def read_answer(parts: Iterable[bytes], name: str, *, timeout_s: float, started: float) -> bytes:
    """Joins the parts of an answer.

    Args:
        name (`str`): The server, for messages.
        timeout_s (`float`): Seconds since `started`, in `time.monotonic()`. A client's own limit is on the wait for
            each part, and an answer may have parts without end.

    Raises:
        AnswerTooLong: above `MAX_ANSWER_BYTES`.
        Unavailable: out of time.
    """
    content = bytearray()
    for part in parts:
        add_part(content, part, name)
        if time.monotonic() - started > timeout_s:
            raise Unavailable(f"{name}: no complete answer in {timeout_s:g} s")
    return bytes(content)


def body_text(content: bytes | bytearray) -> str:
    """The body of a response, for a message. httpx' `text` raises for some names of a charset (rot13, idna, hex)."""
    return content.decode("utf-8", "replace")


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The wait that a server asks for, in seconds or as a date; `None` if it asks for none.

    No time counts as none. A server whose clock is behind names dates that are over, and would be asked again
    a thousand times per second.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:6]) or None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()) or None
    except ValueError:
        return None


class Retriever(abc.ABC):
    """Finds passages for queries: always batched, thread-safe, deterministic (ties in corpus order).

    A retriever that waits for a server may add `async def search_async(queries, k)`. Rollouts await it instead of
    running `search` on a thread.

    Attributes:
        max_concurrent_batches (`int`): How many batches may be searched at a time. Use one for a retriever that
            computes on this machine, so that batches grow; use several for one that queries several servers.
    """

    max_concurrent_batches: int = 1
    _closed = False

    @abc.abstractmethod
    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """Returns up to `k` passages for each query, best first; `[]` if nothing matches.

        Raises:
            ValueError: if `k < 1`.
            RetrievalError: if the search failed; the message says what failed and what to do.
        """

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call, for the log of a training step: `{"retrieval/requests": 12.0, ...}`.

        [`merge_metrics`] combines the metrics of several retrievers or processes.
        """
        return {}

    def close(self) -> None:
        """Releases files and connections. Safe to call twice."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise RetrievalError(f"this {type(self).__name__} is closed; load it again to search")


def check_search(queries: Sequence[str], k: int) -> None:
    """Rejects a single string, which would be searched letter by letter, and a `k` below 1.

    Raises:
        TypeError: for a single string.
        UserError: if `k` is below 1.
    """
    if isinstance(queries, str):
        raise TypeError("search takes a list of queries; pass [query]")
    if k < 1:
        raise UserError(f"k is the number of passages wanted per query, at least 1; got {k}")


def merge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines metrics of several retrievers or ranks: the largest `_max_s`, the mean `_p50_s`, sums of the others.

    Example:
        >>> merge_metrics([{"retrieval/requests": 2.0}, {"retrieval/requests": 3.0}])
        {'retrieval/requests': 5.0}
    """
    values: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            values.setdefault(name, []).append(value)
    return {name: _merged(name, each) for name, each in values.items()}


def _merged(name: str, values: Sequence[float]) -> float:
    if name.endswith("_max_s"):
        return max(values)
    return sum(values) / (len(values) if name.endswith("_p50_s") else 1)
