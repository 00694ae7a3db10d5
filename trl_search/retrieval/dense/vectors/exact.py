"""Exact search with torch: over fp16 rows on GPUs, and over passages in memory on CPU.

Every row is scored, but only the k best are needed, and storing all B x N scores would cost more than computing them.
So rows form groups of 64 neighbours, and only the highest score of each group is stored:

    rows_ND ──► a block of products ──► maxima_BG ──► the best groups ──► their rows, scored again in fp32 ──► best k

If the maxima were exact, the k best rows would lie in the k groups with the highest maxima. They have a bounded error:
on a GPU the query is rounded to fp16, and sums are added in a different order than when a row is scored again. So a
few more groups than k are fetched, and a result is accepted if its k-th score exceeds the highest maximum that was
*not* fetched by more than the bound. If it does not (the corpus holds many near-duplicates), every row is scored in
fp32 for that query. So the results equal those of an fp32 search over the stored rows, with ties in order of the rows.
Compared with rows stored as fp32, recall@3 is .9997 for fp16 (`benchmarks/vector_index.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GROUP = 64
MARGIN = 8  # groups fetched beyond k
MAX_BATCH = 512
# Bytes of the products of one block, which must stay in the last-level cache until the maxima are taken. On CPU the
# block's rows, converted to fp32, must fit there too.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
CPU_BLOCK_ROWS = 4096
SCORED_AGAIN = {"cpu": 1 << 21, "cuda": 1 << 24}  # elements gathered at a time when rows are scored again


@dataclass(frozen=True)
class Kernels:
    """The two passes over rows: `group_maxima` and `score_again`, or their Triton versions (`gpu_kernel.py`)."""

    group_maxima: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    score_again: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def top_rows(
    rows_ND: torch.Tensor, queries_BD: torch.Tensor, k: int, *, max_norm: float, kernels: Kernels | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best rows of each query: scores (B, k) float32 and rows (B, k) int64, ties by row. `1 <= k <= N`. Rows
    are float32 or float16, queries float32, on the same device; `max_norm` is the largest norm of a row."""
    import torch

    kernels = kernels or Kernels(group_maxima, score_again)
    parts = [_top_rows(rows_ND, batch, k, max_norm, kernels) for batch in queries_BD.split(MAX_BATCH, dim=0)]
    return torch.cat([scores for scores, _ in parts]), torch.cat([rows for _, rows in parts])


def _top_rows(
    rows_ND: torch.Tensor, queries_BD: torch.Tensor, k: int, max_norm: float, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    dim = rows_ND.shape[1]
    # A query of norm 1 neither overflows in fp16 nor loses bits. Its scores are multiplied by its norm at the end.
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
    # Candidates are in order of the rows and the sort is stable, so equal scores stay in that order.
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
            # Sums stay in fp32: rounded to fp16, nearly equal scores would become equal.
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
    """(B, C) scores in fp32; -inf beyond the last row. Equal rows get equal scores, whatever their position."""
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
    """The `take` groups with the highest maxima (B, take), and the highest maximum that is left out (B,).

    With many groups, it first selects among groups of groups, so that all maxima are read only once."""
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
    """The `k` best rows of one query, found by scoring every row in fp32."""
    import torch

    count, dim = rows_ND.shape
    block = max(GROUP, SCORED_AGAIN[rows_ND.device.type] // dim)
    scores_N = torch.empty(count, dtype=torch.float32, device=rows_ND.device)
    for start in range(0, count, block):
        rows_CD = rows_ND[start : start + block].float()
        scores_N[start : start + block] = torch.linalg.vecdot(rows_CD, query_D[None, :])
    best = scores_N.sort(descending=True, stable=True)
    return best.values[:k], best.indices[:k]
