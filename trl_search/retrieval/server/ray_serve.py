"""Runs several gateways behind one address, on Ray Serve: `trl-search serve --ray`.

    http retriever ──► Ray's proxy, on each machine ──► replica 1: app.py over its own retriever
                                                 └──► replica 2: ...

Each replica is a process that runs the app of `make_app`, with its own batches, cache and queue. Ray starts the
replicas, restarts those that die, and distributes requests over them. Every replica has the whole index. If a replica
dies, its requests fail with a lost connection or a 500, and the `http` retriever repeats them, which is safe because a
search changes nothing.

The proxy listens on `host` and `port`. Ray itself opens other ports to the network, and anyone who can reach them can
run code on the machines. Since 2.60 Ray requires a token; still, run a cluster in a private network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trl_search.common.bounds import check_at_least, check_not_negative, check_positive
from trl_search.common.errors import UserError
from trl_search.common.extras import import_extra
from trl_search.common.garbage import spare_what_is_loaded
from trl_search.retrieval import load_retriever
from trl_search.retrieval.server.app import make_app
from trl_search.retrieval.server.config import ServerConfig, need_packages
from trl_search.retrieval.server.metrics import join_replicas
from trl_search.retrieval.server.run import is_loopback, listen, log_to, url_of
from trl_search.retrieval.server.service import SearchService

APP, DEPLOYMENT = "trl-search", "gateway"
HEALTH_PERIOD_S = 5.0  # until Ray notices a dead replica and starts another; requests avoid it at once
SCRAPE_S = 5.0
PROXY_S = 0.3  # time for the last answer to pass through the proxy
OBJECT_STORE_BYTES = 128 << 20  # requests do not use it, and Ray would take a third of the memory
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayConfig:
    """How many gateways, and where."""

    replicas: int = 2  # processes, each with its own retriever
    cpus: float = 1.0  # CPUs per replica. The encoder uses as many threads.
    gpus: float = 0.0  # GPUs per replica, for an encoder. With 0.25, four replicas share a GPU.
    address: str | None = None  # the address of a running cluster; `None` starts one on this machine

    def __post_init__(self) -> None:
        check_at_least(1, replicas=self.replicas)
        check_positive(cpus=self.cpus)
        check_not_negative(gpus=self.gpus)
        if self.address is not None and not self.address.strip():
            raise UserError("the address of the Ray cluster is empty: give HOST:PORT, or leave it out to start one")


def serve_on_ray(
    kind: str,
    options: dict[str, Any],
    config: ServerConfig,
    settings: RayConfig,
    *,
    host: str,
    port: int,
    loaded: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or Ctrl-C, and answers the requests under way before it ends. The options must mean the
    same on every machine: addresses, or folders on a shared disk. `loaded` is called with the address once requests
    are answered."""
    stop = threading.Event()
    with gateways(kind, options, config, settings, host=host, port=port) as url:
        # Set after Ray has started, because Ray sets handlers that end the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        loaded(url)
        while not stop.wait(0.5):  # in steps, because Python runs a signal handler only between them
            pass


@contextlib.contextmanager
def gateways(
    kind: str,
    options: dict[str, Any],
    config: ServerConfig,
    settings: RayConfig,
    *,
    host: str,
    port: int,
) -> Iterator[str]:
    """Starts the replicas and yields their address. On exit it drains and removes them.

    Raises:
        UserError: if Ray Serve is already running, or the replicas do not start.
    """
    need_packages(on_ray=True)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would send usage statistics
    ray = import_extra("ray", "serving on Ray", "ray")
    serve = import_extra("ray.serve", "serving on Ray", "ray")
    port = _free_port(host, port)
    _join(ray, settings)
    try:
        if serve.status().proxies:
            raise UserError(
                "Ray Serve already runs on this cluster, and a cluster can have only one; end it with `serve "
                "shutdown`, or start another cluster"
            )
        _need_room(ray, settings)
        everywhere = settings.address is not None
        serve.start(
            proxy_location="EveryNode" if everywhere else "HeadOnly",
            http_options={"host": host, "port": port},
            logging_config=_quiet(),
        )
        try:
            try:
                serve.run(_deployment(serve, kind, options, config, settings), name=APP)
            except RuntimeError as error:
                raise UserError(f"the replicas did not start: {_cause(error, serve)}") from error
            reachable = ray.util.get_node_ip_address() if everywhere and not is_loopback(host) else host
            yield url_of(reachable, port)
        finally:
            _drain(serve, config)
            serve.shutdown()
    finally:
        ray.shutdown()


class Gateway:
    """One replica: a retriever and its app. Ray makes it on the machine where it runs."""

    def __init__(self, kind: str, options: dict[str, Any], config: ServerConfig) -> None:
        from ray import serve

        self._config, self._retriever = config, load_retriever(kind, **options)
        spare_what_is_loaded()
        self._name = serve.get_replica_context().replica_id.unique_id
        if config.access_log:
            log_to(sys.stderr)  # Ray shows it on the terminal of the server, and keeps it in its log files

    def __serve_build_asgi_app__(self) -> Any:
        # The proxy sends a request for /metrics to one replica, which collects the metrics of all.
        app = make_app(self._retriever, self._config, scrape=self._scrape_all)
        self._numbers: Callable[[], bytes] = app.state.metrics.text
        self._service: SearchService = app.state.service
        return app

    async def drain(self) -> None:
        await self._service.drain(self._config.shutdown_timeout_s)

    def numbers(self) -> tuple[str, bytes]:
        """This replica's name and its `/metrics`, for the replica that answers the request."""
        return self._name, self._numbers()

    async def _scrape_all(self) -> bytes:
        from ray import serve

        asked = serve.get_deployment_handle(DEPLOYMENT, APP).broadcast("numbers")
        # A replica that has just died is omitted.
        answers = await asked.results_async(timeout_s=SCRAPE_S, return_exceptions=True)
        return join_replicas(dict(answer for answer in answers if not isinstance(answer, BaseException)))

    async def __del__(self) -> None:
        self._retriever.close()


def _deployment(serve: Any, kind: str, options: dict[str, Any], config: ServerConfig, settings: RayConfig) -> Any:
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # Ray's default of 5 would prevent batches. A replica rejects excess requests itself.
        max_ongoing_requests=config.max_queued,
        max_queued_requests=config.max_queued,  # applies while there is no replica
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=config.search_timeout_s,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=config.shutdown_timeout_s,
        max_constructor_retry_count=1,
        logging_config=_quiet(),
    )(serve.ingress()(Gateway))
    return deployment.bind(kind, options, config)


def _drain(serve: Any, config: ServerConfig) -> None:
    """Makes the replicas refuse new requests with 503 and finish the others.

    Ray cannot do this: a shutdown cuts off open requests, and deleting the app answers 404, after which clients give
    up. After a 503, they try another server."""
    try:
        serve.get_deployment_handle(DEPLOYMENT, APP).broadcast("drain").results(
            timeout_s=config.shutdown_timeout_s + SCRAPE_S, return_exceptions=True
        )
    except (RuntimeError, TimeoutError, serve.exceptions.RayServeException) as error:
        # The replicas never started, or they hang.
        logger.debug("not drained: %s", error)
        return
    time.sleep(PROXY_S)


def _join(ray: Any, settings: RayConfig) -> None:
    shared = {"log_to_driver": True, "logging_level": logging.WARNING}
    if settings.address is not None:
        try:
            ray.init(address=settings.address, **shared)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"there is no Ray cluster at {settings.address}: {error}") from error
        return
    ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **shared)


def _need_room(ray: Any, settings: RayConfig) -> None:
    """Raises if the cluster has too few resources for the replicas: Ray would wait, perhaps forever, for more
    machines."""
    there = ray.cluster_resources()
    for name, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        if settings.replicas * each > there.get(name, 0):
            raise UserError(
                f"{settings.replicas} replicas of {each:g} {name}s do not fit on a cluster of {there.get(name, 0):g}; "
                f"lower --replicas or --replica-{name.lower()}s, or add machines"
            )


def _cause(error: RuntimeError, serve: Any) -> str:
    """The last line of the error in a replica's constructor, which Ray wraps in its own traceback."""
    application = serve.status().applications.get(APP)
    said = [one.message for one in application.deployments.values()] if application else []
    lines = [line.strip() for line in "\n".join(said or [str(error)]).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def _free_port(host: str, port: int) -> int:
    """Raises if the port is taken, and finds a free one for 0. Ray's proxy opens it later, in another process."""
    with contextlib.closing(listen(host, port)) as found:
        return int(found.getsockname()[1])


def _quiet() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}
