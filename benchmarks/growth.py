"""How tantivy and `small` vectors scale with the corpus, up to 21 M passages: build time, disk, memory, queries/s.

    python benchmarks/growth.py --sizes 500000 1000000 2000000 5000000
    python benchmarks/growth.py --parts tantivy --sizes 20000 40000          # a smoke run

Passages have 100 words, as those of wiki-18, drawn by rank (1 / (rank + 2.7) ** 1.07, about that of English text) from
20 million, so that a larger corpus has more different words, as real text does. The most frequent words are English's
stop words; the others are made of letters, the rarer the longer. Queries are 6 words of a passage. Vectors are those
of `vector_index.py`, with 768 dimensions.

Each build and each search runs in a separate process. CPU times are given beside wall-clock times, because the latter
depend on other work of the machine: "one by one" and "in batches" (of 64) are queries per CPU second. "build GB" is
the peak resident memory of the build, including mapped files. "own GB" is anonymous memory after the searches, "mapped
GB" the pages of files that the searches read. The last line of each part extrapolates to wiki-18: rates by a power law
fitted to the measured sizes, the other figures linearly.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import string
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bm25 import K, alone, make_queries
from vector_index import QUERIES, write_vectors

from trl_search.retrieval import load_retriever
from trl_search.retrieval.bm25.analyzer import Analyzer
from trl_search.retrieval.dense.vectors import build_vectors, open_vectors
from trl_search.retrieval.index.folder import build_index

WORDS, COMMON, WORDS_A_PASSAGE = 20_000_000, 500_000, 100
RATES = {"one_by_one", "in_batches"}
TARGET = 21_015_324  # passages of wiki-18
WORK_S = 10.0  # CPU seconds per figure
COLUMNS = ("build_s", "build_cpu_s", "build_gb", "disk_gb", "own_gb", "mapped_gb", "one_by_one", "in_batches")


def word(rank: int) -> str:
    """A word of lower-case letters, longer the rarer it is."""
    letters = ""
    rank += 26
    while rank:
        rank, letter = divmod(rank, 26)
        letters += string.ascii_lowercase[letter]
    return letters


def write_corpus(file: Path, passages: int) -> None:
    generator = np.random.default_rng(0)
    weights = 1 / (np.arange(1, WORDS + 1) + 2.7) ** 1.07
    edges = np.cumsum(weights) / weights.sum()
    stops = sorted(Analyzer()._dropped)  # the most frequent words are English ones
    common = [*stops, *(word(rank) for rank in range(len(stops), COMMON))]
    with open(file, "w", encoding="utf-8") as lines:
        for start in range(0, passages, 10_000):
            count = min(10_000, passages - start)
            ranks_PW = np.searchsorted(edges, generator.random((count, WORDS_A_PASSAGE)))
            for row, ranks in enumerate(ranks_PW.tolist(), start=start):
                words = [common[rank] if rank < COMMON else word(rank) for rank in ranks]
                passage = {"id": str(row), "title": f"{words[7]} {words[77]}", "text": " ".join(words)}
                lines.write(json.dumps(passage) + "\n")


def built(build: Callable[[], object], files: Path) -> dict[str, float]:
    started, worked = time.perf_counter(), time.process_time()
    build()
    return {
        "build_s": time.perf_counter() - started,
        "build_cpu_s": time.process_time() - worked,
        "build_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "disk_gb": sum(file.stat().st_size for file in files.rglob("*") if file.is_file()) / 1e9,
    }


def resident() -> dict[str, float]:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {"own_gb": int(lines["RssAnon"].split()[0]) / 1e6, "mapped_gb": int(lines["RssFile"].split()[0]) / 1e6}


def per_cpu_second(search: Callable[[int, int], object]) -> dict[str, float]:
    """Queries per CPU second, after a warm-up."""
    search(0, 8)
    figures = {}
    for name, size in (("one_by_one", 1), ("in_batches", 64)):
        worked, asked = time.process_time(), 0
        while time.process_time() - worked < WORK_S and asked + size <= QUERIES:
            search(asked, size)
            asked += size
        figures[name] = asked / (time.process_time() - worked)
    return figures


def build_tantivy(corpus: Path, index: Path) -> dict[str, float]:
    return built(partial(build_index, corpus, index, "bm25", engine="tantivy"), index / "tantivy")


def search_tantivy(index: Path) -> dict[str, float]:
    queries = make_queries(index, QUERIES)
    search = load_retriever("bm25", index=index, check_source=False).search
    return per_cpu_second(lambda first, size: search(queries[first : first + size], K)) | resident()


def make_vectors(folder: Path, count: int) -> None:
    _, queries = write_vectors(folder / "vectors.npy", count, 0)
    np.save(folder / "queries.npy", queries)


def build_small(folder: Path) -> dict[str, float]:
    (folder / "small").mkdir()
    vectors_ND = np.load(folder / "vectors.npy", mmap_mode="r")
    return built(partial(build_vectors, folder / "small", vectors_ND, index="small"), folder / "small")


def search_small(folder: Path) -> dict[str, float]:
    search, queries_QD = open_vectors(folder / "small", device="cpu"), np.load(folder / "queries.npy")
    return per_cpu_second(lambda first, size: search.search(queries_QD[first : first + size], K)) | resident()


def of_tantivy(folder: Path, size: int) -> dict[str, float]:
    write_corpus(folder / "corpus.jsonl", size)
    index = folder / "tantivy"
    return alone(build_tantivy, folder / "corpus.jsonl", index) | alone(search_tantivy, index)


def of_small(folder: Path, size: int) -> dict[str, float]:
    alone(make_vectors, folder, size)
    return alone(build_small, folder) | alone(search_small, folder)


def extended(name: str, sizes: list[int], values: list[float]) -> float:
    """The value for wiki-18: rates by a power law through the measured values, everything else by a straight line."""
    if name in RATES:
        slope, start = np.polyfit(np.log(sizes), np.log(values), 1)
        return float(np.exp(start + slope * np.log(TARGET)))
    slope, start = np.polyfit(sizes, values, 1)
    return float(start + slope * TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500_000, 1_000_000, 2_000_000, 5_000_000])
    parser.add_argument("--parts", nargs="+", choices=("tantivy", "small"), default=["tantivy", "small"])
    parser.add_argument("--folder", type=Path, help="folder for temporary files")
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, k={K}\n", flush=True)
    for part in args.parts:
        measure: Callable[[Path, int], dict[str, Any]] = {"tantivy": of_tantivy, "small": of_small}[part]
        print(f"| {part} | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
        rows = []
        for size in args.sizes:
            with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
                rows.append(measure(Path(temporary), size))
            shutil.rmtree(temporary, ignore_errors=True)
            print(f"| {size:,} | {' | '.join(f'{rows[-1][name]:.3g}' for name in COLUMNS)} |", flush=True)
        if len(rows) > 1:
            wiki = [extended(name, args.sizes, [row[name] for row in rows]) for name in COLUMNS]
            print(f"| {TARGET:,}, extended | {' | '.join(f'{value:.3g}' for value in wiki)} |\n", flush=True)


if __name__ == "__main__":
    main()
