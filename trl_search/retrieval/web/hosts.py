"""Limits the pages that are fetched from one site at a time: several searches often find pages of the same site."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary, WeakValueDictionary

import httpx

from trl_search.retrieval.web.page import PageError

PAGES_PER_HOST = 6  # as many as a browser


class HostTurns:
    """`async with turns.take(url, gate, within_s)` waits until fewer than `PAGES_PER_HOST` pages of the host are being
    fetched, and the gate of the search is open."""

    def __init__(self) -> None:
        # A semaphore works on one event loop. It is dropped when nobody waits for its host.
        self._hosts: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, asyncio.Semaphore]] = (
            WeakKeyDictionary()
        )

    @contextlib.asynccontextmanager
    async def take(self, url: str, gate: asyncio.Semaphore, within_s: float) -> AsyncIterator[None]:
        """Without time left, only a turn that is free at once is taken.

        Raises:
            PageError: after `within_s`; another attempt may succeed.
        """
        hosts = self._hosts.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        turns = hosts.setdefault(_host(url), asyncio.Semaphore(PAGES_PER_HOST))
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(within_s):
                    await held.enter_async_context(turns)
                    await held.enter_async_context(gate)
            except TimeoutError:
                raise PageError(f"{url[:200]}: too many pages are wanted at a time", passing=True) from None
            yield


def _host(url: str) -> str:
    try:
        return httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError):  # fetching the page will say so
        return ""
