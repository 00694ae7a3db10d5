"""Searches servers that speak `POST /retrieve`: `trl-search serve`, Search-R1's, verl's.

    load_retriever("http", url="http://localhost:8000")
    load_retriever("http", urls=["http://a:8000", "http://b:8000"])

What happens to a batch:

1. It is split into requests: one share per server, at most `max_batch` queries each.
2. Each request goes to the healthy server with the fewest open requests (`endpoints.py`).
3. After a lost connection, a timeout, 429, 502, 503 or 504, the server is put aside and the request goes to another
   one at once. If there is no other server, the request is repeated after a growing, jittered wait (or the server's
   `Retry-After`), until `patience_s` is over. A search changes nothing on the server, so repeating it is safe.
4. Any other 5xx may be caused by the query, so the request is tried at most three times.
5. A 4xx, a redirect or an invalid answer would recur, so it fails at once, with two exceptions. A batch that is too
   large (413) is halved. A server that accepts one query but no list (SkyRL's) gets its queries one by one from then
   on.

Every failure is a `RetrievalError` that names the server, the status and the server's message.

Proxies of the environment (`HTTP_PROXY`) are ignored: they cannot resolve the hosts of a cluster.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import httpx
import tenacity

from trl_search.common.bounds import check_at_least, check_positive
from trl_search.common.credentials import authorization
from trl_search.common.errors import UserError
from trl_search.common.event_loop import all_of
from trl_search.common.retrying import GROWING_WAIT
from trl_search.common.tls import tls_context
from trl_search.retrieval.base import (
    KEEP_ALIVE_S,
    TROUBLE,
    AnswerTooLong,
    RetrievalError,
    TooLarge,
    Unavailable,
    add_part,
    body_text,
    retry_after_s,
)
from trl_search.retrieval.event_loops import AsyncRetriever
from trl_search.retrieval.remote.endpoints import Endpoint, Endpoints
from trl_search.retrieval.remote.wire import (
    WireError,
    format_request,
    format_single_request,
    parse_response,
    wants_one_query,
)
from trl_search.types import Passage

ONE_BY_ONE = 32  # concurrent requests to each server that accepts no list
SHARE = 32  # smaller batches are not split between servers
TRIES_OF_AN_ERROR = 3


class HttpRetriever(AsyncRetriever):
    """Searches one or several retrieval servers: `load_retriever("http", ...)`. It connects at the first search.

    Args:
        url (`str`, *optional*): One server; or
        urls (`Sequence[str]`, *optional*): several, of the same index.
        timeout_s (`float`): Seconds until one request counts as failed.
        patience_s (`float`): Seconds until a search fails, including all requests and waits. Keep it below training's
            `search_timeout_s`, which would otherwise end the search first.
        max_batch (`int`): Queries per request.
        max_concurrent_batches (`int`, *optional*): Batches at a time; two per server by default.
        token_env (`str`, *optional*): The environment variable that holds the bearer token.

    Raises:
        UserError: for a missing address, or an option out of range.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        urls: Sequence[str] | None = None,
        timeout_s: float = 20.0,
        patience_s: float = 25.0,
        max_batch: int = 512,
        max_concurrent_batches: int | None = None,
        token_env: str | None = None,
    ) -> None:
        if (url is None) == (urls is None):
            raise UserError('http needs url="http://host:8000" or urls=["http://a:8000", "http://b:8000"]')
        if isinstance(urls, str):
            raise UserError(f"urls must be a list of addresses: pass url={urls!r}")
        check_positive(timeout_s=timeout_s, patience_s=patience_s)
        check_at_least(1, max_batch=max_batch, max_concurrent_batches=max_concurrent_batches)
        self._urls = (url,) if url is not None else tuple(urls or ())
        self._timeout_s, self._patience_s, self._max_batch = timeout_s, patience_s, max_batch
        self._headers = authorization(token_env)
        super().__init__()
        self.max_concurrent_batches = max_concurrent_batches or 2 * len(self.endpoints)

    def _start(self) -> None:
        super()._start()
        self.endpoints = Endpoints(self._urls)
        self._one_by_one = False  # set when a server says so

    def _make_client(self) -> httpx.AsyncClient:
        kept = 4 * len(self.endpoints)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=kept, keepalive_expiry=KEEP_ALIVE_S)
        return httpx.AsyncClient(
            headers=self._headers, timeout=None, limits=limits, verify=tls_context(), trust_env=False
        )

    async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self._begin(queries, k)
        if not queries:
            return []
        deadline = time.monotonic() + self._patience_s
        if not self._one_by_one:
            size = min(self._max_batch, max(SHARE, math.ceil(len(queries) / len(self.endpoints))))
            shares = [queries[start : start + size] for start in range(0, len(queries), size)]
            try:
                return [*chain.from_iterable(await all_of(self._ask(share, k, deadline) for share in shares))]
            except _WantsOneQuery:
                self._one_by_one = True
        turns = asyncio.Semaphore(ONE_BY_ONE * len(self.endpoints))

        async def ask_alone(query: str) -> list[list[Passage]]:
            async with turns:
                return await self._ask([query], k, deadline)

        return [*chain.from_iterable(await all_of(map(ask_alone, queries)))]

    def take_metrics(self) -> dict[str, float]:
        stats = self.endpoints.take_stats()
        latencies_s = list(chain.from_iterable(one.latencies_s for one in stats.values()))
        return {
            "retrieval/requests": float(sum(one.requests for one in stats.values())),
            "retrieval/failures": float(sum(one.failures for one in stats.values())),
            "retrieval/retries": float(sum(one.retries for one in stats.values())),
            "retrieval/request_seconds": sum(one.seconds for one in stats.values()),
            "retrieval/latency_p50_s": statistics.median(latencies_s) if latencies_s else 0.0,
            "retrieval/latency_max_s": max(one.max_s for one in stats.values()),
            **{f"retrieval/failures/{name}": float(one.failures) for name, one in stats.items()},
        }

    async def _ask(self, queries: Sequence[str], k: int, deadline: float) -> list[list[Passage]]:
        """Sends one request, with its retries."""
        tried: list[Endpoint] = []

        def is_worth_another(error: BaseException) -> bool:
            if not isinstance(error, _Repeatable) or (error.tries and len(tried) >= error.tries):
                return False
            least_s = min(self._timeout_s, self._patience_s) / 10  # a try with less time left would only time out
            wait_s = 0.0 if self.endpoints.other_is_well(tried) else error.wait_s or 0.0
            return time.monotonic() + wait_s + least_s < deadline

        def wait_s(state: tenacity.RetryCallState) -> float:
            if self.endpoints.other_is_well(tried):
                return 0.05 * random.random()
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, _Repeatable) and error.wait_s is not None:
                return error.wait_s + min(1.0, error.wait_s) * random.random()
            return 0.05 + GROWING_WAIT(state)

        async def ask() -> list[list[Passage]]:
            endpoint = self.endpoints.take(tried, retry=bool(tried))
            tried.append(endpoint)
            return await self._request(endpoint, queries, k, deadline)

        repeating = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(is_worth_another), wait=wait_s, reraise=True
        )
        try:
            return await repeating(ask)
        except TooLarge as error:
            if len(queries) == 1:
                raise RetrievalError(str(error)) from error.__cause__
            half = len(queries) // 2
            return await self._ask(queries[:half], k, deadline) + await self._ask(queries[half:], k, deadline)
        except _Repeatable as error:
            kind = RetrievalError if error.tries else Unavailable
            tries = f"{len(tried)} tries" if len(tried) > 1 else "one try"
            raise kind(f"{error}; gave up after {tries}") from error.__cause__

    async def _request(
        self, endpoint: Endpoint, queries: Sequence[str], k: int, deadline: float
    ) -> list[list[Passage]]:
        body = format_single_request(queries[0], k) if self._one_by_one else format_request(queries, k)
        started = time.monotonic()
        try:
            client = await self.clients.get()
            content = bytearray()
            async with (
                asyncio.timeout(max(0.05, min(self._timeout_s, deadline - started))),
                client.stream("POST", endpoint.url, json=body) as response,
            ):
                async for part in response.aiter_bytes():
                    add_part(content, part, endpoint.name)
            found = _read(endpoint, response, bytes(content), queries, k)
        except asyncio.CancelledError:
            self.endpoints.given_up(endpoint, time.monotonic() - started)
            raise
        except Exception as error:
            seconds = time.monotonic() - started
            failed = _named(error, endpoint, f"no answer to {len(queries)} queries in {seconds:.3g} s")
            at_fault = isinstance(failed, _Broken) or (isinstance(failed, _Repeatable) and failed.tries is None)
            wait_s = failed.wait_s if isinstance(failed, _Repeatable) else None
            self.endpoints.failed(endpoint, seconds, wait_s=wait_s, aside=at_fault)
            if failed is error:
                raise
            raise failed from error
        self.endpoints.done(endpoint, time.monotonic() - started)
        return found


class _Repeatable(RetrievalError):
    """A temporary failure: retry after `wait_s` if the server named it, with at most `tries` tries."""

    def __init__(self, message: str, *, wait_s: float | None = None, tries: int | None = None) -> None:
        super().__init__(message)
        self.wait_s, self.tries = wait_s, tries


class _WantsOneQuery(RetrievalError):
    """The server accepts one query but no list."""


class _Broken(RetrievalError):
    """The answer does not follow the protocol."""


def _named(error: Exception, endpoint: Endpoint, timed_out: str) -> Exception:
    """Converts a lost connection, a timeout or an unreadable or too long answer to a failure that names the server;
    returns any other error unchanged."""
    if isinstance(error, TimeoutError):
        return _Repeatable(f"{endpoint.name}: {timed_out}")
    if isinstance(error, httpx.TransportError):
        return _Repeatable(f"{endpoint.name}: {type(error).__name__}: {error or 'connection lost'}")
    if isinstance(error, AnswerTooLong):
        return _Broken(str(error))
    if isinstance(error, httpx.DecodingError):
        return _Broken(f"{endpoint.name}: the answer is not compressed as its Content-Encoding says ({error})")
    return error


def _read(
    endpoint: Endpoint, response: httpx.Response, content: bytes, queries: Sequence[str], k: int
) -> list[list[Passage]]:
    status = response.status_code
    if status != 200:
        message = f"{endpoint.name} answered {status} {response.reason_phrase}: {_said(content)}"
        if status in TROUBLE:
            raise _Repeatable(message, wait_s=retry_after_s(response.headers))
        if status >= 500:
            raise _Repeatable(message, tries=TRIES_OF_AN_ERROR)
        if status == 413:
            raise TooLarge(message)
        if status == 422 and wants_one_query(_body(content)):
            raise _WantsOneQuery(message)
        raise RetrievalError(message)
    try:
        found = parse_response(json.loads(content))
    except (WireError, ValueError, RecursionError) as error:
        raise _Broken(
            f"{endpoint.name} returned an invalid result ({error}): {_said(content)}; is it a retrieval server?"
        ) from error
    if len(found) != len(queries):
        raise _Broken(f"{endpoint.name} answered {len(found)} results to {len(queries)} queries")
    return [passages[:k] for passages in found]


def _body(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return body_text(content)


def _said(content: bytes) -> str:
    """The server's error message: from the field that frameworks use, else the beginning of the body."""
    body = _body(content)
    if isinstance(body, dict):
        body = next((body[key] for key in ("error", "detail", "message") if key in body), body)
    said = body if isinstance(body, str) else str(body)
    return " ".join(said[:1000].split())[:300] or "(an empty body)"
