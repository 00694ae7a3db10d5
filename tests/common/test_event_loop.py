"""An event loop on its own thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trl_search.common.event_loop import BackgroundLoop


async def said(word: str) -> str:
    await asyncio.sleep(0)
    return word


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited", "ignore:unclosed event loop")
def test_if_its_thread_cannot_be_started_the_next_call_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    loop = BackgroundLoop("test")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start new thread"):
        patch.setattr(threading.Thread, "start", full)
        loop.run(said("first"))
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(loop.run(said("second"))), daemon=True)
    asking.start()
    asking.join(timeout=60)  # it used to wait forever, because the loop did not run
    assert found == ["second"]
    loop.close()
