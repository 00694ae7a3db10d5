"""Makes Ctrl-C reach the main thread of a chat, which has many threads.

The kernel gives the signal to any thread that does not block it. If another one gets it, the main thread goes on
waiting for the next line or an answer. So every other thread blocks the signal from its start on, and so do the
threads that libraries start in it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")

# How long a Ctrl-C may go unseen while the main thread waits: some thread of a library may still have taken it.
INTERRUPT_S = 0.2


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """A thread that starts in here, and every thread that it starts, leaves Ctrl-C to others."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wait_for(future: Future[Result]) -> Result:
    """The result of a future; Ctrl-C is seen while it is waited for."""
    while not wait([future], timeout=INTERRUPT_S).done:
        continue
    return future.result()


def beside_main(work: Callable[[], Result]) -> Result:
    """Runs work on a thread that leaves Ctrl-C to this one, and returns its result.

    Example:
        >>> chat = beside_main(lambda: load_chat("runs/qwen3b", retriever))
    """
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # carried over to the thread that waits
            done.set_exception(error)

    with interrupts_blocked():
        threading.Thread(target=run, name="loading", daemon=True).start()
    result: Result = wait_for(done)
    return result
