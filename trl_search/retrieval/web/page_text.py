"""Extracts the text of HTML with trafilatura in child processes, which a signal ends if they take too long.

A page of short lists can keep trafilatura busy for a minute, and a thread cannot be stopped. A child reads one page at
a time; if a page kills it, a new child is started.

    extract(body, within_s) ─► idle child, or a new one ─► text
                                         └─ out of time: its own alarm ends it, even if the parent is gone

The children run this file by its path. It imports nothing from the package, so that a child starts in half a second
and needs only trafilatura.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import signal
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe

CHILDREN = 4  # at most, per process; about 100 MB each
_SECONDS = struct.Struct("<d")


class TextError(RuntimeError):
    """Trafilatura failed on a page, and would fail again."""


class _Child:
    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            # -P: modules in this folder have the names of other modules.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def ask(self, body: bytes, within_s: float) -> dict[str, str]:
        """Extracts one page. After a `TimeoutError` or `ChildProcessError` the child has ended and must not be used
        again."""
        try:
            self._pipe.send_bytes(_SECONDS.pack(max(within_s, 0.001)) + body)  # zero would mean no alarm
            answer: dict[str, str] = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._pipe.close()
            status = self._process.wait()
            if status == -signal.SIGALRM:
                raise TimeoutError from None
            raise ChildProcessError(f"the process that read it ended with {status}") from None
        return answer


@functools.cache
def _places(pid: int) -> queue.LifoQueue[_Child | None]:
    """The children of a process, last used first; `None` for one that may still be started."""
    places: queue.LifoQueue[_Child | None] = queue.LifoQueue()
    for _ in range(CHILDREN):
        places.put(None)
    return places


def extract(body: bytes, within_s: float) -> str:
    """The main text of a page, or `""`. Blocks for at most `within_s`.

    Raises:
        TimeoutError: if it takes longer, including the wait for a child.
        ChildProcessError: if the child died while it read the page.
        TextError: if trafilatura failed.
        ImportError: if trafilatura cannot be imported.
    """
    deadline = time.monotonic() + within_s
    places = _places(os.getpid())  # a forked process needs its own children
    try:
        child = places.get(timeout=max(within_s, 0))
    except queue.Empty:
        raise TimeoutError from None
    usable = None
    try:
        child = child or _Child()
        answer = child.ask(body, deadline - time.monotonic())
        usable = child
    finally:
        places.put(usable)
    if "missing" in answer:
        raise ImportError(answer["missing"])
    if "error" in answer:
        raise TextError(answer["error"])
    return answer["text"]


def _answer(body: bytes) -> dict[str, str]:
    try:
        import trafilatura
    except ImportError as error:
        return {"missing": str(error)}
    # Silence its complaints about invalid pages: an error already names the page.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    try:
        return {"text": (trafilatura.extract(body, include_comments=False, include_tables=True) or "").strip()}
    except Exception as error:  # a stranger's page can raise anything
        return {"error": f"trafilatura: {type(error).__name__}: {str(error)[:200]}"}


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process, even inside C code
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            asked = pipe.recv_bytes()
            signal.setitimer(signal.ITIMER_REAL, *_SECONDS.unpack_from(asked))
            answer = json.dumps(_answer(asked[_SECONDS.size :])).encode()
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send_bytes(answer)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
