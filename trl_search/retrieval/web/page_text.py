"""The text of HTML, extracted by trafilatura in child processes, which a signal ends when they take too long.

A page of short lists can keep trafilatura busy for a minute, and a thread cannot be stopped. A child reads one page
after the other; if a page ends it, a new child is started.

    extract(body, within_s) ─► idle child, or a new one ─► text
                                         └─ out of time: its own alarm ends it, also where the parent is gone

The children run this file too, by its path. It imports nothing of the package, so that a child starts in half a second
and works wherever trafilatura can be imported.
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

CHILDREN = 4  # of one process at most, about 100 MB each
_SECONDS = struct.Struct("<d")


class TextError(RuntimeError):
    """Trafilatura failed on a page, and would again."""


class _Child:
    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            # -P: beside this file are modules with the names of others.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def ask(self, body: bytes, within_s: float) -> dict[str, str]:
        """Raises `TimeoutError` or `ChildProcessError` where the child has ended; no other may be asked after that."""
        try:
            self._pipe.send_bytes(_SECONDS.pack(max(within_s, 0.001)) + body)  # zero would be no alarm
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
    """The children of a process; `None` where one may be started. The last that was used is the next one."""
    places: queue.LifoQueue[_Child | None] = queue.LifoQueue()
    for _ in range(CHILDREN):
        places.put(None)
    return places


def extract(body: bytes, within_s: float) -> str:
    """The main text of a page, `""` where there is none. Blocks, `within_s` at most.

    Raises:
        TimeoutError: if it takes longer, waiting for a child included.
        ChildProcessError: if the child did not survive the page.
        TextError: if trafilatura failed.
        ImportError: if trafilatura cannot be imported.
    """
    deadline = time.monotonic() + within_s
    places = _places(os.getpid())  # those of a forked process are its own
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
    # Its complaints about pages that are none are of no use: there is an error that names the page.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    try:
        return {"text": (trafilatura.extract(body, include_comments=False, include_tables=True) or "").strip()}
    except Exception as error:  # of a stranger's page, anything
        return {"error": f"trafilatura: {type(error).__name__}: {str(error)[:200]}"}


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, also inside of C
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
