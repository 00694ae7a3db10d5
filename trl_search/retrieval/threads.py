"""Work for an event loop on threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from trl_search.retrieval.base import Unavailable

MAX_HUNG = 8  # calls left behind before new ones are refused: each keeps a thread and whatever it was waiting for

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


class DaemonCalls:
    """Calls of one retriever on daemon threads. One that was given up, by cancelling its future, counts as hung until
    its thread ends; new ones are refused while `MAX_HUNG` hang."""

    def __init__(self) -> None:
        self._calls: dict[threading.Thread, asyncio.Future[Any]] = {}

    def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """[`on_daemon_thread`], unless too many hang.

        Raises:
            Unavailable: if `MAX_HUNG` calls were given up and have not come back.
        """
        for thread in list(self._calls):
            if not thread.is_alive():
                self._calls.pop(thread, None)  # or another event loop's thread was first
        if sum(found.cancelled() for found in list(self._calls.values())) >= MAX_HUNG:
            raise Unavailable(f"the retriever hangs: {MAX_HUNG} calls have not come back; restart it and this process")
        found, thread = on_daemon_thread(work)
        self._calls[thread] = found
        return found
