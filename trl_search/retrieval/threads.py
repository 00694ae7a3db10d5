"""Work for an event loop on threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def on_daemon_thread(work: Callable[[], T]) -> tuple[asyncio.Future[T], threading.Thread]:
    """Starts work, and returns the future of what it returns or raises.

    Neither the loop nor the interpreter's exit waits for it, as they would for `asyncio.to_thread`: what hangs is left
    behind.

    Example:
        >>> found, _ = on_daemon_thread(lambda: retriever.search(["who founded Orlune?"], 3))
        >>> await asyncio.wait_for(found, timeout=10)
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended meanwhile
            loop.call_soon_threadsafe(lambda: None if done.done() else settle())

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            # A future takes any exception but this one, which would end the coroutine that waits.
            failure = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
            tell(lambda: done.set_exception(failure))
        else:
            tell(lambda: done.set_result(result))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return done, thread
