"""The GPU search on CPU tensors: exactness and its certificate, shards, the preflight, the kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from trl_search.common.errors import UserError
from trl_search.retrieval.base import RetrievalError
from trl_search.retrieval.dense.vectors import build_vectors, exact, gpu, open_vectors
from trl_search.retrieval.dense.vectors import open as open_module
from trl_search.retrieval.dense.vectors.exact import GROUP, Kernels, group_maxima, score_again, top_rows
from trl_search.retrieval.dense.vectors.gpu import (
    TorchSearch,
    check_gpu_memory,
    merge,
    split_rows,
    transfer,
    work_bytes,
)

CPU = torch.device("cpu")


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


def ranked(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), axis=1, kind="stable")[:, :k]


# Less than one group; whole groups; a last group of one row; groups of groups with a remainder.
@pytest.mark.parametrize("count", [3, 640, 10 * GROUP + 1, 4100 * GROUP + 70])
@pytest.mark.parametrize("k", [1, 3])
def test_search_finds_the_rows_of_an_fp32_search(count, k):
    rows = unit(count, 16, seed=0).astype(np.float16)
    queries = 5 * unit(6, 16, seed=1)
    scores, found = top_rows(torch.from_numpy(rows), torch.from_numpy(queries), k, max_norm=1.01)
    expected = ranked(rows, queries, k)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_allclose(scores[:, 0], (rows[expected[:, 0]].astype(np.float32) * queries).sum(1), rtol=1e-5)


def blurred(rows_ND: torch.Tensor, queries_BD: torch.Tensor) -> torch.Tensor:
    """Maxima with the largest error from rounding queries to fp16, in the worst direction."""
    noise = torch.rand(group_maxima(rows_ND, queries_BD).shape, generator=torch.Generator().manual_seed(0))
    return group_maxima(rows_ND, queries_BD) + 1e-4 * (noise - 0.5)


def test_queries_without_a_certificate_are_searched_in_full(monkeypatch):
    searched: list[int] = []
    every_row = exact._every_row

    def counted(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        searched.append(1)
        return every_row(*arguments)

    monkeypatch.setattr(exact, "_every_row", counted)
    # Every group has a copy of the same row, so groups that are not fetched always have an equal score.
    rows = unit(200 * GROUP, 32, seed=0)
    rows[5::GROUP] = rows[5]
    queries = torch.from_numpy(np.concatenate([rows[5:6], unit(3, 32, seed=1)]))
    for kernels in (None, Kernels(blurred, score_again)):
        searched.clear()
        _, found = top_rows(torch.from_numpy(rows), queries, 3, max_norm=1.01, kernels=kernels)
        assert found[0].tolist() == [5, 5 + GROUP, 5 + 2 * GROUP]
        np.testing.assert_array_equal(found[1:].numpy(), ranked(rows, queries[1:].numpy(), 3))
        assert len(searched) == 1


def test_queries_of_zeros_and_of_huge_numbers_have_results():
    rows = unit(500, 32, seed=0).astype(np.float16)
    queries = np.stack([np.zeros(32), 1e6 * rows[3].astype(np.float32)]).astype(np.float32)
    scores, found = top_rows(torch.from_numpy(rows), torch.from_numpy(queries), 3, max_norm=1.01)
    assert found[0].tolist() == [0, 1, 2] and found[1, 0] == 3
    assert torch.isfinite(scores).all()


def test_shards_give_the_same_results_as_one_index():
    vectors = unit(5000, 48, seed=0)
    vectors[[100, 2600, 4999]] = vectors[7]
    queries = np.concatenate([vectors[7:8], unit(20, 48, seed=1)])
    shards = [transfer(vectors[first:last], first, CPU) for first, last in split_rows(5000, 3)]
    search = TorchSearch(shards)
    scores, rows = search.search(queries, 4)
    assert rows[0].tolist() == [7, 100, 2600, 4999]
    np.testing.assert_array_equal(rows, ranked(vectors.astype(np.float16), queries, 4))
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    assert (search.count, search.dim, sum(shard.rows_ND.nbytes for shard in search.shards)) == (
        5000,
        48,
        5000 * 48 * 2,
    )
    with ThreadPoolExecutor(4) as pool:
        for _, again in pool.map(lambda _: search.search(queries, 4), range(8)):
            np.testing.assert_array_equal(again, rows)
    assert search.search(queries[:1], 6000)[1][0, 5000:].tolist() == [-1] * 1000
    search.close()
    search.close()
    with pytest.raises(RetrievalError, match="closed"):
        search.search(queries, 1)


def test_rows_are_distributed_evenly():
    assert split_rows(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert split_rows(2, 4) == [(0, 1), (1, 2)]


def test_a_transfer_converts_one_slice_at_a_time(monkeypatch):
    monkeypatch.setattr(gpu, "SLICE_ROWS", 100)
    made: list[int] = []
    half = torch.Tensor.half

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        made.append(len(tensor))
        return half(tensor)

    monkeypatch.setattr(torch.Tensor, "half", noted)
    vectors = unit(1050, 24, seed=0)
    shard = transfer(vectors, 0, CPU)
    assert made == [100] * 10 + [50]
    np.testing.assert_array_equal(shard.rows_ND.numpy(), vectors.astype(np.float16))
    assert shard.max_norm == pytest.approx(1, abs=1e-3)
    vectors[1049, 0] = 1e6
    with pytest.raises(UserError, match=r"at or after row 1,000 .* too large for fp16"):
        transfer(vectors, 0, CPU)


def test_the_preflight_reports_needed_and_free_memory():
    wiki = 21_000_000, 768
    check_gpu_memory(*wiki, [80 << 30], ram_bytes=16 << 30)
    check_gpu_memory(*wiki, [20 << 30] * 2, ram_bytes=16 << 30)
    with pytest.raises(UserError, match=r"need 32\.3 GB, plus 1\.\d GB .* each of 1 GPUs, but GPU 0 has 25\.8 GB"):
        check_gpu_memory(*wiki, [24 << 30], ram_bytes=16 << 30)
    with pytest.raises(UserError, match=r"need 16\.1 GB, .* but GPU 1 has 8\.6 GB free.*device='cpu'"):
        check_gpu_memory(*wiki, [80 << 30, 8 << 30], ram_bytes=16 << 30)
    with pytest.raises(UserError, match=r"host's memory, 0\.1 GB are free"):
        check_gpu_memory(*wiki, [80 << 30], ram_bytes=100 << 20)
    assert work_bytes(*wiki) < 0.1 * 21_000_000 * 768 * 2


def test_results_of_shards_merge_by_score_then_row():
    one = np.array([[3.0, 1.0]]), np.array([[4, 2]])
    other = np.array([[3.0, -9.0]]), np.array([[1, -1]])
    scores, rows = merge([one, other], 4)
    assert rows.tolist() == [[1, 4, 2, -1]] and scores.tolist() == [[3, 3, 1, -np.inf]]


def test_the_device_is_chosen_by_free_memory(tmp_path, monkeypatch, caplog):
    vectors = unit(300, 32, seed=0)
    build_vectors(tmp_path, vectors, index="flat")
    moved: list[str] = []

    def on_cpu(rows: np.ndarray) -> TorchSearch:
        moved.append(str(rows.dtype))
        return TorchSearch([transfer(rows, 0, CPU)])

    monkeypatch.setattr(open_module, "open_on_gpus", on_cpu)
    monkeypatch.setattr(open_module, "free_gpu_bytes", lambda: [8 << 30])
    assert open_vectors(tmp_path).search(vectors[:2], 1)[1].tolist() == [[0], [1]]
    assert moved == ["float32"]
    monkeypatch.setattr(open_module, "free_gpu_bytes", lambda: [1 << 20])
    assert not isinstance(open_vectors(tmp_path), TorchSearch)
    assert "searching on CPU: 300 x 32 in fp16 need" in caplog.text
    build_vectors(tmp_path, vectors, index="small")
    with pytest.raises(UserError, match="only flat and fp16"):
        open_vectors(tmp_path, device="cuda")
    monkeypatch.setattr(open_module, "free_gpu_bytes", lambda: [])
    with pytest.raises(UserError, match="finds no GPU"):
        open_vectors(tmp_path, device="cuda")
    with pytest.raises(UserError, match="not 'tpu'"):
        open_vectors(tmp_path, device="tpu")


KERNELS = """
import torch
from trl_search.retrieval.dense.vectors.exact import group_maxima, score_again
from trl_search.retrieval.dense.vectors.gpu_kernel import fused_group_maxima, fused_scores
torch.manual_seed(0)
for count, dim, batch in ((130, 72, 3), (260, 64, 130), (1500, 16, 70)):
    rows, queries = torch.randn(count, dim).half(), torch.randn(batch, dim).half()
    torch.testing.assert_close(fused_group_maxima(rows, queries), group_maxima(rows.float(), queries.float()))
    candidates = torch.randint(count + 9, (batch, 21))
    again = score_again(rows, queries.float(), candidates)
    torch.testing.assert_close(fused_scores(rows, queries.float(), candidates), again)
"""


def test_the_kernels_compute_what_torch_does():
    pytest.importorskip("triton", "3.9", reason="Triton comes with torch for CUDA; older versions lack the loop")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_search_on_a_gpu():
    check_on([torch.device("cuda", 0)])


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_search_on_two_gpus():
    check_on([torch.device("cuda", 0), torch.device("cuda", 1)])


def check_on(devices: list[torch.device]) -> None:
    vectors, queries = unit(300_000, 768, seed=0), unit(600, 768, seed=1)
    parts = split_rows(len(vectors), len(devices))
    shards = (transfer(vectors[a:b], a, device) for (a, b), device in zip(parts, devices, strict=True))
    search = TorchSearch(list(shards))
    expected = ranked(vectors.astype(np.float16), queries, 3)
    for batch in (1, 20, 600):
        assert (search.search(queries[:batch], 3)[1] == expected[:batch]).mean() > 0.999
    assert sum(shard.rows_ND.nbytes for shard in search.shards) == 300_000 * 768 * 2


@pytest.mark.parametrize("dim", [768, 1000])
@pytest.mark.parametrize("batch", [1, 64, 512])
def test_the_maxima_compile_for_a_hopper_gpu_and_fit_it(batch, dim):
    """Compiled ahead of time, so no GPU is needed: Triton includes the compiler for every target."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    from trl_search.retrieval.dense.vectors import gpu_kernel

    queries, rows, warps, stages = gpu_kernel.choose_tile(batch)
    part = gpu_kernel.TILE_DIM
    constants = {"DIM": dim, "GROUP_ROWS": GROUP, "TILE_ROWS": rows, "TILE_QUERIES": queries, "TILE_DIM": part}
    tensors = {name: f"tensordesc<fp16[{size},{part}]>" for name, size in (("rows", rows), ("queries", queries))}
    numbers = dict.fromkeys(["count", "batch", "groups", "query_tiles", "tiles"], "i32")
    shared = compiled_for_hopper(
        gpu_kernel._maxima_of_tiles,
        {**tensors, "maxima": "*fp32", **numbers},
        constants,
        num_warps=warps,
        num_stages=stages,
    )
    # Each stage of the pipeline holds a block of rows and a block of queries.
    assert (stages - 1) * 2 * part * (rows + queries) <= shared <= gpu_kernel.SHARED_BYTES


@pytest.mark.parametrize("dim", [384, 768])
def test_the_scores_compile_for_a_hopper_gpu(dim):
    triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    from trl_search.retrieval.dense.vectors import gpu_kernel

    types = {"rows": "*fp16", "queries": "*fp32", "candidates": "*i64", "scores": "*fp32"}
    constants = {"DIM": dim, "WIDTH": triton.next_power_of_2(dim), "AT_ONCE": gpu_kernel.SCORED_AT_ONCE}
    numbers = {"count": "i32", "per_query": "i32"}
    assert compiled_for_hopper(gpu_kernel._scores_of_candidates, {**types, **numbers}, constants) < 16 << 10


def compiled_for_hopper(kernel, types: dict[str, str], constants: dict[str, int], **options: int) -> int:
    """Compiles a kernel and returns the shared memory that a tile needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items() if kind.startswith("*")
        },
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return int(compiled.metadata.shared)
