"""Kills index builds with SIGKILL at random moments and restarts them: is the result that of an uninterrupted build?

    python benchmarks/index_kills.py                                  # 30 kills per kind of build
    python benchmarks/index_kills.py --kills 5 --kinds bm25s small

Each round starts a build in a separate process, kills it after a random share of the time of a whole build, and
repeats the call until one finishes. Then every file of the index is compared byte for byte with that of an
uninterrupted build, except for times in `manifest.json` and `vectors.json`. A build that is killed between its last
two steps leaves `build.json` and `build.lock` in the finished folder; they are not part of the index. The files of
`tantivy` and `hnsw` depend on the timing of threads, so even two uninterrupted builds differ; for them, the results of
50 queries are compared.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.retrieval import open_retriever
from trl_search.retrieval.index.build_folder import LOCK, MANIFEST, STATE
from trl_search.retrieval.index.folder import build_index

PASSAGES = 3000
ENCODER = "e5-base-v2"  # a tiny model with random weights; its name tells how to use it
TIMES = {"build_s", "mtime_ns", "dense/vectors.json"}  # the last one is a size, which depends on the digits of build_s
BY_ANSWERS = {"tantivy", "hnsw"}
DENSE = ("flat", "fp16", "int8", "small", "small-ivf", "hnsw")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{engine: ("bm25", {"engine": engine}) for engine in ("bm25s", "tantivy")},
    **{word: ("dense", {"index_type": word, "max_length": 32}) for word in DENSE},
}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "sentence_transformers", "bm25s", "trl_search.retrieval.dense.retriever"])


def build(corpus: Path, output: Path, kind: str, options: dict[str, Any]) -> None:
    build_index(corpus, output, kind, **options)


def start(*arguments: Any) -> Any:
    process = CONTEXT.Process(target=build, args=arguments)
    process.start()
    return process


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in TIMES}
    return value


def content(index: Path, name: str) -> dict[str, Any]:
    """The content that two builds must have in common."""
    if name in BY_ANSWERS:
        retriever = open_retriever(index, {"check_source": False})
        found = retriever.search([f"word{number} word{number % 7}" for number in range(50)], 5)
        retriever.close()
        return {"answers": [[(one.id, round(one.score, 4)) for one in passages] for passages in found]}
    files = {str(file.relative_to(index)): file for file in index.rglob("*") if file.is_file()}
    for name in (STATE, LOCK):
        files.pop(name, None)
    return {
        name: without_times(json.loads(file.read_bytes())) if file.suffix == ".json" else file.read_bytes()
        for name, file in files.items()
    }


def rounds(name: str, corpus: Path, folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    kind, options = KINDS[name]
    if kind == "dense":
        options = {**options, "encoder": str(folder / ENCODER)}
    whole = folder / f"{name}-whole"
    for _ in range(2):  # the first kill also waits for imports
        shutil.rmtree(whole, ignore_errors=True)
        started = time.monotonic()
        start(corpus, whole, kind, options).join()
        took_s = time.monotonic() - started
    expected = content(whole, name)
    count = {"killed": 0, "ended first": 0, "equal": 0}
    output = folder / f"{name}-killed"
    while count["killed"] < kills:
        process = start(corpus, output, kind, options)
        process.join(draw.uniform(0, took_s))
        if process.is_alive():
            process.kill()
            process.join()
            count["killed"] += 1
        while not (output / MANIFEST).is_file():
            again = start(corpus, output, kind, options)
            again.join()
            if again.exitcode:
                raise SystemExit(f"{name}: the same build fails after a kill, in {folder}")
        count["ended first"] += process.exitcode == 0
        found = content(output, name)
        if differing := sorted(file for file in {*found, *expected} if found.get(file) != expected.get(file)):
            raise SystemExit(f"{output} differs from {whole}, which nobody killed, in {', '.join(differing)}")
        count["equal"] += 1
        left = [path.name for path in folder.glob(f".{name}-killed*")]
        assert not left, f"left behind: {left}"
        shutil.rmtree(output)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills per kind of build (default: 30)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())  # kept if a build failed
    importlib.import_module("tests.support.encoders").save_random_bert(folder / ENCODER)
    words = np.random.default_rng(0).integers(0, 5000, (PASSAGES, 20))
    rows = ({"id": str(row), "text": " ".join(map("word{}".format, one))} for row, one in enumerate(words))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in args.kinds:
        count = rounds(name, folder / "corpus.jsonl", folder, args.kills, random.Random(args.seed))
        print(f"{name:<10} {', '.join(f'{what} {number}' for what, number in count.items())}", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
