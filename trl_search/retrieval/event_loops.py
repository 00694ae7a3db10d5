"""Shared by all HTTP retrievers: an event loop for blocking callers, and one HTTP client per event loop.

A `BackgroundLoop` keeps connections open between calls. `ClientPerLoop` keeps one `httpx.AsyncClient` per loop,
because a client works only on the loop it was first used on, and each rollout batch makes a new loop. Neither survives
a fork. `AsyncRetriever` has one of each, and replaces them in a child process.
"""

from __future__ import annotations

import abc
import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence

import httpx

from trl_search.common.event_loop import BackgroundLoop, LoopClosed
from trl_search.retrieval.base import RetrievalError, Retriever, check_search
from trl_search.types import Passage


class ClientPerLoop:
    """`await clients.get()` is the client of the running event loop, made by `make` and closed with the loop."""

    def __init__(self, make: Callable[[], httpx.AsyncClient]) -> None:
        self._make = make
        self._clients: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, AsyncGenerator[httpx.AsyncClient, None]]
        ] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._clients)

    async def get(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            # asyncio closes the async generators of a loop before the loop itself. This closes the connections when a
            # rollout ends, without a call to the retriever.
            client = self._make()
            living = self._live(loop, client)
            self._clients[loop] = client, living
            await anext(living)
        return self._clients[loop][0]

    async def _live(
        self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient
    ) -> AsyncGenerator[httpx.AsyncClient, None]:
        try:
            yield client
        finally:
            self._clients.pop(loop, None)
            await client.aclose()


class AsyncRetriever(Retriever):
    """A retriever over HTTP. A subclass implements `_make_client` and `search_async`, which must call `_begin`
    first."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        """Creates the state of one process; a forked child calls it again."""
        self._pid = os.getpid()
        self._background = BackgroundLoop("searches")
        self.clients = ClientPerLoop(self._make_client)

    @abc.abstractmethod
    def _make_client(self) -> httpx.AsyncClient:
        """A client for one event loop."""

    @abc.abstractmethod
    async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """[`search`] for coroutines. Connections stay open until the event loop closes."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self._restart_after_fork()
        try:
            return self._background.run(self.search_async(queries, k))
        except LoopClosed as error:
            raise RetrievalError(f"this retriever is closed ({error})") from None

    def close(self) -> None:
        super().close()
        if self._pid == os.getpid():
            self._background.close()

    def _begin(self, queries: Sequence[str], k: int) -> None:
        check_search(queries, k)
        self._check_open()
        self._restart_after_fork()

    def _restart_after_fork(self) -> None:
        if self._pid != os.getpid():
            self._start()
