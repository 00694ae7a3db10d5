"""A port for a process that is told where to listen."""

from __future__ import annotations

import contextlib
import random
import socket


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
