"""Triton kernels for the two passes of `exact.top_rows`: maxima of groups of rows, and rescoring of candidates.

Maxima. `exact.group_maxima` writes every block of products to memory, reads it back, and starts two kernels per block.
For 21M x 768 and a batch of 512, the products alone take 17 ms of an H200's tensor cores, so little time is left for
anything else. This kernel multiplies one tile, reduces it to one fp32 maximum per group, and writes only the maxima.
Each multiprocessor processes its tiles in sequence, and loads the rows of the next tile while it reduces the last.
Tiles with the same rows and different queries are neighbours, so each row is read from memory once and then from
cache.

Scores. torch gathers the rows of all candidates, converts them and multiplies them: three passes over memory. This
kernel reads them once.

Triton comes with the CUDA builds of torch. With `TRITON_INTERPRET=1` the kernels run on CPU tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from trl_search.retrieval.dense.vectors.exact import GROUP

if TYPE_CHECKING:
    import torch

TILE_DIM = 64  # dimensions multiplied per step
SCORED_AT_ONCE = 8
# Shared memory per multiprocessor for the largest tile. Hopper and Blackwell have it; a GeForce has less.
SHARED_BYTES = 192 << 10


def fused_group_maxima(rows_ND: torch.Tensor, queries_BD: torch.Tensor) -> torch.Tensor:
    """As `exact.group_maxima`, for float16 rows and queries on one GPU."""
    import torch

    count, dim = rows_ND.shape
    batch = len(queries_BD)
    groups = -(-count // GROUP)
    maxima_BG = torch.empty((batch, groups), dtype=torch.float32, device=rows_ND.device)
    tile_queries, tile_rows, warps, stages = choose_tile(batch)
    query_tiles = -(-batch // tile_queries)
    tiles = query_tiles * -(-count // tile_rows)
    _maxima_of_tiles[(min(tiles, _multiprocessors(rows_ND.device)),)](
        TensorDescriptor.from_tensor(rows_ND, [tile_rows, TILE_DIM]),
        TensorDescriptor.from_tensor(queries_BD.contiguous(), [tile_queries, TILE_DIM]),
        maxima_BG,
        count,
        batch,
        groups,
        query_tiles,
        tiles,
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
    # Tensor cores need at least 16 queries. Few queries are bound by memory, many by the products.
    queries = 16 if batch <= 16 else 64 if batch <= 64 else 128
    return queries, 256, 8, 3 if queries == 128 else 4


def fused_scores(rows_ND: torch.Tensor, queries_BD: torch.Tensor, candidates_BC: torch.Tensor) -> torch.Tensor:
    """As `exact.score_again`, for float16 rows and float32 queries on one GPU."""
    import torch

    (count, dim), (batch, candidates) = rows_ND.shape, candidates_BC.shape
    scores_BC = torch.empty((batch, candidates), dtype=torch.float32, device=rows_ND.device)
    _scores_of_candidates[(batch, -(-candidates // SCORED_AT_ONCE))](
        rows_ND,
        queries_BD.contiguous(),
        candidates_BC.contiguous(),
        scores_BC,
        count,
        candidates,
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        AT_ONCE=SCORED_AT_ONCE,
    )
    return scores_BC


def _multiprocessors(device: torch.device) -> int:
    import torch

    if device.type != "cuda":
        return 3  # interpreted: few enough that each program gets several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


# Not annotated: Triton reads annotations, and accepts only its own.
@triton.jit
def _maxima_of_tiles(  # type: ignore[no-untyped-def]
    rows,
    queries,
    maxima,
    count,
    batch,
    groups,
    query_tiles,
    tiles,
    DIM: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    # `flatten` makes one loop over the steps of all tiles, so that loads for the next tile start early.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_query = (tile % query_tiles) * TILE_QUERIES
        first_row = (tile // query_tiles) * TILE_ROWS
        scores = tl.zeros((TILE_QUERIES, TILE_ROWS), dtype=tl.float32)
        for start in range(0, DIM, TILE_DIM):
            # Beyond the last row, query or dimension, zeros are loaded.
            query_part = queries.load([first_query, start])
            row_part = rows.load([first_row, start])
            scores = tl.dot(query_part, row_part.T, scores)
        row = first_row + tl.arange(0, TILE_ROWS)
        scores = tl.where((row < count)[None, :], scores, float("-inf"))
        best = tl.max(tl.reshape(scores, (TILE_QUERIES, TILE_ROWS // GROUP_ROWS, GROUP_ROWS)), axis=2)
        query = first_query + tl.arange(0, TILE_QUERIES)
        group = first_row // GROUP_ROWS + tl.arange(0, TILE_ROWS // GROUP_ROWS)
        out = maxima + query[:, None].to(tl.int64) * groups + group[None, :]
        tl.store(out, best, mask=(query[:, None] < batch) & (group[None, :] < groups))


@triton.jit
def _scores_of_candidates(  # type: ignore[no-untyped-def]
    rows, queries, candidates, scores, count, per_query, DIM: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr
):
    query = tl.program_id(0)
    at = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    place = query.to(tl.int64) * per_query + at
    row = tl.load(candidates + place, mask=at < per_query, other=0)
    column = tl.arange(0, WIDTH)
    wanted = column < DIM
    query_part = tl.load(queries + query * DIM + column, mask=wanted, other=0.0)
    # 21M rows of 768 have more elements than 32 bits can index, so rows are int64, as candidates are.
    row_at = rows + tl.minimum(row, count - 1)[:, None] * DIM + column[None, :]
    products = tl.load(row_at, mask=wanted[None, :], other=0.0).to(tl.float32) * query_part[None, :]
    score = tl.where(row < count, tl.sum(products, axis=1), float("-inf"))
    tl.store(scores + place, score, mask=at < per_query)
