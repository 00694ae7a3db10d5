"""Limits the pages that are fetched at a time, in all and from one site: several searches often find pages of one
site."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary, WeakValueDictionary

import httpx

from trl_search.retrieval.web.page import PageError

PAGES_AT_ONCE = 64
PAGES_PER_HOST = 6  # as many as a browser


class PageGates:
    """`async with gates.enter(url, within_s)` waits until fewer than `PAGES_AT_ONCE` pages are being fetched, and
    fewer than `PAGES_PER_HOST` of its host."""

    def __init__(self) -> None:
        # A semaphore works on one event loop, and keeps it alive: it is dropped when nobody waits. `None`: all hosts.
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str | None, asyncio.Semaphore]]
        self._gates = WeakKeyDictionary()

    @contextlib.asynccontextmanager
    async def enter(self, url: str, within_s: float) -> AsyncIterator[None]:
        """Without time left, only gates that are open are entered.

        Raises:
            PageError: after `within_s`; another attempt may succeed.
        """
        gates = self._gates.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        of_host = gates.setdefault(_host(url), asyncio.Semaphore(PAGES_PER_HOST))
        of_all = gates.setdefault(None, asyncio.Semaphore(PAGES_AT_ONCE))
        async with contextlib.AsyncExitStack() as held:
            try:
                async with asyncio.timeout(within_s):
                    await held.enter_async_context(of_host)
                    await held.enter_async_context(of_all)
            except TimeoutError:
                raise PageError(f"{url[:200]}: too many pages are wanted at a time", passing=True) from None
            yield


def _host(url: str) -> str:
    try:
        return httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError):  # fetching the page will say so
        return ""
