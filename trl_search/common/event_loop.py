"""Runs coroutines from synchronous code, also in a notebook, where an event loop runs; awaits several together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_sync(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine to its end on a new event loop; if a loop is running already, in a separate thread."""
    if not _loop_is_running():  # not in an `except` block, which would be chained to errors of the coroutine
        return asyncio.run(coroutine)
    outcome: Future[Result] = Future()
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def main() -> Result:
        running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    def target() -> None:
        try:
            outcome.set_result(asyncio.run(main()))
        except BaseException as error:  # raised again in the calling thread
            outcome.set_exception(error)

    thread = threading.Thread(target=target, name="rollout")
    try:
        thread.start()
        return outcome.result()
    finally:
        if not outcome.done():  # Ctrl-C reaches only the calling thread, so the rollout must be cancelled
            loop, task = running.result()
            loop.call_soon_threadsafe(task.cancel)  # type: ignore[union-attr]
            wait([outcome])
        thread.join()


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
