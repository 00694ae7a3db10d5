"""Runs blocking work for an event loop on daemon threads. Neither the loop nor the exit of the process waits for them.

Threads are reused. `Thread.start` blocks until the new thread runs, and an event loop that starts a thread for each
batch of searches spends a quarter of its time there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from trl_search.retrieval.base import Retriever, Unavailable
from trl_search.types import Passage

MAX_IDLE = 8  # idle threads that are kept; further threads end after their work
MAX_HUNG = 8  # hanging calls after which new ones are refused: each keeps a thread and its memory

T = TypeVar("T")


Inbox = queue.SimpleQueue[Callable[[], None]]  # where an idle thread waits for work


def on_daemon_thread(work: Callable[[], T]) -> tuple[asyncio.Future[T], threading.Event]:
    """Starts work on a thread. Returns a future of its result, and an event that is set when the thread is done.

    Unlike `asyncio.to_thread`, neither the loop nor the interpreter's exit waits for work that hangs.

    Example:
        >>> found, _ = on_daemon_thread(lambda: retriever.search(["who founded Orlune?"], 3))
        >>> await asyncio.wait_for(found, timeout=10)
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has closed
            loop.call_soon_threadsafe(lambda: None if done.done() else settle())

    ended = threading.Event()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            # A future rejects StopIteration, which would end the coroutine that awaits it.
            failure = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
            tell(lambda: done.set_exception(failure))
        else:
            tell(lambda: done.set_result(result))
        finally:
            ended.set()

    idle = _idle_threads(os.getpid())
    try:
        inbox = idle.pop()
    except IndexError:
        inbox = queue.SimpleQueue()
        threading.Thread(target=_work_on, args=(inbox, idle), daemon=True).start()
    inbox.put(run)
    return done, ended


@functools.cache
def _idle_threads(pid: int) -> list[Inbox]:
    """The idle threads of this process: threads do not survive a fork."""
    return []


def _work_on(inbox: Inbox, idle: list[Inbox]) -> None:
    while True:
        inbox.get()()
        if len(idle) >= MAX_IDLE:
            return
        idle.append(inbox)


class DaemonCalls:
    """Calls of one retriever on daemon threads. A call whose future was cancelled counts as hung until its thread is
    done; while `MAX_HUNG` calls hang, new ones are refused."""

    def __init__(self) -> None:
        self._calls: dict[threading.Event, asyncio.Future[Any]] = {}

    def start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """[`on_daemon_thread`], unless too many calls hang.

        Raises:
            Unavailable: if `MAX_HUNG` cancelled calls have not returned.
        """
        for ended in list(self._calls):
            if ended.is_set():
                self._calls.pop(ended, None)  # another event loop may have removed it
        if sum(found.cancelled() for found in list(self._calls.values())) >= MAX_HUNG:
            raise Unavailable(f"the retriever hangs: {MAX_HUNG} calls have not returned; restart it and this process")
        found, ended = on_daemon_thread(work)
        self._calls[ended] = found
        return found


def start_search(
    retriever: Retriever, calls: DaemonCalls, queries: Sequence[str], k: int
) -> asyncio.Future[list[list[Passage]]]:
    """Starts one search: a task if the retriever has `search_async`, else a thread of `calls`.

    Cancel the future to abandon the search: a task stops, a thread runs on.

    Raises:
        Unavailable: if the search needs a thread and too many calls hang.
    """
    search_async = getattr(retriever, "search_async", None)
    found: asyncio.Future[list[list[Passage]]]
    if search_async is None:
        found = calls.start(lambda: retriever.search(queries, k))
    else:
        found = asyncio.ensure_future(search_async(queries, k))
    # A cancelled task may fail while it stops. Reading the exception keeps asyncio from logging it.
    found.add_done_callback(lambda done: done.cancelled() or done.exception())
    return found
