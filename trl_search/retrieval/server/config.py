"""The configuration of a server: limits, queue, cache, token."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from trl_search.common.bounds import check_minima, check_positive
from trl_search.common.credentials import bearer_token
from trl_search.common.errors import UserError
from trl_search.retrieval.remote.wire import Limits

_PACKAGES = ("starlette", "uvicorn", "httptools", "orjson", "prometheus_client", "cachetools")


@dataclass(frozen=True)
class ServerConfig:
    """The settings of one server process for one index.

    Args:
        limits (`Limits`): Limits of one request.
        max_queued (`int`): The most queries in progress, over all requests; a request that exceeds it is answered 503.
        max_batch (`int`): Most queries per call of the retriever.
        search_timeout_s (`float`): Time limit of one call of the retriever.
        body_timeout_s (`float`): Time limit for a client to send a request.
        shutdown_timeout_s (`float`): How long a stopping server waits for requests in progress.
        cache_bytes (`int`): Memory of the result cache; use 0 for a retriever whose answers change.
        fingerprint (`str`): Identifies the index; `/health` shows it.
        name (`str`): A description of what is served, for `/health`.
        token (`str`, *optional*): What clients must send as `Authorization: Bearer ...`; never shown or logged.
        access_log (`bool`): Writes one line of JSON per request.
    """

    limits: Limits = field(default_factory=Limits)
    max_queued: int = 20_000
    max_batch: int = 256
    search_timeout_s: float = 60.0
    body_timeout_s: float = 30.0
    shutdown_timeout_s: float = 60.0
    cache_bytes: int = 256 << 20
    fingerprint: str = ""
    name: str = "retriever"
    token: str | None = field(default=None, repr=False)
    access_log: bool = True

    def __post_init__(self) -> None:
        if self.max_queued < self.limits.max_queries:
            raise UserError(
                f"max_queued={self.max_queued} is less than the {self.limits.max_queries} queries that one request "
                "may hold: such a request could never be answered; raise the one or lower the other"
            )
        check_minima(self, max_batch=1, cache_bytes=0)
        check_positive(search_timeout_s=self.search_timeout_s, body_timeout_s=self.body_timeout_s)
        check_positive(shutdown_timeout_s=self.shutdown_timeout_s)
        if self.token is not None and self.token != bearer_token(self.token, "ServerConfig"):
            raise UserError("the token from ServerConfig has spaces or a newline around it: pass it stripped")


def need_packages(*, on_ray: bool = False) -> None:
    """Raises `UserError` if a package is missing, before anything is started."""
    wanted, extra = (("ray", *_PACKAGES), "ray") if on_ray else (_PACKAGES, "server")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'trl-search[{extra}]'")
