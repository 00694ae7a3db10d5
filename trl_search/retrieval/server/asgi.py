"""Reads request bodies within limits, and sends JSON, directly over ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from trl_search.retrieval.remote.wire import Limits, WireError, too_large

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

# In multiples of the limit: this much of a too large body is discarded before the connection is closed, because a
# client reads its 413 only after it has sent the body.
_DISCARDED = 4


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


async def read_body(receive: Receive, limits: Limits, timeout_s: float) -> bytes:
    """Reads a request's body, never keeping more than `max_body_bytes`.

    Raises:
        WireError: 413 for a body that is too large, 408 for one that does not arrive.
        ClientGone: if the connection was closed.
    """
    chunks: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(timeout_s):
            while more and size <= _DISCARDED * limits.max_body_bytes:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
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


async def send_json(send: Send, status: int, body: bytes, headers: Iterable[Header] = ()) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a request header; `name` in lower case, as ASGI gives them."""
    return next((value for key, value in scope["headers"] if key == name), None)
