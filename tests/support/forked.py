"""Processes that start with torch, transformers and TRL imported, so that a test of two ranks need not import them.

They are forked from a server (`fork_server.py`) that imports them once per test session. Otherwise they are ordinary
processes: each has its own environment, output and session, and can be killed.

xdist's workers are such processes too (`fork_workers`): a worker starts as

    python tests/support/forked.py ADDRESS -u -c CODE

which makes the server run CODE with the worker's input and output, and ends when that process ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = (
    *("trl_search.evaluation.run", "trl_search.trainer.pipeline", "torch.distributed.tensor"),
    *("tests.support.compiled_search", "tests.support.imported_once"),
)
# The address of the session's server, in the environment of its workers.
ADDRESS = "TRL_SEARCH_TESTS_FORK_SERVER"


class ForkServer:
    """A connection to the server, with the state of the processes that were started through it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = b""
        self.codes: dict[int, int] = {}

    @classmethod
    def start(cls, modules: Sequence[str], environment: Mapping[str, str], address: str | None = None) -> ForkServer:
        """Starts a server that ends with this process. Other processes can connect to it at `address`."""
        mine, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX) as listening:
            passed = [theirs.fileno()]
            if address is not None:
                listening.bind(address)
                listening.listen()
                passed.append(listening.fileno())
            sockets = [str(passed[0]), str(passed[-1] if address else -1)]
            command = [sys.executable, "-m", "tests.support.fork_server", *sockets, *modules]
            subprocess.Popen(command, cwd=ROOT, env=dict(environment), pass_fds=passed, start_new_session=True)
        return cls(mine)

    @classmethod
    def connect(cls, address: str) -> ForkServer:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        return cls(connection)

    def fork(self, streams: Sequence[int], **request: object) -> int:
        """Forks a process with `streams` as stdin, stdout and stderr, and returns its id."""
        message = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [message], list(streams))
        self._connection.sendall(message[sent:])
        while True:
            for reply in self._read(None):
                if "started" in reply:
                    return int(reply["started"])

    def listen(self, timeout: float | None) -> None:
        """Records the processes that have ended."""
        self._read(timeout)

    def close(self) -> None:
        """Ends the processes of this connection, and the server if it was started here."""
        self._connection.close()

    def _read(self, timeout: float | None) -> list[dict[str, int]]:
        ready, _, _ = select.select([self._connection], [], [], timeout)
        more = self._connection.recv(1 << 16) if ready else b""
        if ready and not more:
            raise RuntimeError("the fork server has ended; what it said is in the output of the tests")
        *lines, self._unread = (self._unread + more).split(b"\n")
        replies = [json.loads(line) for line in lines]
        self.codes.update((reply["ended"], reply["code"]) for reply in replies if "ended" in reply)
        return replies


@functools.cache
def fork_server() -> ForkServer:
    """The server of this test session."""
    if address := os.environ.get(ADDRESS):
        return ForkServer.connect(address)
    return ForkServer.start(IMPORTED, _environment())


def fork_workers(specs: Sequence[Any], address: str) -> ForkServer:
    """Lets a server fork xdist's local workers; their tests get its address."""
    os.environ[ADDRESS] = address
    for spec in specs:
        if spec.popen and not spec.python:
            # Isolated and without site-packages, it starts almost at once.
            spec.python = shlex.join([sys.executable, "-I", "-S", __file__, address])
    return ForkServer.start(IMPORTED, _environment(), address)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def _worker(address: str, code: str) -> int:
    """Lets the server run `python -c CODE` with the input and output of this process, and waits for it."""
    server = ForkServer.connect(address)
    folder = os.getcwd()
    pid = server.fork((0, 1, 2), code=code, arguments=[], environment=dict(os.environ), folder=folder)
    signal.signal(signal.SIGINT, lambda *_: os.kill(pid, signal.SIGINT))
    os.close(0)
    os.close(1)  # so that the reader notices the end of the worker
    with contextlib.suppress(RuntimeError):  # the server has ended, and the worker with it
        while pid not in server.codes:
            server.listen(None)
    return server.codes.get(pid, 1)


class ForkedProcess:
    """`python -m MODULE ARGUMENTS`, with methods like those of `subprocess.Popen`. Output is appended to `log`.

    Args:
        streams (`tuple[int, int]`, *optional*): Descriptors of stdin and stdout; `log` then has only its stderr.
            A terminal becomes its controlling terminal.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
        server: ForkServer | None = None,
        streams: tuple[int, int] | None = None,
    ) -> None:
        self.module, self.log = module, log
        self._server = server or fork_server()
        with open(os.devnull) as nothing, log.open("ab") as said:
            read, written = streams or (nothing.fileno(), said.fileno())
            self.pid = self._server.fork(
                (read, written, said.fileno()),
                module=module,
                arguments=list(arguments),
                environment=dict(environment),
                folder=str(folder or Path.cwd()),
            )

    def poll(self) -> int | None:
        self._server.listen(0)
        return self._server.codes.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns the exit code.

        Raises:
            subprocess.TimeoutExpired: if it runs longer than `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.pid not in self._server.codes:
            left = 60.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(self.module, timeout or 0.0)
            self._server.listen(left)
        return self._server.codes[self.pid]

    def kill(self) -> None:
        """Kills it and its children at once, like a crash."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it is not a session leader yet
                os.kill(self.pid, signal.SIGKILL)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    os._exit(_worker(sys.argv[1], sys.argv[-1]) & 0xFF)
