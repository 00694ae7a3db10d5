"""uvicorn's HTTP/1.1 connection, with limits for clients that have not authenticated yet.

The head of a request may have `MAX_HEAD_BYTES` (plus one read of the socket), and must arrive within the timeout of an
idle connection. `body.py` limits bodies.

It needs the server extra. Use it as `uvicorn.run(app, http=LimitedConnection)`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # request line and headers; with a token and proxy headers they have a few hundred


class LimitedConnection(HttpToolsProtocol):
    """The connection of one client, made by uvicorn."""

    _unread_bytes = 0  # bytes outside bodies: a head, or the trailers after a body
    _deadline: asyncio.TimerHandle | None = None  # for the head of the next request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unread_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"The head of the request is larger than {MAX_HEAD_BYTES:,} bytes.")
        elif self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            # The next head has begun, which ended uvicorn's timer. Further bytes must not renew this one.
            self._set_deadline()

    def on_headers_complete(self) -> None:
        self._unset_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        super().on_message_complete()

    def _set_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _unset_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
