"""Runs a server process: opens the socket, loads the index while `/ready` already answers, and handles signals.

After SIGTERM or Ctrl-C the server accepts no new connections, answers open requests and exits with status 0. A second
Ctrl-C ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.garbage import spare_what_is_loaded
from trl_search.retrieval.base import Retriever
from trl_search.retrieval.server.app import make_app
from trl_search.retrieval.server.config import ServerConfig, need_packages
from trl_search.retrieval.server.observe import access_log
from trl_search.retrieval.threads import on_daemon_thread


def serve(
    load: Callable[[], Retriever], config: ServerConfig, listening: socket.socket, loaded: Callable[[str], None]
) -> None:
    """Serves until a signal stops it. The retriever is loaded on a thread, and an exception in `load` ends the server;
    `loaded` is called with the address when it starts to answer."""
    need_packages()
    import uvicorn

    from trl_search.retrieval.server.connection import LimitedConnection

    app = make_app(None, config)
    settings = uvicorn.Config(
        app,
        http=LimitedConnection,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=2048,
        # Longer than most pauses of a trainer: if the connection closes as a request is sent, the client must retry.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(config.shutdown_timeout_s)),
    )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Like uvicorn's own, but does not raise the signal again at the end: a graceful stop is not a failure."""
            loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
            for number in signals:
                loop.add_signal_handler(number, self.handle_exit, number, None)
            yield
            for number in signals:
                loop.remove_signal_handler(number)

    async def main() -> None:
        server = Server(settings)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        loading, _ = on_daemon_thread(load)  # a daemon thread, so that Ctrl-C does not wait for a large index
        retriever: Retriever | None = None
        try:
            either: tuple[asyncio.Future[Any], ...] = (serving, loading)
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                retriever = loading.result()
                spare_what_is_loaded()
                app.state.service.open(retriever)
                loaded(url_of(*listening.getsockname()[:2]))
            else:
                loading.cancel()
            await serving
        finally:
            server.should_exit = True
            await serving
            if retriever is not None:
                retriever.close()

    with contextlib.ExitStack() as ends, asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:
        if config.access_log:
            ends.callback(access_log.removeHandler, log_to(sys.stderr))
        runner.run(main())


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket before anything is loaded, so that a port in use is an error at once.

    Raises:
        UserError: if the port cannot be taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from None


def url_of(host: str, port: int) -> str:
    """The address of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def log_to(stream: Any) -> logging.Handler:
    """Writes the line of each request to `stream`, until the handler is removed from `access_log`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
    return handler
