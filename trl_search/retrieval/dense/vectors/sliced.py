"""The rows of a FAISS file, mapped, and batches searched in them on CPU.

FAISS compares one-byte and fp16 rows query by query. A batch is several times faster as products of slices, so such
indexes go through `exact.py` from 8 queries on; scores differ in the last bits, as between any two batch sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trl_search.retrieval.dense.vectors.exact import dequantised, top_rows
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.search import FaissSearch

_BATCH = 8


def read_faiss(path: Path) -> Any:
    """A FAISS file, memory-mapped where its type allows."""
    faiss = faiss_module()
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def stored_rows(path: Path, index: Any) -> np.ndarray | None:
    """The rows of a flat or scalar-quantised FAISS file, mapped: they are its end. `None` for every other type."""
    faiss = faiss_module()
    if isinstance(index, faiss.IndexFlat):
        dtype: type = np.float32
    elif type(index) is faiss.IndexScalarQuantizer and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
        dtype = np.float16
    elif type(index) is faiss.IndexScalarQuantizer and index.sq.qtype == faiss.ScalarQuantizer.QT_8bit:
        dtype = np.uint8
    else:
        return None
    shape = (int(index.ntotal), int(index.d))
    offset = path.stat().st_size - shape[0] * shape[1] * np.dtype(dtype).itemsize
    if not shape[0] or offset < 0:
        return None
    # Copy on write: torch wants an array that looks writable, and nothing writes.
    return np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape)


class SlicedSearch(FaissSearch):
    """fp16 or one-byte rows on CPU: FAISS for single queries, products of slices for batches."""

    def __init__(self, index: Any, rows: np.ndarray, max_norm: float) -> None:
        super().__init__(index, mapped_bytes=rows.nbytes)
        self._rows, self._max_norm = rows, max_norm
        self._affine: tuple[np.ndarray, np.ndarray] | None = None
        if rows.dtype == np.uint8:
            low, width = faiss_module().vector_to_array(index.sq.trained).reshape(2, -1)
            self._affine = low + width / 510, width / 255

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if len(queries) < _BATCH or self._index is None:  # a closed one refuses there
            return super()._search(queries, k)
        import torch

        added: np.ndarray | float = 0.0
        longest = self._max_norm
        if self._affine is not None:
            queries, added = dequantised(queries, *self._affine)
            longest = 255 * float(np.sqrt(self.dim))
        scores, rows = top_rows(torch.from_numpy(self._rows), torch.from_numpy(queries), k, max_norm=longest)
        return scores.numpy() + added, rows.numpy()
