"""The text of pages whose extraction takes too long, fails, or ends its process, with real child processes and the
real trafilatura or a small replacement."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import Asked, Said, serving
from trl_search.common.errors import UserError
from trl_search.retrieval.web import page_text
from trl_search.retrieval.web.page import GuardedTransport, PageError, PageLimits, fetch_page

pytestmark = pytest.mark.slow

pytest.importorskip("trafilatura")

HERE = "127.0.0.2"
LISTS = b"<html><body>" + b"<ul><li>item</li></ul>" * 15_000  # trafilatura needs half a minute for it
ARTICLE = b"<html><body><article><p>" + b"The lantern festival of Orlune is held at the harvest. " * 5


def page(asked: Asked) -> Said:
    return Said(LISTS if asked.target == "/lists" else ARTICLE, headers={"Content-Type": "text/html"})


async def fetch(url: str, port: int, timeout_s: float = 10.0) -> str:
    transport = GuardedTransport(frozenset({port}), allowed=lambda address: str(address) == HERE)
    return await fetch_page(url, PageLimits(timeout_s=timeout_s), transport=transport)


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces trafilatura by other code, for child processes that start afterwards."""

    def replace(code: str) -> None:
        (tmp_path / "trafilatura.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(page_text, "_places", functools.cache(page_text._places.__wrapped__))

    return replace


def test_pages_that_take_too_long_time_out_and_delay_nothing_else() -> None:
    gaps: list[float] = []

    async def ticking() -> None:
        while True:
            started = time.monotonic()
            await asyncio.sleep(0.01)
            await asyncio.to_thread(time.monotonic)  # the loop's own threads are free, for the store and lookups
            gaps.append(time.monotonic() - started)

    async def scenario() -> list[Any]:
        ticks = asyncio.create_task(ticking())
        lists = [fetch(f"{server.url}/lists", server.port, 2.5) for _ in range(3)]
        found = await asyncio.gather(*lists, fetch(server.url, server.port), return_exceptions=True)
        ticks.cancel()
        return [*found, await fetch(server.url, server.port)]  # by a child that survived or was restarted

    with serving(page, host=HERE) as server:
        started = time.monotonic()
        *failed, meanwhile, later = asyncio.run(scenario())
        assert time.monotonic() - started < 60
    assert all(isinstance(one, PageError) and one.passing and "not read within 2.5 s" in str(one) for one in failed)
    assert meanwhile.startswith("The lantern festival") and later == meanwhile
    assert max(gaps) < 2.4


def test_a_child_process_reads_several_pages(replaced) -> None:
    replaced("import os\n\ndef extract(body, **options):\n    return f'{os.getpid()} {len(body)}'\n")
    first, second = page_text.extract(b"a" * 3_000_000, 10).split(), page_text.extract(b"", 10).split()
    assert (first[0], first[1], second[1]) == (second[0], "3000000", "0") and first[0] != str(os.getpid())


def test_a_forked_process_has_its_own_child_processes(replaced) -> None:
    replaced("import os\n\ndef extract(body, **options):\n    return str(os.getpid())\n")
    ours = page_text.extract(b"", 10)
    forked = os.fork()
    if forked == 0:
        theirs = page_text.extract(b"", 10)
        os._exit(0 if theirs not in ("", ours) else 1)
    assert os.waitpid(forked, 0)[1] == 0
    assert page_text.extract(b"", 10) == ours


def test_only_a_few_child_processes_are_started(replaced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_text, "CHILDREN", 0)
    replaced("def extract(body, **options):\n    return 'text'\n")
    with pytest.raises(TimeoutError):
        page_text.extract(b"", 0.1)


@pytest.mark.parametrize(
    ("code", "message", "passing"),
    [
        ("raise RecursionError('too deep')", "trafilatura: RecursionError: too deep", False),
        ("import os; os.kill(os.getpid(), 11)", "ended with -11", True),
    ],
)
def test_a_page_that_breaks_trafilatura_is_an_error(code: str, message: str, passing: bool, replaced) -> None:
    replaced(f"def extract(body, **options):\n    if b'list' not in body:\n        return 'fine'\n    {code}\n")

    def echo(asked: Asked) -> Said:
        return Said(asked.target.encode(), headers={"Content-Type": "text/html"})

    with serving(echo, host=HERE) as server:
        with pytest.raises(PageError, match=message) as raised:
            asyncio.run(fetch(f"{server.url}/list", server.port))
        assert raised.value.passing == passing
        assert asyncio.run(fetch(server.url, server.port)) == "fine"


def test_a_broken_trafilatura_is_a_user_error(replaced) -> None:
    replaced("raise ImportError('lxml.html.clean is another package now')")
    refused = pytest.raises(UserError, match=r"lxml.html.clean.*pip install 'trl-search")
    with serving(page, host=HERE) as server, refused:
        asyncio.run(fetch(server.url, server.port))


def test_a_process_ends_without_waiting_for_pages_and_ends_its_children(replaced, tmp_path: Path) -> None:
    replaced(
        "import os, pathlib, time\n\n"
        "def extract(body, **options):\n"
        f"    pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
    )
    code = (
        "import asyncio, pathlib, sys, time\n"
        "from trl_search.retrieval.web.page import _text\n"
        "async def give_up():\n"
        "    reading = asyncio.create_task(_text('text/html', b'', 5.0))\n"
        "    while not pathlib.Path(sys.argv[1]).exists():\n"
        "        await asyncio.sleep(0.05)\n"
        "    reading.cancel()\n"
        "    print(time.time())\n"
        "asyncio.run(give_up())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "child")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    ended = time.time()
    assert run.stderr == "" and ended - float(run.stdout) < 40
    child = int((tmp_path / "child").read_text())
    while is_running(child):
        assert time.time() - ended < 120
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
