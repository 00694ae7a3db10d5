"""uvicorn's HTTP/1.1 connection, with the limits that it lacks for whom nobody knows yet: no token was read so far.

A client may send a head of `MAX_HEAD_BYTES`, one read of the socket beyond it at most, and has the time of an idle
connection until its head is there. A body has limits of its own, which `asgi.py` keeps.

Needs the server extra: imported by what starts a server, and named by those who start uvicorn themselves, as
`uvicorn.run(app, http=LimitedConnection)`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # request line and headers; a token and what proxies add are a few hundred


class LimitedConnection(HttpToolsProtocol):
    """One client's connection. uvicorn makes it."""

    _unread_bytes = 0  # came in, and have been part of no body: a head, or the trailers behind a body
    _deadline: asyncio.TimerHandle | None = None  # of the head that comes, or does not

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
            # The next head has begun, which ended uvicorn's own wait: bytes that drip in must not renew it.
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
