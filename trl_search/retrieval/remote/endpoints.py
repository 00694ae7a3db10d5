"""Which of several servers is asked next, and what became of what was asked.

    Endpoints.take() ─► the healthy one with the fewest requests under way ─► request ─► done(...), failed(...) or
                                                                                         given_up(...)

A server that fails is put aside, twice as long each time, and at least three times what its failure cost to notice:
one that hangs for 20 seconds is not asked again for a minute. The time that it names itself is kept, `MAX_ASIDE_S` at
most. When its time is up, one request is let through as a probe; an answer brings it back. When all are put aside, the
one that is due first is asked all the same: there is nothing to lose.
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

FIRST_ASIDE_S, MAX_ASIDE_S = 0.5, 30.0


@dataclass
class EndpointStats:
    """What became of the requests to one server.

    Args:
        requests (`int`): Requests sent, those that failed and those that repeat a failed one included.
        failures (`int`): Requests that were not answered as they should: errors, timeouts, broken answers.
        retries (`int`): Requests that repeat one that failed, here or at another server.
        seconds (`float`): Time in requests, added up.
        max_s (`float`): The longest request.
        latencies_s (`deque[float]`): Of the requests that were answered, the last 10,000: a gateway serves for weeks,
            and nobody takes its numbers.
    """

    requests: int = 0
    failures: int = 0
    retries: int = 0
    seconds: float = 0.0
    max_s: float = 0.0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))


@dataclass(eq=False)
class Endpoint:
    """One server: its address for `POST`, its name (`host:port`) for people, and its health."""

    url: str
    name: str
    under_way: int = 0
    failures_in_row: int = 0
    aside_until: float = 0.0
    stats: EndpointStats = field(default_factory=EndpointStats)


class Endpoints:
    """Balances requests over servers. Safe under threads and several event loops.

    Args:
        urls (`Sequence[str]`): `"http://localhost:8000"` or `"http://localhost:8000/retrieve"`.
        clock (`Callable`): Seconds that only grow.
        jitter (`Callable`): Draws from 0 to 1, so that many clients do not all come back at the same moment.
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
        """The server to ask now, one of `avoid` only where nobody else is well. End it by `done` or `failed`."""
        with self._lock:
            well = [endpoint for endpoint in self._all if self._is_well(endpoint)]
            candidates = [endpoint for endpoint in well if endpoint not in avoid] or well
            if candidates:
                self._turn += 1  # equals take turns
                first = self._turn % len(candidates)
                chosen = min(candidates[first:] + candidates[:first], key=lambda endpoint: endpoint.under_way)
            else:
                chosen = min(self._all, key=lambda endpoint: (endpoint in avoid, endpoint.aside_until))
            chosen.under_way += 1
            chosen.stats.requests += 1
            chosen.stats.retries += retry
            return chosen

    def done(self, endpoint: Endpoint, seconds: float) -> None:
        """It answered, and is well."""
        with self._lock:
            self._ended(endpoint, seconds)
            endpoint.stats.latencies_s.append(seconds)
            endpoint.failures_in_row, endpoint.aside_until = 0, 0.0

    def failed(self, endpoint: Endpoint, seconds: float, *, wait_s: float | None = None, aside: bool = True) -> None:
        """It did not answer as it should.

        Args:
            endpoint (`Endpoint`): From `take`.
            seconds (`float`): Until it failed.
            wait_s (`float`, *optional*): What it asked for; `MAX_ASIDE_S` at most are granted.
            aside (`bool`): False where it is the request's own fault.
        """
        with self._lock:
            self._ended(endpoint, seconds)
            endpoint.stats.failures += 1
            if not aside:
                return
            if wait_s is None and self._clock() < endpoint.aside_until:
                wait_s = 3 * seconds  # it was put aside while this request was under way: the same trouble
            elif wait_s is None:
                growing = min(MAX_ASIDE_S, FIRST_ASIDE_S * 2**endpoint.failures_in_row)
                wait_s = max(3 * seconds, growing * (0.5 + self._jitter() / 2))
                endpoint.failures_in_row += 1
            else:
                wait_s = min(MAX_ASIDE_S, wait_s)
            endpoint.aside_until = max(endpoint.aside_until, self._clock() + wait_s)

    def given_up(self, endpoint: Endpoint, seconds: float) -> None:
        """Who asked waits no longer, whatever the reason: nothing was learnt about the server."""
        with self._lock:
            self._ended(endpoint, seconds)

    def other_is_well(self, than: Collection[Endpoint]) -> bool:
        """Whether a request that failed at all of `than` can go elsewhere at once."""
        with self._lock:
            return any(endpoint not in than and self._is_well(endpoint) for endpoint in self._all)

    def take_stats(self) -> dict[str, EndpointStats]:
        """What happened since the last call, by server."""
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
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{url!r}: a retrieval server's URL begins with http:// or https://, as http://host:8000")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UserError("a retrieval server's URL is http://host:port; give a secret by token_env=, not in the URL")
    path = parsed.path.rstrip("/")
    url = str(parsed.copy_with(path=path if path.endswith("/retrieve") else f"{path}/retrieve"))
    port = parsed.port or {"http": 80, "https": 443}[parsed.scheme]
    name = f"{parsed.host}:{port}{path.removesuffix('/retrieve')}"
    return Endpoint(url, name)
