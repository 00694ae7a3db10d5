"""Stress test of a retrieval server with well-behaved and misbehaving clients, for ten minutes: does it fail or leak?

    python benchmarks/soak.py                               # bm25, 200,000 passages
    python benchmarks/soak.py --minutes 3 --passages 20000

Forty clients in one process repeat one of these actions, with a random pause of up to 20 ms:

- send 1, 3, 20 or 500 queries, with and without scores; a third of the queries were sent before;
- disconnect while the request is searched, or in the middle of sending it;
- send bad JSON, wrong fields, bytes that are not text, half of a surrogate pair;
- send one query of 1 MB, or a body of 20 MB;
- read `/metrics`, `/ready`.

Every response must have the right status, and for a valid request as many results as queries. Any other response is an
error, and there must be none. Memory is the server's resident set, sampled each second. Growth is measured after the
first third, in which the cache, kept small (32 MB), and the allocators fill.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from retrieval import prepare, running
from retrieval_load import Connection

CLIENTS = 40
PAUSE_S = 0.02
BAD = [
    (b"", 400),
    (b"{", 400),
    (b'{"queries": ["\xff\xfe"]}', 400),
    (b"[" * 50_000, 400),
    (b"[1, 2]", 422),
    (b'{"topk": 3}', 422),
    (b'{"queries": []}', 200),
    (b'{"queries": "text"}', 422),
    (b'{"queries": ["a", null]}', 422),
    (b'{"query": "\\ud83c"}', 422),
    (b'{"query": "a", "topk": 0}', 422),
    (b'{"query": "a", "topk": 1000000}', 422),
    (b'{"query": "' + b"x" * 100_000 + b'"}', 413),
    (b'{"query": "' + b"x" * 1_000_000 + b'"}', 413),
    (b'{"query": "' + b"x" * 20_000_000 + b'"}', 413),
]


class Soak:
    """The actions of a client, and counters."""

    def __init__(self, url: str, queries: list[str], end: float) -> None:
        place = urlsplit(url)
        self.host, self.port = str(place.hostname), int(place.port or 80)
        self.queries, self.end = queries, end
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []

    async def client(self, seed: int) -> None:
        draw = random.Random(seed)
        connection = Connection(self.host, self.port)
        acts = [self.ask, self.send_badly, self.vanish, self.look]
        while time.monotonic() < self.end:
            act = draw.choices(acts, weights=[70, 14, 10, 6])[0]
            try:
                await act(connection, draw)
                self.done[act.__name__] += 1
            except Exception as error:  # any exception means that the server did not answer correctly
                self.errors.append(f"{act.__name__}: {type(error).__name__}: {error}")
                connection.close()
            await asyncio.sleep(draw.random() * PAUSE_S)
        connection.close()

    async def ask(self, connection: Connection, draw: random.Random) -> None:
        count = draw.choices([1, 3, 20, 500], weights=[70, 20, 9, 1])[0]
        known = self.queries[:500] if draw.random() < 0.33 else self.queries
        request = {"queries": draw.choices(known, k=count), "topk": draw.choice([1, 3, 10])}
        body = json.dumps({**request, "return_scores": draw.random() < 0.8}).encode()
        status, answer = await connection.ask("POST", "/retrieve", body)
        if status != 200 or len(json.loads(answer)["result"]) != count:
            raise ValueError(f"{count} queries got {status}: {answer[:200]!r}")

    async def send_badly(self, connection: Connection, draw: random.Random) -> None:
        body, deserved = draw.choice(BAD)
        status, answer = await connection.ask("POST", "/retrieve", body)
        if status != deserved or (status != 200) != ("error" in json.loads(answer)):
            raise ValueError(f"{body[:40]!r} got {status}, not {deserved}: {answer[:200]!r}")

    async def vanish(self, connection: Connection, draw: random.Random) -> None:
        _, writer = await asyncio.open_connection(self.host, self.port)
        body = json.dumps({"queries": draw.choices(self.queries, k=20)}).encode()
        request = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        writer.write(request if draw.random() < 0.5 else request[: draw.randrange(len(request))])
        await writer.drain()
        writer.transport.abort()  # the connection is reset, not closed

    async def look(self, connection: Connection, draw: random.Random) -> None:
        path = draw.choice(["/metrics", "/ready", "/health"])
        status, _ = await connection.ask("GET", path, b"")
        if status != 200:
            raise ValueError(f"{path} got {status}")


async def watch(process: psutil.Process, end: float) -> list[float]:
    """The resident set in MB, each second."""
    sizes = []
    while time.monotonic() < end:
        sizes.append(process.memory_info().rss / 1e6)
        await asyncio.sleep(1)
    return sizes


async def soak(url: str, pid: int, queries: list[str], seconds: float) -> bool:
    end = time.monotonic() + seconds
    state = Soak(url, queries, end)
    process = psutil.Process(pid)
    watching = asyncio.create_task(watch(process, end))
    await asyncio.gather(*(state.client(seed) for seed in range(CLIENTS)))
    sizes = await watching
    thirds = np.array_split(sizes, 12)
    growth = float(np.median(thirds[-1]) - np.median(thirds[4]))
    done = ", ".join(f"{name} {count:,}" for name, count in sorted(state.done.items()))
    print(f"{seconds / 60:g} minutes, {CLIENTS} clients: {done}")
    for error, times in Counter(state.errors).most_common(10):
        print(f"  {times} x {error}")
    print(f"errors: {len(state.errors)}; still alive: {process.is_running()}")
    print(
        "resident MB at each twelfth: "
        + " ".join(f"{np.median(part):.0f}" for part in thirds)
        + f"; growth after the first third: {growth:+.0f} MB; open files: {process.num_fds()}"
    )
    return not state.errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help="folder of benchmarks/retrieval.py (created if needed)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, args.passages)
        queries = (folder / "queries.txt").read_text("utf-8").splitlines()
        url, pid = stack.enter_context(running("ours", "bm25", folder, "--cache_mb", "32"))
        fine = asyncio.run(soak(url, pid, queries, 60 * args.minutes))
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
