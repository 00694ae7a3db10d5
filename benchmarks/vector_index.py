"""Every --index_type on the same vectors: memory, disk, build time, recall@3 against exact search, queries per second.

    python benchmarks/vector_index.py                                   # 200,000 x 768
    python benchmarks/vector_index.py --count 1000000 --words flat small small-ivf int8 fp16

The vectors are synthetic (`--seed`): a mixture of one cluster for every 200 of them, 256 latent dimensions whose
spread falls like 1/sqrt(i), within clusters 3/4 of that between them, turned into 768 dimensions with a little
isotropic noise and scaled to length 1. Queries are other draws from the mixture, a quarter further out, so none is a
vector of the index. An index is calibrated as users get it: on 256 queries made from the vectors, which is "recall@3,
at build"; "recall@3" is that of 256 queries of the mixture, against exact fp32 search.

Each index is built and searched in a fresh process. "RAM" is the growth of anonymous memory from before the index was
opened to after all searches, which the search needs. "mapped" is the growth of file pages, which the kernel may
reclaim. "first 64" are 64 queries after the file was dropped from the page cache; the others are the best of three.
`flat` is the baseline: common servers read fp32 vectors into memory, so its mapped pages are their RAM.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.retrieval.dense.vectors import VECTOR_INDEXES, build_vectors, open_vectors, plan
from trl_search.retrieval.dense.vectors.calibrate import K, find_truth
from trl_search.retrieval.dense.vectors.plans import SLICE_ROWS

DIM = 768
LATENT = 256
QUERIES = 512


@dataclass(frozen=True)
class Row:
    word: str
    about: dict[str, Any]
    build_rss: int
    disk: int
    open_s: float
    anonymous: int
    mapped: int
    first_s: float
    per_second: dict[int, float]
    rows: np.ndarray


def write_vectors(path: Path, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of the mixture, mapped from a file, and queries from it."""
    random = np.random.default_rng(seed)
    spread = 1 / np.sqrt(np.arange(1, LATENT + 1, dtype=np.float32))
    turn = np.linalg.qr(random.standard_normal((DIM, LATENT)))[0].T.astype(np.float32)
    centres = random.standard_normal((max(1, count // 200), LATENT), dtype=np.float32) * spread

    def draw(size: int, within: float) -> np.ndarray:
        latent = centres[random.integers(len(centres), size=size)]
        latent = latent + within * spread * random.standard_normal((size, LATENT), dtype=np.float32)
        drawn = latent @ turn + 0.02 * random.standard_normal((size, DIM), dtype=np.float32)
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))

    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, DIM))
    for start in range(0, count, SLICE_ROWS):
        vectors[start : start + SLICE_ROWS] = draw(len(vectors[start : start + SLICE_ROWS]), 0.75)
    vectors.flush()
    return np.load(path, mmap_mode="r"), draw(QUERIES, 0.94)


def rss() -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of this process; a page mapped twice counts once."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(told["Pss_Anon"].split()[0]) * 1024, int(told["Pss_File"].split()[0]) * 1024


def build(word: str, folder: Path, vectors: Path) -> tuple[dict[str, Any], int]:
    about = build_vectors(folder, np.load(vectors, mmap_mode="r"), index=word)
    # There is no peak value for anonymous memory alone, so this includes the mapped vectors.
    return about, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def search(word: str, folder: Path, queries: np.ndarray, about: dict[str, Any], build_rss: int) -> Row:
    file = folder / "vectors.index"
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # Imports and thread pools are not part of an index.
    import faiss  # noqa: F401
    import torch

    torch.ones(512, 512) @ torch.ones(512, 512)
    anonymous, mapped = rss()
    started = time.perf_counter()
    index = open_vectors(folder, device="cpu")
    open_s = time.perf_counter() - started
    started = time.perf_counter()
    index.search(queries[:64], K)
    first_s = time.perf_counter() - started
    per_second: dict[int, float] = {}
    for batch in (1, 64, 512):
        calls = {1: 16, 64: 2, 512: 1}[batch]
        times = []
        for _ in range(3):
            started = time.perf_counter()
            for call in range(calls):
                index.search(queries[call * batch : call * batch + batch], K)
            times.append(time.perf_counter() - started)
        per_second[batch] = calls * batch / min(times)
    rows = index.search(queries, K)[1]
    now = rss()
    return Row(
        word,
        about,
        build_rss,
        file.stat().st_size,
        open_s,
        now[0] - anonymous,
        now[1] - mapped,
        first_s,
        per_second,
        rows,
    )


def fresh(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def line(row: Row, recall: float, count: int) -> str:
    setting = ", ".join(
        f"{name} {row.about[name]}" for name in ("nprobe", "k_factor", "efSearch") if name in row.about
    )
    planned = plan(row.word, count, DIM)
    speeds = " / ".join(f"{row.per_second[batch]:.0f}" for batch in (1, 64, 512))
    return (
        f"| {row.word} | {row.about['factory']} {setting} | {row.anonymous / 1e6:.0f} ({planned.ram_bytes / 1e6:.0f}) "
        f"| {row.mapped / 1e6:.0f} | {row.disk / 1e6:.0f} | {row.about['build_s']:.0f} ({planned.build_s:.0f}) | "
        f"{row.build_rss / 1e9:.1f} | {row.open_s:.3f} | {recall:.3f} | {row.about['recall_at_3']:.3f} | {speeds} | "
        f"{64 / row.first_s:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help="number of vectors (default: 200,000)")
    parser.add_argument("--words", nargs="+", default=list(VECTOR_INDEXES), choices=VECTOR_INDEXES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder for files, on a large disk (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        path = Path(temporary) / "vectors.npy"
        vectors, queries = write_vectors(path, arguments.count, arguments.seed)
        truth = find_truth(vectors, queries[:256])
        print(f"{arguments.count:,} x {DIM} fp32: {vectors.nbytes / 1e6:.0f} MB; {os.cpu_count()} cores\n")
        print(
            "| word | FAISS, setting | RAM MB (planned) | mapped MB | disk MB | build s (planned) "
            "| build peak RSS GB, "
            "vectors' pages included | open s | recall@3 | recall@3, at build | q/s at batch 1 / 64 / 512 | "
            "q/s, first 64 |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for word in arguments.words:
            folder = Path(temporary) / word
            folder.mkdir()
            about, build_rss = fresh(build, word, folder, path)
            row = fresh(search, word, folder, queries, about, build_rss)
            recall = truth.recall(vectors, row.rows[: len(truth.queries)])
            print(line(row, recall, arguments.count), flush=True)
            (folder / "vectors.index").unlink()


if __name__ == "__main__":
    main()
