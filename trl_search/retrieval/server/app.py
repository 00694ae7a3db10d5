"""The routes of a server. A request is checked in this order: token, size, form, queue.

If a token is set, `/retrieve` and `/metrics` require it; `/health` and `/ready` do not, so that a load balancer can
use them.

Errors are JSON, `{"error": "topk: must be ...", "field": "topk"}`: 401 for the token; 408, 413, 400 and 422 for the
request itself; 404 and 405 for another path or method; 422 without a field for a query that cannot be searched; 503
if the index is loading, the queue is full (both with `Retry-After`) or the retriever is down or hangs; 500 if the
retriever crashed. A bug in the server is a 500 with an incident number, which the log explains.
"""

from __future__ import annotations

import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from trl_search.retrieval.base import Retriever
from trl_search.retrieval.remote.wire import WireError, parse_request
from trl_search.retrieval.server.body import read_body
from trl_search.retrieval.server.config import ServerConfig, need_packages
from trl_search.retrieval.server.metrics import ServerMetrics
from trl_search.retrieval.server.observe import CLIENT_GONE, FACTS, Observed
from trl_search.retrieval.server.service import Refused, SearchService

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


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
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect
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
        if not _allowed(request, config.token):
            return _refusal(401, _NO_TOKEN, **{"WWW-Authenticate": "Bearer"})
        text = metrics.text() if scrape is None else await scrape()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def retrieve(request: Request) -> Response:
        facts: dict[str, Any] = request.scope[FACTS]
        if not _allowed(request, config.token):
            return _refusal(401, _NO_TOKEN, **{"WWW-Authenticate": "Bearer"}, **_CLOSE)
        try:
            asked = parse_request(
                await read_body(request.receive, config.limits, config.body_timeout_s), config.limits
            )
            facts["queries"], facts["k"] = len(asked.queries), asked.k
            answer, facts["cached"] = await service.answer(asked)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except WireError as error:
            facts["error"] = str(error)
            # After a 408 or a 413 the rest of the body may still arrive.
            return _refusal(error.status, str(error), error.field, **(_CLOSE if error.status in (408, 413) else {}))
        except Refused as error:
            facts["error"] = str(error)
            after = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
            return _refusal(error.status, str(error), **after)
        return Response(answer, media_type="application/json")

    async def elsewhere(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _refusal(error.status_code, _ROUTES, **(error.headers or {}))

    routes = [
        Route("/retrieve", retrieve, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", numbers, methods=["GET"]),
    ]
    observed = Middleware(Observed, metrics=metrics, log=config.access_log)
    app = Starlette(
        routes=routes, middleware=[observed], lifespan=lifespan, exception_handlers={HTTPException: elsewhere}
    )
    app.state.service, app.state.metrics = service, metrics
    return app


_NO_TOKEN = "send the server's token: Authorization: Bearer ..."
_ROUTES = "the server answers POST /retrieve, GET /health, GET /ready and GET /metrics"
_CLOSE = {"Connection": "close"}


def _allowed(request: Request, token: str | None) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    bearer = scheme.lower() == "bearer"
    return token is None or (bearer and hmac.compare_digest(given.strip().encode("latin-1"), token.encode()))


def _refusal(status: int, message: str, field: str | None = None, **headers: str) -> Response:
    from starlette.responses import Response

    # Not a JSONResponse, which cannot hold a lone surrogate.
    return Response(json.dumps({"error": message, "field": field}), status, headers, "application/json")
