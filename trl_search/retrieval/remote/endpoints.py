"""Balances requests over several servers, and counts their outcomes.

    Endpoints.take() ─► the healthy one with the fewest requests under way ─► request ─► done(...), failed(...) or
                                                                                         given_up(...)

A server that fails is put aside, for twice as long each time, and for at least three times as long as the failure
took: after a timeout of 20 seconds, the server gets no request for a minute. A wait that the server requests is
respected, up to `MAX_ASIDE_S`. Then one request is sent as a probe, and an answer brings the server back. If all
servers are put aside, the one that is due first gets the request.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import httpx

from trl_search.common.errors import UserError
from trl_search.retrieval.base import is_address

FIRST_ASIDE_S, MAX_ASIDE_S = 0.5, 30.0


@dataclass
class EndpointStats:
    """The outcomes of the requests to one server."""

    requests: int = 0  # requests sent, including failed and repeated ones
    failures: int = 0  # errors, timeouts and broken answers
    retries: int = 0  # requests that repeat a failed one, to this server or another
    seconds: float = 0.0  # total time in requests
    max_s: float = 0.0  # the longest request
    # Seconds of the last 10,000 answered requests. Older ones are dropped, because a gateway may run for weeks without
    # its metrics being read.
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))


@dataclass(eq=False)
class Endpoint:
    """One server: its address for `POST`, its name (`host:port`) for messages, and its health."""

    url: str
    name: str
    under_way: int = 0
    failures_in_row: int = 0
    aside_until: float = 0.0
    stats: EndpointStats = field(default_factory=EndpointStats)


class Endpoints:
    """Balances requests over servers. Safe under threads and several event loops.

    Raises:
        UserError: for no servers, or a repeated server.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._clock, self._jitter = clock, jitter
        self._all = [_endpoint(url) for url in urls]
        self._lock = threading.Lock()
        self._turn = 0
        if not urls:
            raise UserError("an http retriever needs url= or urls=[...]")
        if len({endpoint.url for endpoint in self._all}) < len(self._all):
            raise UserError(f"the same server twice: {', '.join(endpoint.name for endpoint in self._all)}")

    def __len__(self) -> int:
        return len(self._all)

    def take(self, avoid: Collection[Endpoint] = (), *, retry: bool = False) -> Endpoint:
        """Returns the server for the next request; one of `avoid` only if no other is healthy. Report the outcome with
        `done`, `failed` or `given_up`."""
        with self._lock:
            well = [endpoint for endpoint in self._all if self._is_well(endpoint)]
            candidates = [endpoint for endpoint in well if endpoint not in avoid] or well
            if candidates:
                self._turn += 1  # round robin among equals
                first = self._turn % len(candidates)
                chosen = min(candidates[first:] + candidates[:first], key=lambda endpoint: endpoint.under_way)
            else:
                chosen = min(self._all, key=lambda endpoint: (endpoint in avoid, endpoint.aside_until))
            chosen.under_way += 1
            chosen.stats.requests += 1
            chosen.stats.retries += retry
            return chosen

    def done(self, endpoint: Endpoint, seconds: float) -> None:
        """The server answered."""
        with self._lock:
            self._ended(endpoint, seconds)
            endpoint.stats.latencies_s.append(seconds)
            endpoint.failures_in_row, endpoint.aside_until = 0, 0.0

    def failed(self, endpoint: Endpoint, seconds: float, *, wait_s: float | None = None, aside: bool = True) -> None:
        """The server did not answer, or gave an invalid answer. `aside`: False if the request itself is to blame."""
        with self._lock:
            self._ended(endpoint, seconds)
            endpoint.stats.failures += 1
            if not aside:
                return
            if wait_s is None and self._clock() < endpoint.aside_until:
                wait_s = 3 * seconds  # already put aside during this request, for the same trouble
            elif wait_s is None:
                growing = min(MAX_ASIDE_S, FIRST_ASIDE_S * 2**endpoint.failures_in_row)
                wait_s = max(3 * seconds, growing * (0.5 + self._jitter() / 2))
                endpoint.failures_in_row += 1
            else:
                wait_s = min(MAX_ASIDE_S, wait_s)
            endpoint.aside_until = max(endpoint.aside_until, self._clock() + wait_s)

    def given_up(self, endpoint: Endpoint, seconds: float) -> None:
        """The caller stopped waiting. That says nothing about the server."""
        with self._lock:
            self._ended(endpoint, seconds)

    def other_is_well(self, than: Collection[Endpoint]) -> bool:
        """Whether a server outside `than` is healthy."""
        with self._lock:
            return any(endpoint not in than and self._is_well(endpoint) for endpoint in self._all)

    def take_stats(self) -> dict[str, EndpointStats]:
        """The counts since the last call, by server."""
        with self._lock:
            taken = {endpoint.name: endpoint.stats for endpoint in self._all}
            for endpoint in self._all:
                endpoint.stats = EndpointStats()
            return taken

    def _is_well(self, endpoint: Endpoint) -> bool:
        if endpoint.aside_until == 0.0:
            return True
        return self._clock() >= endpoint.aside_until and endpoint.under_way == 0  # one probe at a time

    def _ended(self, endpoint: Endpoint, seconds: float) -> None:
        endpoint.under_way -= 1
        endpoint.stats.seconds += seconds
        endpoint.stats.max_s = max(endpoint.stats.max_s, seconds)


def _endpoint(url: str) -> Endpoint:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise UserError(f"{url!r} is not a URL ({error}); write http://host:8000") from None
    if not is_address(url):
        raise UserError(f"{url!r}: a retrieval server's URL begins with http:// or https://, as http://host:8000")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UserError("a retrieval server's URL is http://host:port; give a secret by token_env=, not in the URL")
    path = parsed.path.rstrip("/")
    url = str(parsed.copy_with(path=path if path.endswith("/retrieve") else f"{path}/retrieve"))
    port = parsed.port or {"http": 80, "https": 443}[parsed.scheme]
    name = f"{parsed.host}:{port}{path.removesuffix('/retrieve')}"
    return Endpoint(url, name)
