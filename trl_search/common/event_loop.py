"""Coroutines: run for a caller without an event loop, or in a notebook, which has a running one; awaited together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Coroutine, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_sync(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine to its end on a fresh event loop, in a thread of its own where a loop is running already."""
    if not _loop_is_running():  # outside of an `except`: errors would name the one that it handles
        return asyncio.run(coroutine)
    outcome: Future[Result] = Future()
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def main() -> Result:
        running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await coroutine

    def target() -> None:
        try:
            outcome.set_result(asyncio.run(main()))
        except BaseException as error:  # carried over to the calling thread
            outcome.set_exception(error)

    thread = threading.Thread(target=target, name="rollout")
    try:
        thread.start()
        return outcome.result()
    finally:
        if not outcome.done():  # Ctrl-C reaches the calling thread alone: without this, the rollout would sample on
            loop, task = running.result()
            loop.call_soon_threadsafe(task.cancel)  # type: ignore[union-attr]
            wait([outcome])
        thread.join()


async def all_of(asked: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of all, in order, once all have ended; raises the first failure where there is one."""
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
