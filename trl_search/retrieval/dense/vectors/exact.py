"""Exact search over rows that are stored in few bits (fp16, or one byte), by torch: on GPUs, and on CPU for batches.

Scores are wanted for every row, and only k of them matter. Writing B x N scores and selecting among them would cost
more than the products, so one maximum is kept for each group of 64 neighbouring rows:

    rows_ND ──► a block of products ──► maxima_BG ──► the best groups ──► their rows, scored again in fp32 ──► best k

The k best rows lie in the k groups of highest maxima, so nothing is lost *if the maxima are exact*. They are not
quite: on a GPU the query is rounded to fp16, and sums are accumulated in another order than when a row is scored
again. Both errors have a bound, so more groups than k are fetched, and the result of a query is accepted when its k-th
score beats the highest maximum that was *not* fetched by more than that bound. A query that fails this (masses of
near-duplicates) is answered by scoring every row in fp32. So results are those of an fp32 search over the stored rows;
equal scores come by row. Against fp32 storage, only the rounding of the rows is lost: recall@3 is .9997 in fp16
(`benchmarks/vector_index.py`).

Rows of one byte are `offset + scale * code`, each dimension with its own: scale goes into the query, offset becomes
one number a query, and the products are over the codes themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

GROUP = 64
MARGIN = 8  # groups fetched beyond k
MAX_BATCH = 512
# Products of one block: what stays in the last-level cache between the product and the maxima. On CPU a block's rows,
# which are converted to fp32, must stay there too.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
CPU_BLOCK_ROWS = 4096
SCORED_AGAIN = {"cpu": 1 << 21, "cuda": 1 << 24}  # elements gathered at once when rows are scored again


@dataclass(frozen=True)
class Kernels:
    """The two passes over rows: `group_maxima` and `score_again`, or what computes the same (`gpu_kernel.py`)."""

    group_maxima: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    score_again: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def top_rows(
    rows_ND: torch.Tensor,
    queries_BD: torch.Tensor,
    k: int,
    *,
    max_norm: float,
    kernels: Kernels | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best rows of each query: scores (B, k) float32 and rows (B, k) int64, ties by row. `1 <= k <= N`.

    Args:
        rows_ND (`torch.Tensor`): Stored rows: float32, float16 or uint8, on any device.
        queries_BD (`torch.Tensor`): float32, on the same device.
        max_norm (`float`): No row is longer.
        kernels ([`Kernels`], *optional*): Torch's own by default.
    """
    import torch

    kernels = kernels or Kernels(group_maxima, score_again)
    parts = [_top_rows(rows_ND, batch, k, max_norm, kernels) for batch in queries_BD.split(MAX_BATCH, dim=0)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def _top_rows(
    rows_ND: torch.Tensor, queries_BD: torch.Tensor, k: int, max_norm: float, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    dim = rows_ND.shape[1]
    # A query of length 1 neither overflows in fp16 nor loses bits there; its scores are scaled back at the end.
    lengths_B1 = queries_BD.norm(dim=1, keepdim=True)
    lengths_B1 = torch.where(lengths_B1 > 0, lengths_B1, torch.ones_like(lengths_B1))
    unit_BD = queries_BD / lengths_B1
    rounded_BD = unit_BD.to(torch.float16) if rows_ND.is_cuda else unit_BD
    error_B = (rounded_BD.float() - unit_BD).norm(dim=1) * max_norm + 4 * dim * 2.0**-24 * max_norm

    maxima_BG = kernels.group_maxima(rows_ND, rounded_BD)
    take = min(k + MARGIN, maxima_BG.shape[1])
    groups_BT, missed_B = _best_groups(maxima_BG, take)
    del maxima_BG
    within = torch.arange(GROUP, device=rows_ND.device)
    candidates_BC = (groups_BT.sort(dim=1).values[:, :, None] * GROUP + within).flatten(1)
    scores_BC = kernels.score_again(rows_ND, unit_BD, candidates_BC)
    # Candidates are in row order and the sort is stable: equal scores stay by row.
    scores_BC, order_BC = scores_BC.sort(dim=1, descending=True, stable=True)
    best_BK, rows_BK = scores_BC[:, :k], candidates_BC.gather(1, order_BC[:, :k])
    sure_B = best_BK[:, -1] > missed_B + error_B
    doubtful = (~sure_B).nonzero().flatten().tolist()
    for query in doubtful:
        best_BK[query], rows_BK[query] = _every_row(rows_ND, unit_BD[query], k)
    return best_BK * lengths_B1, rows_BK


def group_maxima(rows_ND: torch.Tensor, queries_BD: torch.Tensor) -> torch.Tensor:
    """(B, ceil(N / GROUP)): the highest score in each group of rows, as float32."""
    import torch

    count, batch = len(rows_ND), len(queries_BD)
    maxima_BG = torch.empty((batch, math.ceil(count / GROUP)), dtype=torch.float32, device=rows_ND.device)
    block = max(GROUP, BLOCK_BYTES[rows_ND.device.type] // (4 * max(batch, 64)) // GROUP * GROUP)
    if not rows_ND.is_cuda:
        block = min(block, CPU_BLOCK_ROWS)
    for start in range(0, count, block):
        rows_CD = rows_ND[start : start + block]
        if rows_ND.is_cuda:
            # fp16 products, summed and written in fp32: a score rounded to fp16 ties with its neighbours.
            scores_BC = torch.mm(queries_BD, rows_CD.T, out_dtype=torch.float32)
        else:
            scores_BC = queries_BD @ rows_CD.float().T
        whole = len(rows_CD) // GROUP
        first = start // GROUP
        maxima_BG[:, first : first + whole] = scores_BC[:, : whole * GROUP].unflatten(1, (whole, GROUP)).amax(dim=2)
        if whole * GROUP < len(rows_CD):
            maxima_BG[:, first + whole] = scores_BC[:, whole * GROUP :].amax(dim=1)
    return maxima_BG


def score_again(rows_ND: torch.Tensor, queries_BD: torch.Tensor, candidates_BC: torch.Tensor) -> torch.Tensor:
    """(B, C) scores in fp32; the same sum for the same row wherever it stands. Beyond the last row: -inf."""
    import torch

    count, dim = rows_ND.shape
    at_once = max(1, SCORED_AGAIN[rows_ND.device.type] // (candidates_BC.shape[1] * dim))
    parts = []
    for queries_QD, candidates_QC in zip(queries_BD.split(at_once), candidates_BC.split(at_once), strict=True):
        rows_QCD = rows_ND[candidates_QC.clamp(max=count - 1)].float()
        parts.append(torch.linalg.vecdot(rows_QCD, queries_QD[:, None, :]))
    scores_BC = torch.cat(parts)
    return scores_BC.masked_fill_(candidates_BC >= count, -math.inf)


def _best_groups(maxima_BG: torch.Tensor, take: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `take` groups of highest maxima (B, take), and the highest maximum left out (B,). Among 300,000 groups the
    selection reads them once: it looks for the best groups of groups first."""
    import torch

    batch, groups = maxima_BG.shape
    if take == groups:
        everything = torch.arange(groups, device=maxima_BG.device).expand(batch, groups)
        return everything, torch.full((batch,), -math.inf, device=maxima_BG.device)
    wanted = take + 1
    if groups <= 4096 or groups <= 2 * wanted * GROUP:
        best = maxima_BG.topk(wanted, dim=1)
        return best.indices[:, :take], best.values[:, take]
    whole = groups // GROUP
    upper_BU = maxima_BG[:, : whole * GROUP].unflatten(1, (whole, GROUP)).amax(dim=2)
    upper = upper_BU.topk(min(wanted, whole), dim=1).indices
    within = torch.arange(GROUP, device=maxima_BG.device)
    tail = torch.arange(whole * GROUP, groups, device=maxima_BG.device).expand(batch, -1)
    candidates_BC = torch.cat([(upper[:, :, None] * GROUP + within).flatten(1), tail], dim=1)
    best = maxima_BG.gather(1, candidates_BC).topk(wanted, dim=1)
    return candidates_BC.gather(1, best.indices[:, :take]), best.values[:, take]


def _every_row(rows_ND: torch.Tensor, query_D: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best rows of one query, every row scored in fp32; equal rows tie."""
    import torch

    count, dim = rows_ND.shape
    block = max(GROUP, SCORED_AGAIN[rows_ND.device.type] // dim)
    scores_N = torch.empty(count, dtype=torch.float32, device=rows_ND.device)
    for start in range(0, count, block):
        rows_CD = rows_ND[start : start + block].float()
        scores_N[start : start + block] = torch.linalg.vecdot(rows_CD, query_D[None, :])
    best = scores_N.sort(descending=True, stable=True)
    return best.values[:k], best.indices[:k]


def dequantised(queries: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What to multiply one-byte codes with, (B, d), and what to add to the product, (B, 1)."""
    return queries * scale, (queries.astype(np.float64) @ offset.astype(np.float64))[:, None].astype(np.float32)
