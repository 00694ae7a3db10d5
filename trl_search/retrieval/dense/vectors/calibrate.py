"""Measures recall@3 of an index against exact search, and finds the cheapest settings that reach a target.

Queries are made from the vectors with a seed: a random row plus three quarters of the difference of two others. Such a
query has the distribution of the vectors, and several rows are nearly equally close to it. A row plus isotropic noise
would be too easy: every index finds that row.

A row counts as found if its exact score is at least that of the third-best row, so any duplicate counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_search.common.errors import UserError
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.plans import SLICE_ROWS
from trl_search.retrieval.dense.vectors.search import VectorSearch

K = 3
QUERIES = 256
MEASURED_BYTES = 1 << 30  # the most codes that are searched to choose nprobe, which takes seconds
_TIE = 1e-6
_MOVE = 0.75  # at 0.5, recall on 1M synthetic vectors was .970, against .941 for queries of their own distribution
# Each value costs more than the previous one, by about the same factor.
_K_FACTORS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
_NPROBE_RECALL = 0.99  # the target for an index built elsewhere
_NPROBES = (4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512)
_EF_SEARCHES = (16, 32, 64, 128, 256, 512, 1024)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """Queries, and the exact score of the K-th best row for each."""

    queries: np.ndarray
    kth_scores: np.ndarray

    def recall(self, vectors_ND: np.ndarray, rows_QK: np.ndarray) -> float:
        """The share of the K best rows that `rows_QK` contains."""
        found = 0
        for query, rows, least in zip(self.queries, rows_QK, self.kth_scores, strict=True):
            unique = np.unique(rows[rows >= 0])
            scores = vectors_ND[unique].astype(np.float32) @ query
            found += min(int((scores >= least - _TIE * max(1.0, abs(float(least)))).sum()), K)
        return found / (len(self.queries) * min(K, len(vectors_ND)))


def find_truth(vectors_ND: np.ndarray, queries_QD: np.ndarray) -> Truth:
    """Exact search in one pass over all vectors."""
    k = min(K, len(vectors_ND))
    best = np.full((len(queries_QD), k), -np.inf, dtype=np.float32)
    faiss = faiss_module()
    for slice_ND in slices(vectors_ND):
        scores, _ = faiss.knn(queries_QD, slice_ND, min(k, len(slice_ND)), metric=faiss.METRIC_INNER_PRODUCT)
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :k]
    return Truth(queries_QD, best[:, -1])


def make_queries(vectors_ND: np.ndarray, seed: int) -> np.ndarray:
    """Rows, each moved by three quarters of the difference of two others and rescaled to its old length."""
    random = np.random.default_rng(seed)
    rows_3Q = random.integers(len(vectors_ND), size=(3, QUERIES))
    row, one, other = (np.asarray(vectors_ND[rows], dtype=np.float32) for rows in rows_3Q)
    moved = row + _MOVE * (one - other)
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.asarray(moved / np.where(length > 0, length, 1) * np.linalg.norm(row, axis=1, keepdims=True))


def calibrate(
    word: str, search: VectorSearch, index: Any, vectors_ND: np.ndarray, truth: Truth, target: float
) -> tuple[dict[str, int], float]:
    """Finds the cheapest settings of `index` whose recall@3 by `search` reaches `target`, else the most expensive, and
    applies them. Returns `(settings, recall)`."""
    ladders = _ladders(word, index)

    def measure(settings: dict[str, int]) -> float:
        apply_settings(index, settings)
        return truth.recall(vectors_ND, search.search(truth.queries, K)[1])

    # Start with the largest values, then lower each in turn to the smallest that still reaches the target.
    chosen = {name: ladder[-1] for name, ladder in ladders.items()}
    recall = measure(chosen)
    if recall < target:
        logger.warning(
            "%s reaches recall@3 %.3f on these vectors, not %.2f: its most expensive settings are used",
            word,
            recall,
            target,
        )
    else:
        for name, ladder in ladders.items():
            for value in ladder[:-1]:
                reached = measure({**chosen, name: value})
                if reached >= target:
                    chosen[name], recall = value, reached
                    break
    apply_settings(index, chosen)
    return chosen, recall


def _ladders(word: str, index: Any) -> dict[str, tuple[int, ...]]:
    """The values to try, by setting. `nprobe` comes first, because lists cost most."""
    if word == "small-ivf":
        lists = int(faiss_module().extract_index_ivf(index.base_index).nlist)
        return {
            "nprobe": (*(probe for probe in _NPROBES[:-1] if probe < lists), min(lists, _NPROBES[-1])),
            "k_factor": _K_FACTORS,
        }
    if word == "small":
        return {"k_factor": _K_FACTORS}
    return {"efSearch": _EF_SEARCHES} if word == "hnsw" else {}


def choose_nprobe(ivf: Any) -> tuple[int, float | None]:
    """Chooses how many lists to search of an IVF that was built elsewhere; FAISS' default is 1.

    Queries are made as in `make_queries`, but from the centroids of the lists: not every code can be decoded.

    Returns:
        `(nprobe, recall)`: the smallest value of a ladder whose recall@10, against a search of all lists, reaches .99.
        Above `MEASURED_BYTES`, or without access to the centroids: a sixteenth of the lists, and `None`.
    """
    lists, k = int(ivf.nlist), min(10, int(ivf.ntotal))
    unmeasured = min(lists, max(64, lists // 16)), None
    if not k or ivf.ntotal * ivf.code_size > MEASURED_BYTES:
        return unmeasured
    try:
        queries_QD = make_queries(ivf.quantizer.reconstruct_n(0, lists), 0)
    except RuntimeError:
        return unmeasured

    def scores(nprobe: int) -> np.ndarray:
        ivf.nprobe = nprobe
        found_QK = ivf.search(queries_QD, k)[0]
        return found_QK if ivf.metric_type == faiss_module().METRIC_INNER_PRODUCT else -found_QK

    least_Q1 = scores(lists)[:, -1:]
    least_Q1 = least_Q1 - _TIE * np.maximum(1.0, np.abs(least_Q1))
    for nprobe in (*(2**power for power in range(2, lists.bit_length()) if 2**power < lists), lists):
        recall = float((scores(nprobe) >= least_Q1).mean())
        if recall >= _NPROBE_RECALL:
            break
    return nprobe, recall


def find_ivf(index: Any) -> Any:
    """The IVF of an index, or of the base of a refined index; `None` if there is none."""
    faiss = faiss_module()
    base = getattr(index, "base_index", index)
    return faiss.try_extract_index_ivf(faiss.downcast_index(base))


def apply_settings(index: Any, settings: dict[str, int]) -> None:
    """Sets k_factor, nprobe and efSearch on the FAISS objects that hold them."""
    for name, value in settings.items():
        if name == "k_factor":
            index.k_factor = float(value)
        elif name == "nprobe":
            find_ivf(index).nprobe = int(value)
        else:
            index.hnsw.efSearch = int(value)


def slices(vectors_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the vectors in slices of contiguous float32. NaN and infinity are errors.

    Raises:
        UserError: if a vector is not finite.
    """
    for start in range(0, len(vectors_ND), SLICE_ROWS):
        slice_ND = np.ascontiguousarray(vectors_ND[start : start + SLICE_ROWS], dtype=np.float32)
        broken = np.flatnonzero(~np.isfinite(slice_ND).all(axis=1))
        if len(broken):
            raise UserError(f"vector {start + int(broken[0]):,} holds NaN or infinity: the encoder overflowed")
        yield slice_ND
