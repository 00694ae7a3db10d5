"""Clients of a retrieval server, each with its own connection, that send one query after the other.

    python benchmarks/retrieval_load.py http://127.0.0.1:8000 queries.txt --clients 64 --seconds 10

It writes HTTP by hand on asyncio's streams, because httpx spends more time on a request than the measured servers.
`--method GET --path /health` measures the limit of the clients themselves. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np


class Connection:
    """One keep-alive connection of one client."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of one request."""
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(self.host, self.port)
        assert self._reader is not None
        self._writer.write(
            b"%s %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (method.encode(), path.encode(), self.host.encode(), len(body), body)
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        answer = await self._reader.readexactly(length)
        if b"connection: close" in head:
            self.close()
        return int(head.split(b" ", 2)[1]), answer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


async def load(
    url: str, queries: list[str], *, clients: int, seconds: float, method: str, path: str
) -> dict[str, float]:
    """Sends queries as fast as the server answers; no query twice, which would measure a cache."""
    place = urlsplit(url)
    asked = iter(queries)
    times: list[float] = []
    errors = 0
    begin = time.perf_counter()
    end = begin + seconds

    async def client() -> None:
        nonlocal errors
        connection = Connection(str(place.hostname), int(place.port or 80))
        while (started := time.perf_counter()) < end:
            query = next(asked, None)
            if query is None:
                raise SystemExit("not enough queries for this server; give more, or less time")
            body = json.dumps({"queries": [query], "topk": 3, "return_scores": True}).encode()
            status, answer = await connection.ask(method, path, body if method == "POST" else b"")
            times.append(time.perf_counter() - started)
            right = method == "GET" or (status == 200 and len(json.loads(answer)["result"][0]) == 3)
            errors += status != 200 or not right
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    # The last responses arrive after the end, so the time until then counts.
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    took = time.perf_counter() - begin
    return {
        "qps": len(times) / took,
        "answers": len(times),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("queries", type=Path, help="file with one query per line")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--first", type=int, default=0, help="index of the first query")
    parser.add_argument("--method", default="POST")
    parser.add_argument("--path", default="/retrieve")
    args = parser.parse_args()
    queries = args.queries.read_text("utf-8").splitlines()[args.first :]
    options = {name: getattr(args, name) for name in ("clients", "seconds", "method", "path")}
    print(json.dumps(asyncio.run(load(args.url, queries, **options))))


if __name__ == "__main__":
    main()
