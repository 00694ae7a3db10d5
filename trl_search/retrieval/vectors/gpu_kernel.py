"""Group maxima on a GPU in one kernel: the products of a tile of rows and queries never leave the registers.

`exact.group_maxima` writes each block of products and reads it back, and starts two kernels a block. At a batch of 512
the products alone take 17 ms of an H200's tensor cores for 21M x 768, so nothing else may cost much: here a tile is
multiplied, reduced to one maximum a group in fp32, and only that is written.

Tiles of the same rows and different queries are neighbours in launch order, so rows are read from memory once and then
from cache. Triton comes with torch's CUDA builds; with `TRITON_INTERPRET=1` the kernel runs on CPU tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from trl_search.retrieval.vectors.exact import GROUP

if TYPE_CHECKING:
    import torch

TILE_DIM = 64  # dimensions that are multiplied at a time


def fused_group_maxima(rows_ND: torch.Tensor, queries_BD: torch.Tensor) -> torch.Tensor:
    """As `exact.group_maxima`, for float16 rows and queries on one GPU."""
    import torch

    count, dim = rows_ND.shape
    batch = len(queries_BD)
    groups = -(-count // GROUP)
    maxima_BG = torch.empty((batch, groups), dtype=torch.float32, device=rows_ND.device)
    tile_queries, tile_rows, warps, stages = choose_tile(batch)
    query_tiles = -(-batch // tile_queries)
    _maxima_of_tile[(-(-count // tile_rows) * query_tiles,)](
        rows_ND,
        queries_BD.contiguous(),
        maxima_BG,
        count,
        batch,
        groups,
        query_tiles,
        DIM=dim,
        GROUP_ROWS=GROUP,
        TILE_ROWS=tile_rows,
        TILE_QUERIES=tile_queries,
        TILE_DIM=TILE_DIM,
        num_warps=warps,
        num_stages=stages,
    )
    return maxima_BG


def choose_tile(batch: int) -> tuple[int, int, int, int]:
    """Queries and rows of a tile, its warps, and the stages of its pipeline."""
    # Tensor cores take 16 queries at least. Few queries are bound by memory, many by the products.
    queries = 16 if batch <= 16 else 64 if batch <= 64 else 128
    return (queries, 256, 8, 3) if queries == 128 else (queries, 128, 4, 4)


# Triton reads annotations, and takes its own alone.
@triton.jit
def _maxima_of_tile(  # type: ignore[no-untyped-def]
    rows,
    queries,
    maxima,
    count,
    batch,
    groups,
    query_tiles,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    program = tl.program_id(0)
    query = (program % query_tiles) * TILE_QUERIES + tl.arange(0, TILE_QUERIES)
    # 21M rows of 768 are more elements than 32 bits count.
    row = (program // query_tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    # What is beyond the end repeats the last row or query: a maximum does not mind, and no load needs a mask for it.
    row_at = rows + tl.minimum(row, count - 1)[None, :] * DIM
    query_at = queries + tl.minimum(query, batch - 1)[:, None] * DIM
    scores = tl.zeros((TILE_QUERIES, TILE_ROWS), dtype=tl.float32)
    for start in range(0, DIM, TILE_DIM):
        at = start + tl.arange(0, TILE_DIM)
        if DIM % TILE_DIM == 0:
            query_part = tl.load(query_at + at[None, :])
            row_part = tl.load(row_at + at[:, None])
        else:
            query_part = tl.load(query_at + at[None, :], mask=at[None, :] < DIM, other=0.0)
            row_part = tl.load(row_at + at[:, None], mask=at[:, None] < DIM, other=0.0)
        scores = tl.dot(query_part, row_part, scores)
    best = tl.max(tl.reshape(scores, (TILE_QUERIES, TILE_ROWS // GROUP_ROWS, GROUP_ROWS)), axis=2)
    group = (program // query_tiles) * (TILE_ROWS // GROUP_ROWS) + tl.arange(0, TILE_ROWS // GROUP_ROWS)
    out = maxima + query[:, None].to(tl.int64) * groups + group[None, :]
    tl.store(out, best, mask=(query[:, None] < batch) & (group[None, :] < groups))
