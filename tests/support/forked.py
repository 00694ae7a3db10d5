"""Processes that start with torch, transformers and TRL imported, so that a test of two ranks need not import them.

They are forked from a server (`fork_server.py`) that imports them once per test session. Otherwise each is a process
like any other: it has its own environment and output, it leads a session, and it can be killed.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTED = ("trl_search.evaluation.run", "trl_search.trainer.pipeline", "torch.distributed.tensor")


class ForkServer:
    """The server, and what it has said of its processes."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        command = [sys.executable, "-m", "tests.support.fork_server", str(requests), str(replies), *modules]
        self.process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), pass_fds=(requests, replies))
        os.close(requests)
        os.close(replies)
        self._unread = b""
        self.codes: dict[int, int] = {}

    def fork(self, **request: object) -> int:
        """The id of a new process."""
        os.write(self._requests, json.dumps(request).encode() + b"\n")
        while True:
            for reply in self._read(None):
                if "started" in reply:
                    return int(reply["started"])

    def listen(self, timeout: float) -> None:
        """Takes note of the processes that have ended."""
        self._read(timeout)

    def close(self) -> None:
        os.close(self._requests)
        self.process.wait()

    def _read(self, timeout: float | None) -> list[dict[str, int]]:
        ready, _, _ = select.select([self._replies], [], [], timeout)
        more = os.read(self._replies, 1 << 16) if ready else b""
        if ready and not more:
            raise RuntimeError("the fork server has ended; what it said is in the output of the tests")
        *lines, self._unread = (self._unread + more).split(b"\n")
        replies = [json.loads(line) for line in lines]
        self.codes.update((reply["ended"], reply["code"]) for reply in replies if "ended" in reply)
        return replies


@functools.cache
def fork_server() -> ForkServer:
    """The server of this test session."""
    return ForkServer(IMPORTED, {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})


class ForkedProcess:
    """`python -m MODULE ARGUMENTS`, with what `subprocess.Popen` offers of it. Output goes to the end of `log`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
        server: ForkServer | None = None,
    ) -> None:
        self.module, self.log = module, log
        self._server = server or fork_server()
        self.pid = self._server.fork(
            module=module,
            arguments=list(arguments),
            environment=dict(environment),
            folder=str(folder or Path.cwd()),
            log=str(log),
        )

    def poll(self) -> int | None:
        self._server.listen(0)
        return self._server.codes.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended.

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
        """Ends it, and what it has started, as a crash does."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it does not lead its session yet
                os.kill(self.pid, signal.SIGKILL)

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")
