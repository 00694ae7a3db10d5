"""Searches the live web.

    load_retriever("web")                                   # ddgs: no key, slow, for trials
    load_retriever("web", provider="serper", pages=True)    # SERPER_API_KEY; the text of the pages, not the snippets

    query ─► stored answer? ─► wait for a turn ─► provider ─► store ─► [pages: stored text? fetch, extract, store]

- A result becomes a passage: its id and `url` are the address, its text is the engine's snippet or the beginning of
  the page. If a page cannot be read (a PDF, a 403, too slow, not public), the snippet is used and the failure counted.
- Results are stored in one file (`store.py`), so that a re-run trains on the same results. Failed searches and empty
  results are not stored: engines return empty results when they block a client. An unreadable page is stored as such,
  unless the reason is temporary: an outage or a slow site must not hide the page from all later runs.
- A query fails if the engine has not answered within `patience_s`, including the rate limit's wait and retries, and at
  once if that wait would be longer. At one search per second, 64 trajectories need a minute: raise `rate_per_s` as
  your plan allows, or `patience_s` and training's `search_timeout_s`. Pages are fetched after that.
- A page waits for others only while `patience_s` leaves the time to fetch it. After that, its snippet is used: one
  slow site, or very many pages, must not fail the searches of the same batch.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import httpx
import tenacity

from trl_search.common.bounds import check_at_least, check_positive
from trl_search.common.event_loop import all_of
from trl_search.common.files import cache_folder, home_expanded
from trl_search.common.tls import tls_context
from trl_search.retrieval.base import RetrievalError, Unavailable
from trl_search.retrieval.event_loops import AsyncRetriever
from trl_search.retrieval.web.page import PageError, PageLimits, fetch_page
from trl_search.retrieval.web.page_gates import PageGates
from trl_search.retrieval.web.providers import Provider, ProviderBusy, WebHit, load_provider
from trl_search.retrieval.web.store import WebStore
from trl_search.types import Passage

RESULTS = 10  # requested at least: ten results cost as much as one, and serve every k up to ten
MAX_QUERY_CHARS = 400  # engines ignore more, or reject it
_GROWING = tenacity.wait_random_exponential(multiplier=1, max=10)


class WebRetriever(AsyncRetriever):
    """Searches the web through a provider.

    Args:
        provider (`Provider`): The search engine.
        store (`WebStore`): Stores answers and the times of searches.
        rate_per_s, pages, page_chars, patience_s: As for [`load`]; all processes that share the store share the rate.
        tries (`int`): Tries per search while the provider is busy.
        fetch (`Callable`): `await fetch(url)` gives a page's text, or raises `PageError`.
        sleep (`Callable`): `await sleep(seconds)`.

    Raises:
        UserError: for an option out of range.
    """

    max_concurrent_batches = 8

    def __init__(
        self,
        provider: Provider,
        store: WebStore,
        *,
        rate_per_s: float,
        pages: bool = False,
        page_chars: int = 2000,
        patience_s: float = 25.0,
        tries: int = 4,
        fetch: Callable[[str], Awaitable[str]] = fetch_page,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        check_positive(rate_per_s=rate_per_s, patience_s=patience_s)
        check_at_least(1, page_chars=page_chars, tries=tries)
        self._provider, self._store, self._rate_per_s = provider, store, rate_per_s
        self._pages, self._page_chars = pages, page_chars
        self._patience_s, self._tries, self._fetch, self._sleep = patience_s, tries, fetch, sleep
        self._counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._gates = PageGates()
        super().__init__()

    def _make_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(timeout=10.0, verify=tls_context())

    async def search_async(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """[`search`] for coroutines. All queries are searched even if one fails, so that their results are stored."""
        self._begin(queries, k)
        # A page that begins later would end after the patience.
        begin_by = time.monotonic() + self._patience_s - PageLimits.timeout_s
        asked = dict.fromkeys(_tidy(query) for query in queries)
        found = dict(zip(asked, await all_of(self._passages(query, k, begin_by) for query in asked), strict=True))
        return [found[_tidy(query)] for query in queries]

    def take_metrics(self) -> dict[str, float]:
        with self._counting:
            counts, self._counts = self._counts, Counter()
        return {
            "retrieval/requests": float(counts["requests"]),
            "retrieval/failures": float(counts["failures"]),
            "retrieval/retries": float(counts["retries"]),
            "retrieval/from_cache": float(counts["from_cache"]),
            "retrieval/page_failures": float(counts["page_failures"]),
            f"retrieval/failures/{self._provider.name}": float(counts["failures"]),
        }

    async def _passages(self, query: str, k: int, begin_by: float) -> list[Passage]:
        if not query:
            return []
        hits = (await self._hits(query, max(k, RESULTS)))[:k]
        texts = [hit.snippet for hit in hits]
        if self._pages:
            texts = list(await asyncio.gather(*(self._page(hit, begin_by) for hit in hits)))
        return [
            Passage(hit.url, hit.title, text, 1.0 / rank, hit.url)
            for rank, (hit, text) in enumerate(zip(hits, texts, strict=True), start=1)
        ]

    async def _hits(self, query: str, count: int) -> list[WebHit]:
        key = ["hits", self._provider.identity, query, count]
        rows = await asyncio.to_thread(self._store.get, key)
        if rows is not None:
            self._count("from_cache")
        else:
            hits = await self._ask(query, count)
            rows = [[hit.title, hit.url, hit.snippet] for hit in hits]
            if rows:
                rows = await asyncio.to_thread(self._store.put, key, rows)
        return [WebHit(*row) for row in rows]

    async def _ask(self, query: str, count: int) -> list[WebHit]:
        deadline = time.monotonic() + self._patience_s

        def wait_s(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            named_s = error.wait_s if isinstance(error, ProviderBusy) else None
            return _GROWING(state) if named_s is None else named_s + _GROWING(state) / 10

        ask = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ProviderBusy),
            stop=tenacity.stop_after_attempt(self._tries) | tenacity.stop_before_delay(self._patience_s),
            wait=wait_s,
            sleep=self._sleep,
            before_sleep=lambda _: self._count("retries"),
            reraise=True,
        )
        try:
            return await ask(self._ask_once, query, count, deadline)
        except ProviderBusy as error:
            raise Unavailable(f"{error}; gave up after {ask.statistics['attempt_number']} tries") from error

    async def _ask_once(self, query: str, count: int, deadline: float) -> list[WebHit]:
        turn_s = await asyncio.to_thread(
            self._store.take_turn, self._provider.name, rate_per_s=self._rate_per_s, within_s=_left_s(deadline)
        )
        if turn_s is None:
            self._count("failures")
            raise RetrievalError(
                f"{self._provider.name}: more searches are waiting than {self._rate_per_s:g} per second can serve "
                f"in {self._patience_s:g} s; raise rate_per_s (as your plan allows) or patience_s"
            )
        await self._sleep(turn_s)
        self._count("requests")
        try:
            async with asyncio.timeout(_left_s(deadline)):
                return await self._provider.search(await self.clients.get(), query, count)
        except TimeoutError:
            self._count("failures")
            raise Unavailable(
                f"{self._provider.name}: no answer within {self._patience_s:g} s, including the wait and retries; "
                "is it up, and is patience_s long enough?"
            ) from None
        except RetrievalError:
            self._count("failures")
            raise

    async def _page(self, hit: WebHit, begin_by: float) -> str:
        key = ["page", hit.url, self._page_chars]
        stored = await asyncio.to_thread(self._store.get, key)
        if stored is None:
            try:
                async with self._gates.enter(hit.url, _left_s(begin_by)):
                    stored = [(await self._fetch(hit.url))[: self._page_chars]]
            except PageError as error:
                self._count("page_failures")
                if error.passing:
                    return hit.snippet
                stored = []  # stored too: otherwise a page that becomes readable would change a re-run
            stored = await asyncio.to_thread(self._store.put, key, stored)
        return stored[0] if stored else hit.snippet

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1


def _left_s(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _tidy(query: str) -> str:
    """One line of valid text, cut to what engines accept."""
    return " ".join(query.encode("utf-8", "replace").decode().split())[:MAX_QUERY_CHARS].strip()


def load(
    *,
    provider: str = "ddgs",
    base_url: str | None = None,
    cache: str | Path | None = None,
    rate_per_s: float | None = None,
    pages: bool = False,
    page_chars: int = 2000,
    patience_s: float = 25.0,
) -> WebRetriever:
    """`load_retriever("web", ...)`.

    Args:
        provider (`str`): "ddgs", "serper", "tavily", "brave" or "searxng".
        base_url (`str`, *optional*): The address of the provider; searxng needs it, or `SEARXNG_URL`.
        cache (`str | Path`, *optional*): The file of stored answers; by default `~/.cache/trl-search/web.sqlite3`. The
            same file gives the same results.
        rate_per_s (`float`, *optional*): Searches per second; by default the limit of the provider's smallest plan.
        pages (`bool`): Passages hold the text of the pages instead of the engine's snippets.
        page_chars (`int`): Characters of a page's text that are used.
        patience_s (`float`): Time limit of a search in seconds, including the rate limit's wait and retries. Pages
            that cannot be fetched in it, because too many are wanted, are left out.
    """
    engine = load_provider(provider, base_url)
    return WebRetriever(
        engine,
        WebStore(Path(home_expanded(cache)) if cache is not None else cache_folder() / "web.sqlite3"),
        rate_per_s=engine.rate_per_s if rate_per_s is None else rate_per_s,
        pages=pages,
        page_chars=page_chars,
        patience_s=patience_s,
    )
