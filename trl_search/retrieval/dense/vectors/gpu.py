"""Exact fp16 search on the GPUs present: rows dealt out evenly, transferred in slices, searched on all GPUs at once.

The field's servers copy a whole fp32 index to the GPU and convert it there, which needs three times its final size
(Search-R1 #54, #57). Here each GPU's fp16 rows are allocated once and filled slice by slice from the mapped file,
converted on the way, so neither GPU nor host ever holds more than the final size and one slice. `check_gpu_memory`
says beforehand what is needed and what is there.

Two engines:

- **torch**, where it sees a GPU (`exact.py`, `gpu_kernel.py`): products by tensor cores, results those of an fp32
  search over the fp16 rows. A machine that trains has it in any case.
- **faiss-gpu** otherwise, which has no build for CUDA 13: flat indexes of a million rows each, since FAISS converts
  what one `add` brings in pieces only into an index that was empty. It was not run: no machine with it was at hand.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.dense.vectors.exact import MAX_BATCH, SCORED_AGAIN, Kernels, top_rows
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.plans import SLICE_ROWS
from trl_search.retrieval.dense.vectors.search import Memory, VectorSearch, available_ram_bytes, gb

if TYPE_CHECKING:
    import torch

FAISS_SHARD_ROWS = 1 << 20
_FAISS_SCRATCH = 512 << 20


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `first + len(rows_ND)`, on one device; none is longer than `max_norm`."""

    rows_ND: torch.Tensor
    first: int
    max_norm: float
    kernels: Kernels | None


class TorchSearch(VectorSearch):
    """Exact search by torch over shards that are on their devices."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards: list[Shard] = list(shards)
        self.dim = int(self._shards[0].rows_ND.shape[1])
        self.count = sum(len(shard.rows_ND) for shard in self._shards)
        # Searches of two threads would share a GPU's scratch memory; the GPU is busy with one anyway.
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(len(self._shards), thread_name_prefix="shard")

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if not self._shards:
                raise RetrievalError("this vector index is closed; open it again to search")
            return merge(list(self._pool.map(lambda shard: _search_shard(shard, queries, k), self._shards)), k)

    def memory(self) -> Memory:
        size = sum(shard.rows_ND.nbytes for shard in self._shards if shard.rows_ND.is_cuda)
        host = sum(shard.rows_ND.nbytes for shard in self._shards if not shard.rows_ND.is_cuda)
        return Memory(gpu_bytes=size, host_bytes=host)

    def close(self) -> None:
        with self._lock:
            self._shards = []
        self._pool.shutdown()


class FaissGpuSearch(VectorSearch):
    """Exact search by faiss-gpu over flat fp16 indexes, `[(first row, index), ...]` a GPU."""

    def __init__(self, shards: Sequence[Sequence[tuple[int, Any]]], resources: Sequence[Any]) -> None:
        self._shards, self._resources = [list(shard) for shard in shards], list(resources)
        indexes = [index for shard in self._shards for _, index in shard]
        self.dim, self.count = int(indexes[0].d), sum(int(index.ntotal) for index in indexes)
        # FAISS' GPU indexes share their resources and are not thread-safe.
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


def gpu_engine() -> str | None:
    """`"torch"`, `"faiss"`, or `None` where neither reaches a GPU."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return "torch"
    return "faiss" if getattr(faiss_module(), "get_num_gpus", lambda: 0)() > 0 else None


def open_on_gpus(rows: np.ndarray, *, engine: str) -> VectorSearch:
    """Moves rows (N, d), float32 or float16 and usually mapped from a file, to all GPUs as fp16."""
    free = free_gpu_bytes(engine)
    check_gpu_memory(len(rows), int(rows.shape[1]), free)
    if engine == "faiss":
        return _faiss_shards(rows, len(free))
    import torch

    return TorchSearch(
        [
            transfer(rows[first:last], first, torch.device("cuda", gpu))
            for gpu, (first, last) in enumerate(split_rows(len(rows), len(free)))
        ]
    )


def check_gpu_memory(count: int, dim: int, free_bytes: Sequence[int], ram_bytes: int | None = None) -> None:
    """Refuses what will not fit, before anything is moved.

    Args:
        count (`int`): Rows.
        dim (`int`): Dimensions.
        free_bytes (`Sequence[int]`): Free memory of each GPU.
        ram_bytes (`int`, *optional*): Free memory of the host; by default asked of the system.
    """
    ram = available_ram_bytes() if ram_bytes is None else ram_bytes
    share = math.ceil(count / len(free_bytes))
    rows, work = share * dim * 2, work_bytes(share, dim)
    host = 2 * 4 * dim * min(share, FAISS_SHARD_ROWS)
    short = [f"GPU {gpu} has {gb(free)} free" for gpu, free in enumerate(free_bytes) if free < rows + work]
    if short:
        raise UserError(
            f"{count:,} x {dim} in fp16 need {gb(rows)} and {gb(work)} to search with on each of "
            f"{len(free_bytes)} GPUs, but {', '.join(short)}. Free it, use more GPUs "
            "(CUDA_VISIBLE_DEVICES), or search on CPU: device='cpu'"
        )
    if ram < host:
        raise UserError(f"moving rows to the GPUs needs {gb(host)} of the host's memory, {gb(ram)} are free")


def work_bytes(count: int, dim: int) -> int:
    """GPU memory a search takes for a moment: maxima, and rows scored again in three copies."""
    return (
        MAX_BATCH * math.ceil(count / 64) * 4 * 5 // 4 + SCORED_AGAIN["cuda"] * 12 + MAX_BATCH * dim * 16 + (64 << 20)
    )


def free_gpu_bytes(engine: str) -> list[int]:
    """Free memory of each GPU that this process sees."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return [torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())]
    if engine != "faiss":
        return []
    asked = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cannot ask nvidia-smi for the free GPU memory ({error}); use device='cpu'") from None
    return [int(line) << 20 for line in told.split()][: faiss_module().get_num_gpus()]


def split_rows(count: int, parts: int) -> list[tuple[int, int]]:
    """`[(first, last), ...]`: even, in order, none empty."""
    edges = [count * part // parts for part in range(parts + 1)]
    return [(first, last) for first, last in pairwise(edges) if last > first]


def transfer(rows: np.ndarray, first: int, device: torch.device) -> Shard:
    """Fills fp16 rows on a device, a slice at a time."""
    import torch

    rows_ND = torch.empty(rows.shape, dtype=torch.float16, device=device)
    longest = 0.0
    starts = range(0, len(rows), SLICE_ROWS)
    for start in tqdm(starts, desc=f"to {device}", unit_scale=SLICE_ROWS, unit=" rows", disable=None):
        # A copy: rows in a mapped file may lie at odd addresses, and are read-only.
        part = torch.from_numpy(np.array(rows[start : start + SLICE_ROWS], order="C")).half()
        rows_ND[start : start + len(part)].copy_(part)
        norm = float(rows_ND[start : start + len(part)].norm(dim=1, dtype=torch.float32).max())
        longest = max(longest, norm)
        if not math.isfinite(norm):
            raise UserError(f"a vector of rows {first + start:,} and on holds NaN, infinity or more than fp16 can")
    return Shard(rows_ND, first, longest, fused_kernels(rows_ND))


def merge(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best of several results of the same queries, ties by row."""
    scores_BM, rows_BM = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    scores_BM = np.where(rows_BM < 0, -np.inf, scores_BM)
    order_BK = np.lexsort((rows_BM, -scores_BM), axis=-1)[:, :k]
    return np.take_along_axis(scores_BM, order_BK, axis=1), np.take_along_axis(rows_BM, order_BK, axis=1)


def _search_shard(shard: Shard, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    import torch

    device = shard.rows_ND.device
    # Triton starts kernels on the thread's own device, which is the first one wherever the rows are.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        queries_BD = torch.from_numpy(queries).to(device)
        fetch = min(k, len(shard.rows_ND))
        scores, rows = top_rows(shard.rows_ND, queries_BD, fetch, max_norm=shard.max_norm, kernels=shard.kernels)
        return scores.cpu().numpy(), rows.cpu().numpy() + shard.first


def fused_kernels(rows_ND: torch.Tensor) -> Kernels | None:
    """Kernels of our own for these rows; `None`, which is torch's, where GPU or dimension do not allow them."""
    import torch

    if not rows_ND.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    from trl_search.retrieval.dense.vectors.gpu_kernel import SHARED_BYTES, fused_group_maxima, fused_scores

    gpu: Any = torch.cuda.get_device_properties(rows_ND.device)
    if gpu.major < 9 or gpu.shared_memory_per_block_optin < SHARED_BYTES or rows_ND.shape[1] % 8:
        return None  # loads of tiles count in 16 bytes
    return Kernels(fused_group_maxima, fused_scores)


def _faiss_shards(rows: np.ndarray, gpus: int) -> FaissGpuSearch:
    faiss = faiss_module()
    shards, resources = [], []
    for gpu, (first, last) in enumerate(split_rows(len(rows), gpus)):
        resource = faiss.StandardGpuResources()
        resource.setTempMemory(_FAISS_SCRATCH)
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        shard = []
        for start in tqdm(range(first, last, FAISS_SHARD_ROWS), desc=f"to GPU {gpu}", unit="M rows", disable=None):
            index = faiss.GpuIndexFlatIP(resource, int(rows.shape[1]), config)
            index.add(np.ascontiguousarray(rows[start : min(start + FAISS_SHARD_ROWS, last)], dtype=np.float32))
            shard.append((start, index))
        shards.append(shard)
        resources.append(resource)
    return FaissGpuSearch(shards, resources)
