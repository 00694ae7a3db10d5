"""Limits the pages that are fetched from one site at a time: several searches often find pages of the same site."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary, WeakValueDictionary

import httpx

from trl_search.retrieval.web.page import PageError

PAGES_PER_HOST = 6  # as many as a browser
PATIENCE_S = 10.0  # as long as a page may take: one slow site must not fail the search of all others


class HostTurns:
    """`async with turns.take(url)` waits until fewer than `PAGES_PER_HOST` pages of the host are being fetched."""

    def __init__(self) -> None:
        # A semaphore works on one event loop. It is dropped when nobody waits for its host.
        self._hosts: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, asyncio.Semaphore]] = (
            WeakKeyDictionary()
        )

    @contextlib.asynccontextmanager
    async def take(self, url: str) -> AsyncIterator[None]:
        """
        Raises:
            PageError: after `PATIENCE_S`; another attempt may succeed.
        """
        hosts = self._hosts.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        turns = hosts.setdefault(_host(url), asyncio.Semaphore(PAGES_PER_HOST))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await turns.acquire()
        except TimeoutError:
            raise PageError(f"{url[:200]}: too many pages of this site are wanted at a time", passing=True) from None
        try:
            yield
        finally:
            turns.release()


def _host(url: str) -> str:
    try:
        return httpx.URL(url).host
    except (httpx.InvalidURL, UnicodeError):  # fetching the page will say so
        return ""
