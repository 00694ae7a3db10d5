"""Exact fp16 search by faiss-gpu, for those who prefer it (`gpu_engine="faiss"`); torch is the default.

    rows 0 … 2,999,999, two GPUs     GPU 0: flat indexes of rows 0–1,048,575 and 1,048,576–1,499,999
                                     GPU 1: flat indexes of rows 1,500,000–2,548,575 and 2,548,576–2,999,999

One `add` fills each flat index: only into an empty index does FAISS convert the rows piece by piece. Otherwise it
needs room for all of them twice.

faiss-gpu has no build for CUDA 13, and none of the machines at hand had CUDA 12, so this has not run on a GPU. The
test runs it with FAISS's CPU indexes in place of those of the GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.gpu import merge, split_rows
from trl_search.retrieval.dense.vectors.search import Memory, VectorSearch

SHARD_ROWS = 1 << 20
_SCRATCH_BYTES = 512 << 20


class FaissGpuSearch(VectorSearch):
    """Exact search over flat fp16 indexes, `[(first row, index), ...]` per GPU."""

    def __init__(self, shards: Sequence[Sequence[tuple[int, Any]]], resources: Sequence[Any]) -> None:
        self._shards, self._resources = [list(shard) for shard in shards], list(resources)
        indexes = [index for shard in self._shards for _, index in shard]
        self.dim, self.count = int(indexes[0].d), sum(int(index.ntotal) for index in indexes)
        # FAISS's GPU indexes share their resources and are not thread-safe.
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(len(self._shards), thread_name_prefix="shard")

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        def search(shard: list[tuple[int, Any]]) -> tuple[np.ndarray, np.ndarray]:
            found = [(first, *index.search(queries, min(k, int(index.ntotal)))) for first, index in shard]
            return merge([(scores, np.where(rows < 0, -1, rows + first)) for first, scores, rows in found], k)

        with self._lock:
            if not self._shards:
                raise RetrievalError("this vector index is closed; open it again to search")
            return merge(list(self._pool.map(search, self._shards)), k)

    def memory(self) -> Memory:
        return Memory(gpu_bytes=2 * self.dim * self.count if self._shards else 0)

    def close(self) -> None:
        with self._lock:
            self._shards, self._resources = [], []
        self._pool.shutdown()


def require_faiss_gpu() -> None:
    """Raises a `UserError` where FAISS has no GPU functions or sees no GPU."""
    if getattr(faiss_module(), "get_num_gpus", lambda: 0)() < 1:
        raise UserError(
            "gpu_engine='faiss' needs FAISS for GPUs, and this FAISS sees none: pip install 'trl-search[faiss-gpu]' "
            "(CUDA 12), or leave it at 'torch'"
        )


def open_with_faiss(rows: np.ndarray) -> FaissGpuSearch:
    """Moves rows (N, d), float32 or float16 and usually mapped from a file, to all GPUs as fp16."""
    faiss = faiss_module()
    shards, resources = [], []
    for gpu, (first, last) in enumerate(split_rows(len(rows), faiss.get_num_gpus())):
        resource = faiss.StandardGpuResources()
        resource.setTempMemory(_SCRATCH_BYTES)
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        shard = []
        for start in tqdm(range(first, last, SHARD_ROWS), desc=f"to GPU {gpu}", unit="M rows", disable=None):
            index = faiss.GpuIndexFlatIP(resource, int(rows.shape[1]), config)
            index.add(np.ascontiguousarray(rows[start : min(start + SHARD_ROWS, last)], dtype=np.float32))
            shard.append((start, index))
        shards.append(shard)
        resources.append(resource)
    return FaissGpuSearch(shards, resources)
