"""Wraps every request: one log line of JSON, one measurement, and a 500 for any exception.

    {"time":"2026-11-22T10:00:00.123Z","client":"127.0.0.1","method":"POST","path":"/retrieve","status":200,"ms":4.1,
     "queries":3,"k":3,"cached":1}

Headers, queries and the query string are not logged: they may hold a token or a user's text.
"""

from __future__ import annotations

import logging
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from trl_search.retrieval.server.metrics import ServerMetrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FACTS = "trl_search.facts"  # the key of the scope under which a route leaves facts for the log line
CLIENT_GONE = 499  # as in nginx: the client left before the answer
access_log = logging.getLogger("trl_search.retrieval.server.access")
logger = logging.getLogger("trl_search.retrieval.server")


class Observed:
    """The outermost ASGI middleware, so that it sees every response."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, log: bool) -> None:
        self._app, self._metrics, self._log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from starlette.responses import JSONResponse

        started, status = time.perf_counter(), CLIENT_GONE
        facts: dict[str, Any] = {}
        scope[FACTS] = facts

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, seen)
        except Exception:
            # A bug in the server: bad requests and failing retrievers never get here. Details stay in the log.
            incident = facts["incident"] = uuid.uuid4().hex[:12]
            logger.exception("incident %s: %s %r", incident, scope["method"], scope["path"][:200])
            if status == CLIENT_GONE:
                told = JSONResponse({"error": f"a bug in the server; its log has incident {incident}"}, 500)
                await told(scope, receive, seen)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.count(scope["path"], status, seconds)
            if self._log:
                self._write(scope, status, seconds, facts)

    def _write(self, scope: Scope, status: int, seconds: float, facts: dict[str, Any]) -> None:
        import orjson

        client = scope.get("client")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:200].encode("utf-8", "replace").decode(),
            "status": status,
            "ms": round(1000 * seconds, 2),
            **facts,
        }
        access_log.info(orjson.dumps(line).decode())
