"""Throughput of a retrieval server with 64 clients that send one query each, against a server in Search-R1's style.

    python benchmarks/retrieval.py                           # BM25 and dense, 200,000 passages, 3 rounds
    python benchmarks/retrieval.py --backends bm25 --rounds 1 --seconds 5

The clients (`benchmarks/retrieval_load.py`) and the server (`retrieval_servers.py`) are two processes on the same
cores. Each client sends its next query when it has the response. No query is sent twice, so the cache does not help.
The servers run alternately; each figure is the median of the rounds.

- bm25: Zipf-distributed words, 100 per passage; queries are six words of a passage without the hundred most common
  words, which stand for stop words; bm25s compiled by numba.
- dense: the real all-MiniLM-L6-v2 encodes the queries, then an exact search over random unit vectors of its width,
  which takes as long as over real ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

from trl_search.retrieval.dense.vectors import build_vectors
from trl_search.retrieval.index.folder import MANIFEST, build_index
from trl_search.types import Passage

HERE = Path(__file__).parent
WORDS, STOP_WORDS, WORDS_A_PASSAGE, WORDS_A_QUERY, DIM = 50_000, 100, 100, 6, 384
QUERIES = 60_000
TARGET = 5.0

Figures = dict[str, float]


def prepare(folder: Path, passages: int) -> None:
    """Makes corpus, index, vectors and queries, unless an earlier run has."""
    if (folder / "queries.txt").exists():
        return
    draw = np.random.default_rng(0)
    shares = 1 / np.arange(1, WORDS + 1)
    names = np.array([f"w{number}" for number in range(WORDS)])
    ranks_PW = draw.choice(WORDS, size=(passages, WORDS_A_PASSAGE), p=shares / shares.sum())
    if not (folder / "bm25" / MANIFEST).exists():
        texts = (names[ranks] for ranks in ranks_PW)
        rows = (Passage(f"p{row}", " ".join(words[:3]), " ".join(words)) for row, words in enumerate(texts))
        build_index(rows, folder / "bm25", "bm25")
    vectors_PD = draw.standard_normal((passages, DIM), dtype=np.float32)
    vectors_PD /= np.linalg.norm(vectors_PD, axis=1, keepdims=True)
    np.save(folder / "vectors.npy", vectors_PD)
    (folder / "dense").mkdir(exist_ok=True)
    build_vectors(folder / "dense", vectors_PD, index="flat")
    lines = dict.fromkeys(
        " ".join(names[draw.choice(ranks[ranks >= STOP_WORDS], WORDS_A_QUERY)])
        for ranks in ranks_PW[draw.integers(passages, size=QUERIES)]
    )
    (folder / "queries.txt").write_text("\n".join(lines), "utf-8")


@contextlib.contextmanager
def running(style: str, backend: str, folder: Path, *more: str) -> Iterator[tuple[str, int]]:
    """A server that is ready: its URL and its process id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(HERE / "retrieval_servers.py"),
        style,
        backend,
        str(folder),
        "--port",
        str(port),
        *more,
    ]
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}", server.pid
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5):
            return
        time.sleep(0.2)
    raise SystemExit("the server did not get ready within two minutes")


def measure(url: str, queries: Path, seconds: float, *more: str) -> Figures:
    command = [sys.executable, str(HERE / "retrieval_load.py"), url, str(queries), "--seconds", str(seconds), *more]
    figures: Figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return figures


def cpu_s(pid: int) -> float:
    """CPU time of a process, which on a busy machine is more meaningful than wall-clock time."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def median(rounds: list[Figures], name: str) -> float:
    return statistics.median(figures[name] for figures in rounds)


def table(results: dict[tuple[str, str], list[Figures]]) -> str:
    lines = [
        "| backend | server | queries/s (min–max) | × field | p50 ms | p99 ms | CPU ms per query | errors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (backend, style), rounds in results.items():
        rates = [figures["qps"] for figures in rounds]
        ratio = statistics.median(rates) / median(results[backend, "field"], "qps")
        lines.append(
            f"| {backend} | {style} | {statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f}) "
            f"| {ratio:.1f} | {median(rounds, 'p50_ms'):.0f} | {median(rounds, 'p99_ms'):.0f} "
            f"| {median(rounds, 'cpu_ms'):.2f} | {sum(figures['errors'] for figures in rounds):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=["bm25", "dense"], default=["bm25", "dense"])
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="folder to keep corpus and index in (default: a new one)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, args.passages)
        queries = folder / "queries.txt"
        results: dict[tuple[str, str], list[Figures]] = {}
        client: list[Figures] = []
        for backend in args.backends:
            for _ in range(args.rounds):
                for style in ("field", "ours"):
                    with running(style, backend, folder) as (url, pid):
                        measure(url, queries, 2.0)  # warm-up: compilation and allocation
                        before = cpu_s(pid)
                        figures = measure(url, queries, args.seconds, "--first", str(QUERIES // 4))
                        figures["cpu_ms"] = 1000 * (cpu_s(pid) - before) / figures["answers"]
                        print(f"{backend}, {style}: {figures}", file=sys.stderr)
                        results.setdefault((backend, style), []).append(figures)
                        if style == "ours" and not client:
                            client.append(measure(url, queries, 2, "--method", "GET", "--path", "/health"))
    print(table(results))
    packages = ("bm25s", "numba", "sentence-transformers", "faiss-cpu", "fastapi", "uvicorn")
    print(
        f"\n{args.passages:,} passages, 64 clients, {args.rounds} rounds of {args.seconds:g} s, {os.cpu_count()} CPU "
        f"cores; the clients alone reach {client[0]['qps']:.0f} requests/s against /health. "
        + ", ".join(f"{name} {version(name)}" for name in packages)
    )
    for backend in args.backends:
        field, ours = results[backend, "field"], results[backend, "ours"]
        ratio = median(ours, "qps") / median(field, "qps")
        slower = median(ours, "p99_ms") >= median(field, "p99_ms")
        print(f"{backend}: {ratio:.1f} × (target {TARGET:g}), p99 {'not ' if slower else ''}lower (target: lower)")


if __name__ == "__main__":
    main()
