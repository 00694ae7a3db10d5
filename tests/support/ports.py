"""Ports for processes that are told where to listen."""

from __future__ import annotations

import contextlib
import random
import socket
import time


def free_port() -> int:
    """A loopback port on which nothing listens.

    It is not one of those that the system itself gives to sockets (on Linux 32768 to 60999). Another process could get
    such a port before the server listens on it, or while a killed server is away.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until_free(port: int) -> None:
    """Waits until no process listens on a port of a killed server, whose children may end a moment later."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return
        time.sleep(0.02)
