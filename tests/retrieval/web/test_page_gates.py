"""The limits on the pages that are fetched at a time. tests/retrieval/web/test_retriever.py has searches with them."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from trl_search.retrieval.web import page_gates
from trl_search.retrieval.web.page_gates import PageGates


def test_no_event_loop_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rollout has its own, and a semaphore on which a page waited refers to it."""
    monkeypatch.setattr(page_gates, "PAGES_AT_ONCE", 1)
    gates = PageGates()

    async def fetch(url: str) -> None:
        async with gates.enter(url, 60.0):
            await asyncio.sleep(0)

    async def fetch_two() -> weakref.ref[asyncio.AbstractEventLoop]:
        await asyncio.gather(fetch("http://wiki.example"), fetch("http://news.example"))
        return weakref.ref(asyncio.get_running_loop())

    loops = [asyncio.run(fetch_two()) for _ in range(2)]
    gc.collect()
    assert [loop() for loop in loops] == [None, None]
