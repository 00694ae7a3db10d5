"""Searches and other work for an event loop, none of which anybody has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from trl_search.retrieval.base import Retriever, Unavailable
from trl_search.types import Passage

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


def start_search(
    retriever: Retriever, calls: DaemonCalls, queries: Sequence[str], k: int
) -> asyncio.Future[list[list[Passage]]]:
    """One search of a retriever: a task where it has `search_async`, else on a thread among its `calls`.

    To give it up, cancel it: a task is told to stop, a thread is left behind.

    Raises:
        Unavailable: if it would need a thread, and too many of them hang.
    """
    search_async = getattr(retriever, "search_async", None)
    found: asyncio.Future[list[list[Passage]]]
    if search_async is None:
        found = calls.start(lambda: retriever.search(queries, k))
    else:
        found = asyncio.ensure_future(search_async(queries, k))
    # A task that was given up may fail while it stops. Nobody asks for that any more, and asyncio would log it.
    found.add_done_callback(lambda done: done.cancelled() or done.exception())
    return found
