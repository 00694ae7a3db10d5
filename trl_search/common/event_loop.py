"""Runs coroutines from synchronous code, also in a notebook, where an event loop runs; awaits several together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoopClosed(RuntimeError):
    """An event loop is closed, or was closed before a coroutine was done."""


class BackgroundLoop:
    """An event loop on a thread, from the first coroutine to `close`. Any thread may submit coroutines."""

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Starts a coroutine. Raises `LoopClosed` if the loop is closed."""
        with self._lock:  # a coroutine submitted after the stop would never run
            if self._closed:
                coroutine.close()
                raise LoopClosed("this event loop is closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Waits for the coroutine's result. Raises `LoopClosed` if the loop is or gets closed."""
        try:
            return self.submit(coroutine).result()
        except CancelledError:
            raise LoopClosed("the event loop was closed before this was done") from None

    def close(self, timeout_s: float | None = 10) -> None:
        """Cancels running coroutines and ends the thread. Safe to call twice."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._closed = True
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            loop = runner.get_loop()

            def live() -> None:
                with runner:  # on exit, cancels the remaining tasks
                    loop.run_forever()

            thread = threading.Thread(target=live, name=self._name, daemon=True)
            thread.start()  # before the assignment: if it fails, the next call retries
            self._loop, self._thread = loop, thread
        return self._loop


def run_sync(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine to its end on a new event loop; if a loop is running already, in a separate thread."""
    if not _loop_is_running():  # not in an `except` block, which would be chained to errors of the coroutine
        return asyncio.run(coroutine)
    loop = BackgroundLoop("rollout")
    try:
        return loop.run(coroutine)
    finally:
        loop.close(timeout_s=None)  # Ctrl-C reaches only the calling thread, so the rollout must be cancelled


async def all_of(asked: Iterable[Awaitable[Result]]) -> list[Result]:
    """Waits for all and returns their results in order; raises the first failure if there is one."""
    found = await asyncio.gather(*asked, return_exceptions=True)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found  # type: ignore[return-value]  # mypy does not see the raise


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
