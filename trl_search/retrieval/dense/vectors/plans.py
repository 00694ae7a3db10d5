"""The index types, each named by one word, and their costs: `plan("small", 21_000_000, 768)` estimates one in advance.

| word | what it is | bytes in memory; and on disk, per vector of d dimensions |
|---|---|---|
| `flat` | exact, fp32 | mapped; 4 d |
| `fp16` | exact over fp16 rows | mapped; 2 d |
| `int8` | exact over one-byte rows | mapped; d |
| `small` | RaBitQ codes of one bit; the best candidates are scored again with one-byte rows on disk | d/8 + 8; + d |
| `small-ivf` | the same in lists, of which `nprobe` are read | d/8 + 16 and the centroids; + d |
| `hnsw` | a graph over fp32 rows | 4 d + 280; the same |

"Memory" is resident memory. Mapped files are read when needed, and the kernel drops their pages when memory is short.
An exact search reads every row, so it is fast only while the file fits into the page cache.

Sizes are computed, and a test compares them with real files. Build times were measured by `benchmarks/vector_index.py`
with 768 dimensions on two AVX-512 cores, and are scaled by dimensions and cores. Recall was measured there too, on
embeddings of MiniLM and on synthetic vectors. `build_vectors` measures it again on the vectors themselves.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from trl_search.common.errors import unknown_name
from trl_search.retrieval.dense.vectors.search import gb

VECTOR_INDEXES = ("flat", "fp16", "int8", "small", "small-ivf", "hnsw")
HNSW_LINKS = 32
SLICE_ROWS = 65_536
TRAINING_ROWS = 100_000
_FACTORIES = {
    "flat": "Flat",
    "fp16": "SQfp16",
    "int8": "SQ8",
    "small": "RaBitQfs,Refine(SQ8)",
    "small-ivf": "IVF{lists},RaBitQfs,Refine(SQ8)",
    "hnsw": f"HNSW{HNSW_LINKS}",
}
# Expected recall@3 as (from, to). Exact types lose recall only by rounding; the others are calibrated to a target.
_RECALL = {
    "flat": (1.0, 1.0),
    "fp16": (0.999, 1.0),
    "int8": (0.987, 0.994),
    "small": (0.95, 0.98),
    "small-ivf": (0.95, 0.97),
    "hnsw": (0.87, 0.97),
}
# Microseconds per vector of 768 dimensions on one core, with calibration.
_BUILD_US = {"flat": 60, "fp16": 60, "int8": 70, "small": 90, "small-ivf": 260, "hnsw": 2200}
_FILE_HEAD = 4096
_TRAINED_LIST = 39  # FAISS warns if k-means has fewer vectors per list


@dataclass(frozen=True)
class VectorPlan:
    """The estimated cost of an index. `ram_bytes` is resident memory."""

    word: str
    factory: str
    count: int
    dim: int
    ram_bytes: int
    disk_bytes: int
    build_ram_bytes: int
    build_s: float
    recall_at_3: tuple[float, float]
    gpu_bytes: int | None

    def describe(self) -> str:
        """One line for people: `small (RaBitQfs,Refine(SQ8)): 21,000,000 x 768: RAM 2.2 GB, disk 18.3 GB, ...`."""
        low, high = self.recall_at_3
        recall = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        gpu = f", or {gb(self.gpu_bytes)} of GPU memory" if self.gpu_bytes is not None else ""
        return (
            f"{self.word} ({self.factory}): {self.count:,} x {self.dim}: RAM {gb(self.ram_bytes)}{gpu}, disk "
            f"{gb(self.disk_bytes)}, build about {_duration(self.build_s)} in {gb(self.build_ram_bytes)} on "
            f"{os.cpu_count()} cores, recall@3 {recall}"
        )


def plan(word: str, count: int, dim: int) -> VectorPlan:
    """Estimates the cost of an index of `count` vectors of `dim` dimensions before it is built.

    Raises:
        UserError: for an unknown word.
    """
    if word not in VECTOR_INDEXES:
        raise unknown_name("vector index", word, VECTOR_INDEXES)
    # Fast-scan codes are stored in blocks of 32 vectors. Each vector has two floats besides its bits.
    bits = math.ceil(dim / 8) + 8
    lists = list_count(count)
    codes = {"flat": 4 * dim, "fp16": 2 * dim, "int8": dim}
    gpu = None
    if word in codes:
        disk = codes[word] * count + _FILE_HEAD
        ram = _FILE_HEAD
        # Rows are streamed: memory holds one slice and its copy.
        build_ram = 2 * 4 * dim * min(count, SLICE_ROWS)
        gpu = 2 * dim * count if word in ("flat", "fp16") else None
    elif word == "hnsw":
        # Per vector: links of the ground level, an offset and a level; for one in 32, half as many links above.
        disk = ram = count * (4 * dim + 4 * (2 * HNSW_LINKS + HNSW_LINKS // 31) + 12) + _FILE_HEAD
        build_ram = ram
    else:
        ram = bits * 32 * math.ceil(count / 32) + _FILE_HEAD
        if word == "small-ivf":
            # An id per vector, and per list a centroid and half a block of padding.
            ram = (bits + 8) * count + lists * (4 * dim + 16 * bits + 64) + _FILE_HEAD
        disk = ram + dim * count + 8 * dim
        # The training sample, besides the codes.
        sample = 64 * lists if word == "small-ivf" else TRAINING_ROWS
        build_ram = ram + 2 * 4 * dim * min(count, max(sample, SLICE_ROWS))
    return VectorPlan(
        word=word,
        factory=factory_of(word, count),
        count=count,
        dim=dim,
        ram_bytes=ram,
        disk_bytes=disk,
        build_ram_bytes=build_ram,
        build_s=count * _BUILD_US[word] * 1e-6 * (dim / 768) / (os.cpu_count() or 1),
        recall_at_3=_RECALL[word],
        gpu_bytes=gpu,
    )


def factory_of(word: str, count: int) -> str:
    """The string that FAISS' `index_factory` takes."""
    return _FACTORIES[word].format(lists=list_count(count))


def list_count(count: int) -> int:
    """Lists of an IVF: a power of two near 4 sqrt(N), with enough vectors per list to train on."""
    wanted = 2 ** round(math.log2(4 * math.sqrt(max(count, 1))))
    return max(1, min(wanted, count // _TRAINED_LIST))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
