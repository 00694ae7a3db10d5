"""`VectorSearch`, the interface of an open vector index, and `FaissSearch` on CPU.

Scores are inner products; the highest is the best. Rows come best first, equal scores in order of the rows. Missing
rows are -1 with score -inf. Batches and threads change the last bits of a score, so copies of a vector can swap
places. For the same rows every time, fetch more rows and rank them with `ranking.py`.
"""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module


class VectorSearch(abc.ABC):
    """Finds the nearest vectors. Several threads may call `search` at once."""

    dim: int
    count: int

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The scores and the rows of the `k` best vectors for each query (B, d): (B, k) float32 and (B, k) int64, -inf
        and -1 if there are no more.

        Raises:
            RetrievalError: for a query that is not finite.
        """
        queries_BD = np.ascontiguousarray(queries, dtype=np.float32)
        if not np.isfinite(queries_BD).all():
            raise RetrievalError("a query vector holds NaN or infinity; the encoder overflowed")
        scores_BK = np.full((len(queries_BD), k), -np.inf, dtype=np.float32)
        rows_BK = np.full((len(queries_BD), k), -1, dtype=np.int64)
        fetch = min(k, self.count)
        if len(queries_BD) and fetch:
            found_scores, found_rows = self._search(queries_BD, fetch)
            found_scores = np.where(found_rows < 0, -np.inf, found_scores)
            order = np.lexsort((found_rows, -found_scores), axis=-1)
            scores_BK[:, :fetch] = np.take_along_axis(found_scores, order, axis=1)
            rows_BK[:, :fetch] = np.take_along_axis(found_rows, order, axis=1)
        return scores_BK, rows_BK

    @abc.abstractmethod
    def _search(self, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Like `search`, for a non-empty batch of contiguous float32, and `1 <= k <= count`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases memory and files. Safe to call twice; a running search finishes."""


class FaissSearch(VectorSearch):
    """A FAISS index on CPU, memory-mapped if its type allows it. Its searches are thread-safe."""

    def __init__(self, index: Any) -> None:
        self.index = index
        # The smallest L2 distance is the best, so distances are negated.
        self._sign = -1.0 if index.metric_type == faiss_module().METRIC_L2 else 1.0
        self.dim, self.count = int(index.d), int(index.ntotal)

    def _search(self, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        index = self.index  # keeps the index alive if `close` runs during this search
        if index is None:
            raise RetrievalError("this vector index is closed; open it again to search")
        scores_BK, rows_BK = index.search(queries_BD, k)
        return (scores_BK if self._sign > 0 else -scores_BK), rows_BK

    def close(self) -> None:
        self.index = None


def read_faiss(path: Path) -> Any:
    """Opens a FAISS file, memory-mapped if its type allows it."""
    faiss = faiss_module()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def stored_rows(path: Path, index: Any) -> np.ndarray | None:
    """The rows of a FAISS file of fp32 or fp16 vectors, mapped from its end. `None` for every other type."""
    faiss = faiss_module()
    if isinstance(index, faiss.IndexFlat):
        dtype: type = np.float32
    elif type(index) is faiss.IndexScalarQuantizer and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        dtype = np.float16
    else:
        return None
    shape = (int(index.ntotal), int(index.d))
    offset = path.stat().st_size - shape[0] * shape[1] * np.dtype(dtype).itemsize
    if not shape[0] or offset < 0:
        return None
    # Copy on write, because torch expects a writable array. Nothing writes to it.
    return np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape)


def available_ram_bytes() -> int:
    """Memory that is available without swapping; page cache counts as free."""
    return int(psutil.virtual_memory().available)


def gb(size: float) -> str:
    """`"3.1 GB"`; decimal, as disks and GPUs are sold."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
