"""The routes of a server. A request is checked in this order: token, size, form, queue.

| route | answers |
|---|---|
| `POST /retrieve` | the wire protocol (`trl_search/retrieval/remote/wire.py`) |
| `GET /health` | 200 while the process runs; describes what is served |
| `GET /ready` | 200 when the index is loaded, 503 before |
| `GET /metrics` | Prometheus (`trl_search/retrieval/server/metrics.py`) |

If a token is set, `/retrieve` and `/metrics` require it; `/health` and `/ready` do not, so that a load balancer can
use them.

Errors are JSON, `{"error": "topk: must be ...", "field": "topk"}`: 401 for the token; 408, 413, 400 and 422 for the
request itself; 422 without a field for a query that cannot be searched; 503 if the index is loading, the queue is full
(both with `Retry-After`) or the retriever is down or hangs; 500 if the retriever crashed. A bug in the server is a 500
with an incident number, which the log explains.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from trl_search.retrieval.base import Retriever
from trl_search.retrieval.remote.wire import WireError, parse_request
from trl_search.retrieval.server.asgi import ClientGone, Header, Receive, Scope, Send, header, read_body, send_json
from trl_search.retrieval.server.config import ServerConfig, need_packages
from trl_search.retrieval.server.metrics import ServerMetrics
from trl_search.retrieval.server.observe import FACTS, Observed
from trl_search.retrieval.server.service import Refused, SearchService


def make_app(
    retriever: Retriever | None, config: ServerConfig, *, scrape: Callable[[], Awaitable[bytes]] | None = None
) -> Any:
    """Makes the ASGI application (a `Starlette`) that serves a retriever.

    Args:
        retriever (`Retriever`, *optional*): The retriever, which the caller closes. `None` if it is still loading:
            `/ready` is 503 until `app.state.service.open(retriever)`.
        config (`ServerConfig`): Limits, queue, cache, token.
        scrape (`Callable`, *optional*): Makes the page at `/metrics` if one process reports for several; the default
            reports this process, `app.state.metrics.text()`.

    Example:
        >>> app = make_app(load_retriever("bm25", index="indexes/wiki"), ServerConfig())
        >>> uvicorn.run(app, http=LimitedConnection, port=8000)
    """
    need_packages()
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    service = SearchService(config)
    metrics = ServerMetrics(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if retriever is not None:
            service.open(retriever)
        yield
        await service.aclose()

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "serves": config.name, "fingerprint": config.fingerprint})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    async def numbers(request: Request) -> Response:
        if not _allowed(request.scope, config.token):
            return JSONResponse({"error": _NO_TOKEN}, 401, {"WWW-Authenticate": "Bearer"})
        text = metrics.text() if scrape is None else await scrape()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = [
        # An object, not a function, so that Starlette calls it as ASGI without reading the request first.
        Route("/retrieve", _Retrieve(service, config), methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", numbers, methods=["GET"]),
    ]
    observed = Middleware(Observed, metrics=metrics, log=config.access_log)
    app = Starlette(routes=routes, middleware=[observed], lifespan=lifespan)
    app.state.service, app.state.metrics = service, metrics
    return app


_NO_TOKEN = "send the server's token: Authorization: Bearer ..."
_CLOSE: Header = (b"connection", b"close")


class _Retrieve:
    """`POST /retrieve` as plain ASGI."""

    def __init__(self, service: SearchService, config: ServerConfig) -> None:
        self._service, self._config = service, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        facts: dict[str, Any] = scope[FACTS]
        if not _allowed(scope, self._config.token):
            await _refuse(send, 401, _NO_TOKEN, headers=[(b"www-authenticate", b"Bearer"), _CLOSE])
            return
        try:
            body = await read_body(receive, self._config.limits, self._config.body_timeout_s)
            request = parse_request(body, self._config.limits)
            facts["queries"], facts["k"] = len(request.queries), request.k
            answered = await self._service.answer(request)
        except ClientGone:
            return
        except WireError as error:
            facts["error"] = str(error)
            # After a 408 or a 413 the rest of the body may still arrive.
            unread = [_CLOSE] if error.status in (408, 413) else []
            await _refuse(send, error.status, str(error), error.field, unread)
        except Refused as error:
            facts["error"] = str(error)
            after = error.retry_after_s
            await _refuse(send, error.status, str(error), headers=[(b"retry-after", b"%d" % after)] if after else [])
        else:
            facts["cached"] = answered.cached
            await send_json(send, 200, answered.body)


def _allowed(scope: Scope, token: str | None) -> bool:
    if token is None:
        return True
    scheme, _, given = (header(scope, b"authorization") or b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token.encode())


async def _refuse(
    send: Send, status: int, message: str, field: str | None = None, headers: list[Header] | None = None
) -> None:
    import json

    await send_json(send, status, json.dumps({"error": message, "field": field}).encode(), headers or [])
