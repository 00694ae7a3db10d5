"""Exact fp16 search on all GPUs: each GPU holds an equal share of the rows, and all GPUs search at the same time.

Other servers copy a whole fp32 index to the GPU and convert it there, which needs three times its final size
(Search-R1 #54, #57). Here each GPU's fp16 rows are allocated once and filled slice by slice from the mapped file, so
neither GPU nor host ever holds more than the final size and one slice. `check_gpu_memory` checks in advance that the
rows fit.

torch searches (`exact.py`, `gpu_kernel.py`). Results equal those of an fp32 search over the fp16 rows.
"""

from __future__ import annotations

import abc
import contextlib
import importlib.util
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.dense.vectors.exact import GROUP, MAX_BATCH, SCORED_AGAIN, Kernels, top_rows
from trl_search.retrieval.dense.vectors.plans import SLICE_ROWS
from trl_search.retrieval.dense.vectors.search import VectorSearch, available_ram_bytes, gb

if TYPE_CHECKING:
    import torch

ShardType = TypeVar("ShardType")


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `first + len(rows_ND)`, on one device. No row has a norm above `max_norm`."""

    rows_ND: torch.Tensor
    first: int
    max_norm: float
    kernels: Kernels | None


class ShardedSearch(VectorSearch, Generic[ShardType]):
    """Exact search over shards on several devices, all in parallel, one batch of queries at a time."""

    def __init__(self, shards: Sequence[ShardType], *, dim: int, count: int) -> None:
        self.dim, self.count = dim, count
        self.shards = list(shards)
        # Two concurrent searches would need the scratch memory of a GPU twice, and would not be faster.
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(len(self.shards), thread_name_prefix="shard")

    @abc.abstractmethod
    def _search_shard(self, shard: ShardType, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and global row numbers of the best rows of one shard, at most `k`."""

    def _search(self, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if not self.shards:
                raise RetrievalError("this vector index is closed; open it again to search")
            if len(self.shards) == 1:  # without the pool: its threads do not survive a fork
                return self._search_shard(self.shards[0], queries_BD, k)
            return merge(list(self._pool.map(lambda shard: self._search_shard(shard, queries_BD, k), self.shards)), k)

    def close(self) -> None:
        with self._lock:
            self.shards = []
        self._pool.shutdown()


class TorchSearch(ShardedSearch[Shard]):
    """Exact search with torch."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        count = sum(len(shard.rows_ND) for shard in shards)
        super().__init__(shards, dim=int(shards[0].rows_ND.shape[1]), count=count)

    def _search_shard(self, shard: Shard, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import torch

        device = shard.rows_ND.device
        # Triton starts kernels on the thread's current device, which may not be the device of the rows.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            asked_BD = torch.from_numpy(queries_BD).to(device)
            fetch = min(k, len(shard.rows_ND))
            scores, rows = top_rows(shard.rows_ND, asked_BD, fetch, max_norm=shard.max_norm, kernels=shard.kernels)
            return scores.cpu().numpy(), rows.cpu().numpy() + shard.first


def open_on_gpus(rows_ND: np.ndarray) -> VectorSearch:
    """Copies rows (N, d), float32 or float16 and usually memory-mapped, to all GPUs as fp16."""
    import torch

    free = free_gpu_bytes()
    check_gpu_memory(len(rows_ND), int(rows_ND.shape[1]), free)
    shares = enumerate(split_rows(len(rows_ND), len(free)))
    return TorchSearch(
        [transfer(rows_ND[first:last], first, torch.device("cuda", gpu)) for gpu, (first, last) in shares]
    )


def search_in_memory(vectors_ND: np.ndarray) -> VectorSearch:
    """Exact search over float32 vectors (N, d) in host memory, without FAISS or a GPU."""
    import torch

    longest = float(np.linalg.norm(vectors_ND, axis=1).max())
    return TorchSearch([Shard(torch.from_numpy(vectors_ND), 0, longest, None)])


def check_gpu_memory(count: int, dim: int, free_bytes: Sequence[int], ram_bytes: int | None = None) -> None:
    """Raises a `UserError` if the rows do not fit, before any are copied."""
    ram = available_ram_bytes() if ram_bytes is None else ram_bytes
    share = math.ceil(count / len(free_bytes))
    rows, work, host = share * dim * 2, work_bytes(share, dim), 2 * 4 * dim * min(share, SLICE_ROWS)
    short = [f"GPU {gpu} has {gb(free)} free" for gpu, free in enumerate(free_bytes) if free < rows + work]
    if short:
        raise UserError(
            f"{count:,} x {dim} in fp16 need {gb(rows)}, plus {gb(work)} for searching, on each of "
            f"{len(free_bytes)} GPUs, but {', '.join(short)}. Free memory, use more GPUs "
            "(CUDA_VISIBLE_DEVICES), or search on CPU: device='cpu'"
        )
    if ram < host:
        raise UserError(f"moving rows to the GPUs needs {gb(host)} of the host's memory, {gb(ram)} are free")


def work_bytes(count: int, dim: int) -> int:
    """GPU memory that a search needs besides the rows: the maxima of the groups, and three copies of the
    candidates."""
    maxima = MAX_BATCH * math.ceil(count / GROUP) * 4 * 5 // 4
    return maxima + SCORED_AGAIN["cuda"] * 12 + MAX_BATCH * dim * 16 + (64 << 20)


def free_gpu_bytes() -> list[int]:
    """Free memory of each GPU that this process sees; `[]` if there is none."""
    import torch

    return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]


def split_rows(count: int, parts: int) -> list[tuple[int, int]]:
    """`[(first, last), ...]`: parts of equal size in order, without empty ones."""
    edges = [count * part // parts for part in range(parts + 1)]
    return [(first, last) for first, last in pairwise(edges) if last > first]


def transfer(rows_ND: np.ndarray, first: int, device: torch.device) -> Shard:
    """Copies rows to a device as fp16, one slice at a time.

    Raises:
        UserError: if a vector is not finite.
    """
    import torch

    held_ND = torch.empty(rows_ND.shape, dtype=torch.float16, device=device)
    longest = 0.0
    starts = range(0, len(rows_ND), SLICE_ROWS)
    for start in tqdm(starts, desc=f"to {device}", unit_scale=SLICE_ROWS, unit=" rows", disable=None):
        # A copy: rows in a mapped file are read-only and may be unaligned.
        part = torch.from_numpy(np.array(rows_ND[start : start + SLICE_ROWS], order="C")).half()
        held_ND[start : start + len(part)].copy_(part)
        norm = float(held_ND[start : start + len(part)].norm(dim=1, dtype=torch.float32).max())
        longest = max(longest, norm)
        if not math.isfinite(norm):
            raise UserError(
                f"a vector at or after row {first + start:,} holds NaN, infinity or a number too large for fp16"
            )
    return Shard(held_ND, first, longest, fused_kernels(held_ND))


def merge(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merges several results of the same queries into the `k` best, ties by row."""
    scores_BM, rows_BM = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    scores_BM = np.where(rows_BM < 0, -np.inf, scores_BM)
    order_BK = np.lexsort((rows_BM, -scores_BM), axis=-1)[:, :k]
    return np.take_along_axis(scores_BM, order_BK, axis=1), np.take_along_axis(rows_BM, order_BK, axis=1)


def fused_kernels(rows_ND: torch.Tensor) -> Kernels | None:
    """The Triton kernels for these rows; `None` (use torch) if the GPU or the dimension does not allow them."""
    import torch

    if not rows_ND.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    from trl_search.retrieval.dense.vectors.gpu_kernel import SHARED_BYTES, fused_group_maxima, fused_scores

    gpu: Any = torch.cuda.get_device_properties(rows_ND.device)
    if gpu.major < 9 or gpu.shared_memory_per_block_optin < SHARED_BYTES or rows_ND.shape[1] % 8:
        return None  # tiles are loaded in units of 16 bytes
    return Kernels(fused_group_maxima, fused_scores)
