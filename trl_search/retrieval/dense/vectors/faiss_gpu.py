"""Exact fp16 search with faiss-gpu (`gpu_engine="faiss"`); the default is torch.

    rows 0 … 2,999,999, two GPUs     GPU 0: flat indexes of rows 0–1,048,575 and 1,048,576–1,499,999
                                     GPU 1: flat indexes of rows 1,500,000–2,548,575 and 2,548,576–2,999,999

One `add` fills each flat index: FAISS converts rows piece by piece only when the index is empty, and otherwise needs
memory for all of them twice.

faiss-gpu has no build for CUDA 13, so it needs CUDA 12's libraries. It takes 10 to 29 times as long as torch with our
kernels (docs/performance.md). The tests run it with FAISS's CPU indexes in place of GPU indexes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.gpu import ShardedSearch, merge, split_rows

SHARD_ROWS = 1 << 20
_SCRATCH_BYTES = 512 << 20


@dataclass(frozen=True)
class FaissShard:
    """The flat fp16 indexes of one GPU with their first row numbers, and the scratch memory that they share."""

    indexes: Sequence[tuple[int, Any]]
    resources: Any


class FaissGpuSearch(ShardedSearch[FaissShard]):
    """Exact search with FAISS, whose GPU indexes are not thread-safe."""

    def __init__(self, shards: Sequence[FaissShard]) -> None:
        indexes = [index for shard in shards for _, index in shard.indexes]
        super().__init__(shards, dim=int(indexes[0].d), count=sum(int(index.ntotal) for index in indexes))

    def _search_shard(self, shard: FaissShard, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = [(first, *index.search(queries_BD, min(k, int(index.ntotal)))) for first, index in shard.indexes]
        return merge([(scores, np.where(rows < 0, -1, rows + first)) for first, scores, rows in found], k)


def require_faiss_gpu() -> None:
    """Raises a `UserError` if FAISS has no GPU functions or sees no GPU."""
    if getattr(faiss_module(), "get_num_gpus", lambda: 0)() < 1:
        raise UserError(
            "gpu_engine='faiss' needs FAISS for GPUs, and this FAISS sees none: pip install 'trl-search[faiss-gpu]' "
            "(CUDA 12), or leave it at 'torch'"
        )


def open_with_faiss(rows_ND: np.ndarray) -> FaissGpuSearch:
    """Copies rows (N, d), float32 or float16 and usually memory-mapped, to all GPUs as fp16."""
    faiss = faiss_module()
    shards = []
    for gpu, (first, last) in enumerate(split_rows(len(rows_ND), faiss.get_num_gpus())):
        resource = faiss.StandardGpuResources()
        resource.setTempMemory(_SCRATCH_BYTES)
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        indexes = []
        for start in tqdm(range(first, last, SHARD_ROWS), desc=f"to GPU {gpu}", unit="M rows", disable=None):
            index = faiss.GpuIndexFlatIP(resource, int(rows_ND.shape[1]), config)
            index.add(np.ascontiguousarray(rows_ND[start : min(start + SHARD_ROWS, last)], dtype=np.float32))
            indexes.append((start, index))
        shards.append(FaissShard(indexes, resource))
    return FaissGpuSearch(shards)
