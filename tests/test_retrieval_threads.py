"""Work on threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from trl_search.retrieval.threads import on_daemon_thread


def test_what_work_returns_and_raises():
    async def both():
        assert await on_daemon_thread(threading.get_ident)[0] != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await on_daemon_thread(lambda: 1 // 0)[0]

    asyncio.run(both())


def test_an_exception_that_no_future_takes_arrives_as_another():
    async def stop():
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(on_daemon_thread(lambda: next(iter(())))[0], timeout=5)

    asyncio.run(stop())


def test_work_that_was_given_up_disturbs_nobody(caplog):
    async def give_up():
        done, thread = on_daemon_thread(lambda: time.sleep(0.2))
        done.cancel()
        await asyncio.sleep(0)
        return thread

    thread = asyncio.run(give_up())
    assert thread.is_alive()
    thread.join()  # its loop has ended meanwhile
    assert not caplog.records


def test_the_exit_does_not_wait():
    program = """
import asyncio, time
from trl_search.retrieval.threads import on_daemon_thread
async def main():
    on_daemon_thread(lambda: time.sleep(60))
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 0
