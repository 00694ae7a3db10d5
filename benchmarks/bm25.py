"""BM25 by engine: queries per second, latency, build, memory and disk, on a corpus of Zipf words.

    python benchmarks/bm25.py                                                     # 200,000 passages
    python benchmarks/bm25.py --passages 1000000 --engines tantivy --folder /data/bm25

A passage is 100 words drawn from 500,000 by rank (1 / (rank + 2.7) ** 1.07, about that of English text); a query is 6
words of one passage, so that it has rare and common ones. Every build and every search runs in a separate process. The
build is `build_index`, which also reads, checks and copies the corpus; its memory is the peak of the process, and its
disk space that of the engine's files. "open" is `load_retriever` from a warm disk, with numba's compilation. The
baseline "bm25s's own search" is the library's compiled search over the same scores, in memory, without passages.

With `--folder`, the corpus and the indexes are kept there and reused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from retrieval_servers import bm25s_as_it_comes

from trl_search.retrieval import load_retriever
from trl_search.retrieval.corpus.passages import Corpus
from trl_search.retrieval.index.folder import MANIFEST, build_index

WORDS, WORDS_A_PASSAGE, WORDS_A_QUERY = 500_000, 100, 6
ENGINES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "bm25s's own search": ("bm25s", None),
    "bm25s numpy": ("bm25s", {"backend": "numpy"}),
    "bm25s numba": ("bm25s", {"backend": "numba"}),
    "tantivy": ("tantivy", {}),
    "tantivy 1 thread": ("tantivy", {"threads": 1}),
}
K = 3
BATCH = 512
SECONDS_A_FIGURE = 20.0


def write_corpus(file: Path, passages: int) -> None:
    generator = np.random.default_rng(0)
    weights = 1 / (np.arange(1, WORDS + 1) + 2.7) ** 1.07
    edges = np.cumsum(weights) / weights.sum()
    building = file.with_suffix(".part")
    with open(building, "w", encoding="utf-8") as lines:
        for start in range(0, passages, 10_000):
            count = min(10_000, passages - start)
            ranks_PW = np.searchsorted(edges, generator.random((count, WORDS_A_PASSAGE)))
            for row, ranks in enumerate(ranks_PW, start=start):
                text = " ".join(map("w{}".format, ranks))
                lines.write(json.dumps({"id": str(row), "title": f"t{row}", "text": text}) + "\n")
    building.rename(file)


def make_queries(index: Path, count: int) -> list[str]:
    generator = np.random.default_rng(1)
    corpus = Corpus(index)
    texts = [corpus[int(row)].text.split() for row in generator.integers(0, len(corpus), count)]
    corpus.close()
    return [" ".join(generator.choice(words, WORDS_A_QUERY)) for words in texts]


def build(corpus: Path, index: Path, engine: str) -> dict[str, float]:
    started = time.perf_counter()
    build_index(corpus, index, "bm25", engine=engine)
    return {
        "build_s": time.perf_counter() - started,
        "build_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def measure(index: Path, options: dict[str, Any] | None, queries: list[str]) -> dict[str, float]:
    started = time.perf_counter()
    search = (
        bm25s_as_it_comes(index)
        if options is None
        else load_retriever("bm25", index=index, check_source=False, **options).search
    )
    open_s = time.perf_counter() - started
    search(queries[:20], K)
    singles_s: list[float] = []
    for query in queries:
        begun = time.perf_counter()
        search([query], K)
        singles_s.append(time.perf_counter() - begun)
        if sum(singles_s) > SECONDS_A_FIGURE:
            break
    batches_s: list[float] = []
    for start in range(0, len(queries), BATCH):
        begun = time.perf_counter()
        search(queries[start : start + BATCH], K)
        batches_s.append(time.perf_counter() - begun)
        if sum(batches_s) > SECONDS_A_FIGURE:
            break
    return {
        "open_s": open_s,
        "single_qps": len(singles_s) / sum(singles_s),
        "single_p50_ms": 1e3 * statistics.median(singles_s),
        "batch_qps": BATCH / statistics.median(batches_s),
    }


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Runs a function in a new process, so that only its memory is measured."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} died") from None
    finally:
        process.join()


def _send(send: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    send.send(function(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=200_000)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--folder", type=Path, help="folder to keep corpus and indexes in (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(args.passages, args.engines, args.folder or Path(temporary))


def run(passages: int, names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / f"zipf-{passages}.jsonl"
    if not corpus.exists():
        write_corpus(corpus, passages)
    print(f"{passages:,} passages of {WORDS_A_PASSAGE} Zipf words, {os.cpu_count()} CPUs, k={K}\n")
    print("| engine | q/s, batch 1 | p50 ms | q/s, batch 512 | open s | build s | build GB | disk MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    built: dict[str, dict[str, float]] = {}
    for name in names:
        engine, options = ENGINES[name]
        index = folder / f"{engine}-{passages}"
        if engine not in built:
            built[engine] = {} if (index / MANIFEST).exists() else alone(build, corpus, index, engine)
        found = alone(measure, index, options, make_queries(index, 4 * BATCH)) | built[engine]
        own = index / {"bm25s": "bm25", "tantivy": "tantivy"}[engine]
        disk_mb = sum(file.stat().st_size for file in own.iterdir()) / 1e6
        print(
            f"| {name} | {found['single_qps']:,.0f} | {found['single_p50_ms']:.2f} | {found['batch_qps']:,.0f} | "
            f"{found['open_s']:.2f} | {_shown(found.get('build_s'))} | {_shown(found.get('build_gb'))} | "
            f"{disk_mb:,.0f} |",
            flush=True,
        )


def _shown(figure: float | None) -> str:
    return "kept" if figure is None else f"{figure:.3g}"


if __name__ == "__main__":
    main()
