"""`build_vectors` writes `vectors.index` (a FAISS file) and `vectors.json` (its type, settings and recall).

Rows are streamed: FAISS stores the rows of its flat and scalar-quantised indexes in one array at the end of the file.
So the file is the head of an empty index, with the length filled in, and then the codes slice by slice; FAISS reads it
like any other. `flat`, `fp16` and `int8` need constant memory to build, `small` and `small-ivf` the memory of their
bits. (`hnsw` is built in memory, where it is also searched.)

The same vectors, seed and machine give the same bytes, except for `hnsw`, whose graph depends on thread timing.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.dense.vectors.calibrate import calibrate, find_truth, make_queries, slices
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.plans import TRAINING_ROWS, factory_of, list_count, plan
from trl_search.retrieval.dense.vectors.search import (
    FaissSearch,
    available_ram_bytes,
    gb,
    read_faiss,
)

VECTORS, ABOUT = "vectors.index", "vectors.json"
_TRAINED_ON = 64  # vectors per list of an IVF
_CENTRE = np.float32(0.99)
_LENGTH = struct.Struct("<Q")
_K_FACTOR = struct.Struct("<f")


def build_vectors(
    folder: Path,
    vectors_ND: np.ndarray,
    *,
    index: str,
    seed: int = 0,
    target_recall: float = 0.97,
) -> dict[str, Any]:
    """Builds `folder/vectors.index` (its type is one of `VECTOR_INDEXES`), tunes its settings to reach the target
    recall@3 against exact search, and measures it. Returns the content of `vectors.json`. The rows are read in slices,
    so they may be a memory map."""
    _check(vectors_ND, index)
    started = time.perf_counter()
    path = folder / VECTORS
    factory = factory_of(index, len(vectors_ND))
    made = faiss_module().index_factory(vectors_ND.shape[1], factory, faiss_module().METRIC_INNER_PRODUCT)
    _train(made, vectors_ND, index, seed)
    _WRITERS.get(index, _write_rows)(path, made, vectors_ND)
    del made

    truth = find_truth(vectors_ND, make_queries(vectors_ND, seed))
    opened = read_faiss(path)
    settings, recall = calibrate(index, FaissSearch(opened), opened, vectors_ND, truth, target_recall)
    about = {
        "word": index,
        "factory": factory,
        "dim": int(vectors_ND.shape[1]),
        "count": len(vectors_ND),
        **settings,
        "recall_at_3": round(recall, 4),
        "seed": seed,
        "build_s": round(time.perf_counter() - started, 1),
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


def _check(vectors_ND: np.ndarray, word: str) -> None:
    if vectors_ND.ndim != 2 or vectors_ND.dtype not in (np.float32, np.float16) or not vectors_ND.size:
        raise UserError(
            f"vectors must be (N, d) of float32 or float16 and not empty; got {vectors_ND.shape} of {vectors_ND.dtype}"
        )
    needed, there = plan(word, *vectors_ND.shape).build_ram_bytes, available_ram_bytes()
    if needed > there:
        raise UserError(
            f"building {word!r} over {len(vectors_ND):,} x {vectors_ND.shape[1]} needs {gb(needed)} of memory and "
            f"{gb(there)} are free; 'fp16', 'int8' and 'small' need the least"
        )


def _train(made: Any, vectors_ND: np.ndarray, word: str, seed: int) -> None:
    if made.is_trained:
        return
    wanted = _TRAINED_ON * list_count(len(vectors_ND)) if word == "small-ivf" else TRAINING_ROWS
    chosen = np.arange(len(vectors_ND))
    if wanted < len(vectors_ND):
        chosen = np.sort(np.random.default_rng(seed).choice(len(vectors_ND), size=wanted, replace=False))
    sample = np.concatenate(list(slices(vectors_ND[chosen])))
    if word == "small":
        # RaBitQ encodes the direction from the centre, so it never finds a vector that equals the centre, as all
        # vectors would if they were identical.
        made.base_index.train(sample * _CENTRE)
        made.refine_index.train(sample)
        made.is_trained = True
        return
    if word == "small-ivf":
        faiss_module().extract_index_ivf(made.base_index).cp.seed = seed + 1
    made.train(sample)


def _write_rows(path: Path, made: Any, vectors_ND: np.ndarray) -> None:
    """flat, fp16, int8: the whole file is streamed."""
    faiss = faiss_module()
    # FAISS counts the rows of a flat index in floats, and those of all others in bytes.
    unit = 4 if isinstance(made, faiss.IndexFlat) else 1
    made.ntotal = len(vectors_ND)
    with open(path, "wb") as file:
        file.write(faiss.serialize_index(made).tobytes()[: -_LENGTH.size])
        made.ntotal = 0
        _append_codes(file, made, vectors_ND, unit)


def _write_refined(path: Path, made: Any, vectors_ND: np.ndarray) -> None:
    """small, small-ivf: the bits are built in memory; the rows that refine them are streamed."""
    faiss = faiss_module()
    base, refine = made.base_index, faiss.downcast_index(made.refine_index)
    for slice_ND in tqdm(slices(vectors_ND), desc="codes", disable=None):
        base.add(slice_ND)
    made.ntotal = refine.ntotal = len(vectors_ND)
    faiss.write_index(made, str(path))
    made.ntotal = refine.ntotal = 0
    with open(path, "r+b") as file:
        # The end of the file: the length of the rows, still 0, and k_factor, the last field of a refined index.
        file.seek(-_LENGTH.size - _K_FACTOR.size, os.SEEK_END)
        end = file.read()
        file.seek(-len(end), os.SEEK_END)
        file.truncate()
        _append_codes(file, refine, vectors_ND, 1)
        file.write(end[_LENGTH.size :])


def _write_graph(path: Path, made: Any, vectors_ND: np.ndarray) -> None:
    for slice_ND in tqdm(slices(vectors_ND), desc="graph", disable=None):
        made.add(slice_ND)
    faiss_module().write_index(made, str(path))


_WRITERS: dict[str, Callable[[Path, Any, np.ndarray], None]] = {
    "small": _write_refined,
    "small-ivf": _write_refined,
    "hnsw": _write_graph,
}


def _append_codes(file: Any, made: Any, vectors_ND: np.ndarray, unit: int) -> None:
    """Writes the length of all codes, then the codes."""
    file.write(_LENGTH.pack(len(vectors_ND) * made.sa_code_size() // unit))
    total = -(-len(vectors_ND) // 65_536)
    for slice_ND in tqdm(slices(vectors_ND), desc="rows", total=total, disable=None):
        codes = made.sa_encode(slice_ND)
        if not np.isfinite(made.sa_decode(codes)).all():
            raise UserError(
                f"vectors hold numbers beyond what {made.__class__.__name__} stores; normalise them, or use 'flat'"
            )
        file.write(codes.tobytes())
