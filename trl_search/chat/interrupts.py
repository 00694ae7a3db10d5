"""Makes Ctrl-C reach the main thread of a chat, which has many threads.

The kernel delivers the signal to any thread that does not block it. If that is not the main thread, the main thread
keeps waiting for the next line or an answer. So all other threads, including those that libraries start, block the
signal.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")

# How often the waiting main thread checks for a Ctrl-C that some thread of a library has taken.
INTERRUPT_S = 0.2


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Threads that start inside this context, and all threads that they start, do not receive Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for(future: Future[Result]) -> Result:
    """Waits for the result of a future; Ctrl-C can interrupt the wait."""
    while not wait([future], timeout=INTERRUPT_S).done:
        continue
    return future.result()


def beside_main(work: Callable[[], Result]) -> Result:
    """Runs `work` in a thread that does not receive Ctrl-C, and returns its result."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # raised again in the waiting thread
            done.set_exception(error)

    with interrupts_blocked():
        threading.Thread(target=run, name="loading", daemon=True).start()
    result: Result = wait_for(done)
    return result
