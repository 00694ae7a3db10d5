"""Work on daemon threads."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Sequence

import pytest

from tests.support.fakes import FixedRetriever
from trl_search.retrieval.threads import DaemonCalls, _idle_threads, on_daemon_thread, start_search
from trl_search.types import Passage


def test_results_and_exceptions_are_returned():
    async def both():
        assert await on_daemon_thread(threading.get_ident)[0] != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await on_daemon_thread(lambda: 1 // 0)[0]

    asyncio.run(both())


def test_stop_iteration_is_raised_as_runtime_error():
    async def stop():
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(on_daemon_thread(lambda: next(iter(())))[0], timeout=60)

    asyncio.run(stop())


def test_cancelled_work_has_no_later_effect(caplog):
    async def give_up():
        done, ended = on_daemon_thread(lambda: time.sleep(0.2))
        done.cancel()
        await asyncio.sleep(0)
        return ended

    ended = asyncio.run(give_up())
    assert not ended.is_set()
    assert ended.wait(timeout=60)  # its loop has ended by now
    assert not caplog.records


def test_threads_are_reused_and_a_forked_process_has_its_own():
    idle = _idle_threads(os.getpid())

    async def numbers():
        found = set()
        for _ in range(5):
            done, ended = on_daemon_thread(threading.get_ident)
            found.add(await done)
            while not (ended.is_set() and idle):  # a thread becomes idle shortly after it has answered
                await asyncio.sleep(0.001)
        return found

    idle.clear()
    assert len(asyncio.run(numbers())) < 5
    child = os.fork()
    if not child:
        os._exit(asyncio.run(on_child()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


async def on_child() -> int:
    return await asyncio.wait_for(on_daemon_thread(lambda: 7)[0], timeout=60)


def test_the_process_ends_without_waiting_for_threads():
    program = """
import asyncio, time
from trl_search.retrieval.threads import on_daemon_thread
async def main():
    on_daemon_thread(lambda: time.sleep(60))
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=600).returncode == 0


def test_search_async_may_return_any_awaitable():
    class Forwards(FixedRetriever):
        def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            raise AssertionError("searched on a thread")

        def search_async(self, queries: Sequence[str], k: int) -> Awaitable[list[list[Passage]]]:
            return asyncio.sleep(
                0, [self.passages for _ in queries]
            )  # returns an awaitable, but is no coroutine function

    async def search():
        return await start_search(Forwards([Passage("a", "", "")]), DaemonCalls(), ["?"], 1)

    assert asyncio.run(search()) == [[Passage("a", "", "")]]


def test_the_failure_of_a_cancelled_search_is_not_logged(caplog):
    class Fails(FixedRetriever):
        async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
            try:
                await asyncio.sleep(60)
            finally:
                raise ConnectionError("while it stops")

    async def give_up():
        found = start_search(Fails([]), DaemonCalls(), ["?"], 1)
        await asyncio.sleep(0)
        found.cancel()
        await asyncio.sleep(0.01)

    asyncio.run(give_up())
    gc.collect()  # asyncio would log when the task is deleted
    assert not caplog.records
