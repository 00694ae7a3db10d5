"""A connection of OpenSearch's client that reads answers up to the limits of `read_answer`, which the client lacks."""

from __future__ import annotations

import io
import time
from typing import Any

import urllib3
from opensearchpy import Urllib3HttpConnection

from trl_search.retrieval.base import read_answer

_PART_BYTES = 1 << 16


class Connection(Urllib3HttpConnection):
    """The client makes it: `OpenSearch(connection_class=Connection)`. Its errors are the `info` of the client's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pool = _Pool(self.pool, self.timeout)


class _Pool:
    """A pool of connections whose responses are read."""

    def __init__(self, pool: Any, timeout_s: float) -> None:
        self._pool, self._timeout_s = pool, timeout_s

    def urlopen(self, *request: Any, **options: Any) -> urllib3.HTTPResponse:
        started = time.monotonic()
        answer = self._pool.urlopen(*request, preload_content=False, **options)
        try:
            parts = answer.stream(_PART_BYTES, decode_content=True)
            content = read_answer(parts, "OpenSearch", timeout_s=self._timeout_s, started=started)
        finally:
            answer.close()
        # The headers are of the body as it was sent, which may have been compressed.
        return urllib3.HTTPResponse(
            io.BytesIO(content), answer.headers, answer.status, decode_content=False, enforce_content_length=False
        )

    def close(self) -> None:
        self._pool.close()
