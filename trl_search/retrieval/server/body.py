"""Reads the body of a request within limits of size and time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from trl_search.retrieval.remote.wire import Limits, WireError, too_large

if TYPE_CHECKING:
    from starlette.types import Receive

# In multiples of the limit: this much of a too large body is discarded before the connection is closed, because a
# client reads its 413 only after it has sent the body.
_DISCARDED = 4


async def read_body(receive: Receive, limits: Limits, timeout_s: float) -> bytes:
    """Reads a request's body, never keeping more than `max_body_bytes`.

    Raises:
        WireError: 413 for a body that is too large, 408 for one that does not arrive.
        ClientDisconnect: if the connection was closed.
    """
    from starlette.requests import ClientDisconnect

    chunks: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(timeout_s):
            while more and size <= _DISCARDED * limits.max_body_bytes:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk: bytes = message.get("body", b"")
                more = message.get("more_body", False)
                size += len(chunk)
                if size <= limits.max_body_bytes:
                    chunks.append(chunk)
                else:
                    chunks.clear()
    except TimeoutError:
        raise WireError(408, f"the request did not arrive within {timeout_s:g} s") from None
    if size > limits.max_body_bytes:
        raise too_large(limits)
    return b"".join(chunks)
