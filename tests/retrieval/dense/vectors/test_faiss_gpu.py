"""Exact search with faiss-gpu, with FAISS's CPU indexes in place of the indexes of two GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.dense.vectors import build_vectors, faiss_gpu, open_vectors
from trl_search.retrieval.dense.vectors import open as open_module
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module

DIM = 16


class Resources:
    def setTempMemory(self, size: int) -> None:
        self.size = size


class Config:
    device: int
    useFloat16: bool


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """Imitates FAISS on a host with two GPUs, and records the indexes that are made and their GPUs."""
    faiss = faiss_module()
    made: list[tuple[int, Any]] = []

    def flat(resources: Resources, dim: int, config: Config) -> Any:
        assert resources.size > 0 and config.useFloat16
        made.append((config.device, faiss.IndexFlatIP(dim)))
        return made[-1][1]

    parts = {"StandardGpuResources": Resources, "GpuIndexFlatConfig": Config, "GpuIndexFlatIP": flat}
    for name, value in {"get_num_gpus": lambda: 2, **parts}.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr(open_module, "free_gpu_bytes", lambda: [1 << 40, 1 << 40])
    monkeypatch.setattr(faiss_gpu, "SHARD_ROWS", 100)
    return made


@pytest.fixture
def vectors() -> np.ndarray:
    drawn = np.random.default_rng(0).standard_normal((500, DIM)).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


@pytest.mark.parametrize("word", ["flat", "fp16"])
def test_rows_are_distributed_over_the_gpus_and_found(word, two_gpus, vectors, tmp_path):
    build_vectors(tmp_path, vectors, index=word)
    search = open_vectors(tmp_path, gpu_engine="faiss")
    assert [(gpu, index.ntotal) for gpu, index in two_gpus] == [
        (0, 100),
        (0, 100),
        (0, 50),
        (1, 100),
        (1, 100),
        (1, 50),
    ]
    queries = vectors[::50] + 0.01
    scores, rows = search.search(queries, 120)  # more than one index can return
    expected = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(rows[:, :3], expected)
    assert rows.shape == (10, 120) and (np.diff(scores, axis=1) <= 0).all() and len(set(rows[0])) == 120
    assert (search.dim, search.count) == (DIM, 500)
    search.close()
    with pytest.raises(RetrievalError, match="closed"):
        search.search(queries, 3)


def test_impossible_options_are_refused(vectors, tmp_path):
    build_vectors(tmp_path, vectors, index="flat")
    with pytest.raises(UserError, match=r"needs FAISS for GPUs.*trl-search\[faiss-gpu\]"):
        open_vectors(tmp_path, gpu_engine="faiss")
    with pytest.raises(UserError, match="device='cpu' excludes them"):
        open_vectors(tmp_path, gpu_engine="faiss", device="cpu")
    with pytest.raises(UserError, match="gpu_engine is 'torch' or 'faiss', not 'cuda'"):
        open_vectors(tmp_path, gpu_engine="cuda")


def test_an_approximate_index_is_refused(two_gpus, vectors, tmp_path):
    build_vectors(tmp_path, vectors, index="hnsw")
    with pytest.raises(UserError, match="only flat and fp16 indexes"):
        open_vectors(tmp_path, gpu_engine="faiss")
