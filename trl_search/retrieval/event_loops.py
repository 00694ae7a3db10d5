"""Shared by all HTTP retrievers: an event loop for blocking callers, and one HTTP client per event loop.

A `BackgroundLoop` runs from the first call to `close`, so that connections stay open between calls. `ClientPerLoop`
keeps one `httpx.AsyncClient` per loop, because a client works only on the loop it was first used on, and each rollout
batch makes a new loop. Neither survives a fork. `AsyncRetriever` has one of each, and replaces them in a child
process.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import functools
import os
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from trl_search.retrieval.base import RetrievalError, Retriever, check_search
from trl_search.types import Passage

Result = TypeVar("Result")


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The default certificates, read once: reading them for each client would take 0.1 s."""
    return httpx.create_ssl_context()


class BackgroundLoop:
    """Runs coroutines for blocking callers: `loop.run(coroutine)`, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Waits for the coroutine's result. Raises `RetrievalError` if the loop is or gets closed."""
        with self._lock:  # a coroutine submitted after the stop would never run
            if self._closed:
                coroutine.close()
                raise RetrievalError("this retriever is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._running())
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RetrievalError("the retriever was closed before this search was done") from None

    def close(self) -> None:
        """Cancels running coroutines and ends the thread. Safe to call twice."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._closed = True
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            loop = runner.get_loop()

            def live() -> None:
                with runner:  # on exit, cancels the remaining tasks
                    loop.run_forever()

            thread = threading.Thread(target=live, daemon=True)
            thread.start()  # before the assignment: if it fails, the next call retries
            self._loop, self._thread = loop, thread
        return self._loop


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
        self._background = BackgroundLoop()
        self.clients = ClientPerLoop(self._make_client)

    @abc.abstractmethod
    def _make_client(self) -> httpx.AsyncClient:
        """A client for one event loop."""

    @abc.abstractmethod
    async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """[`search`] for coroutines. Connections stay open until the event loop closes."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self._restart_after_fork()
        return self._background.run(self.search_async(queries, k))

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
