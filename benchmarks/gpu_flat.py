"""Exact fp16 search on one GPU, compared with the time to read all rows once.

    python benchmarks/gpu_flat.py                                     # 21,000,000 x 768 random vectors on an H200
    python benchmarks/gpu_flat.py --count 20000 --batches 1 16        # a smoke run on CPU tensors, no GPU needed

The rows are normal vectors scaled to length 1, made on the GPU, and the same for every engine. "bound" is their bytes
divided by `--bandwidth_tb_s`; "products" is the time of the multiplications at `--tflops`, the higher bound from a
batch of about 250 on. Times are medians of `--repeats` calls of the public `search` after two warm-up calls, with
queries and results in host memory. "recall@3" is against fp32 scores of all rows for 16 of the queries.

Engines: torch with the fused kernels, torch without them, and `--engines faiss` where faiss-gpu is installed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

from trl_search.retrieval.dense.vectors import gpu
from trl_search.retrieval.dense.vectors.exact import top_rows
from trl_search.retrieval.dense.vectors.faiss_gpu import open_with_faiss, require_faiss_gpu

K = 3
CHECKED = 16
SLICE_ROWS = 262_144
Search = Callable[[np.ndarray], np.ndarray]


def make_rows(count: int, dim: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    rows_ND = torch.empty((count, dim), dtype=torch.float16, device=device)
    for part in rows_ND.split(SLICE_ROWS):
        drawn = torch.randn(part.shape, generator=generator, device=device)
        part.copy_(drawn / drawn.norm(dim=1, keepdim=True))
    return rows_ND


def exact_scores(rows_ND: torch.Tensor, queries: np.ndarray) -> np.ndarray:
    """The K-th best fp32 score of each query."""
    queries_BD = torch.from_numpy(queries).to(rows_ND.device)
    best = torch.full((len(queries), K), -torch.inf, device=rows_ND.device)
    for part in rows_ND.split(SLICE_ROWS):
        best = torch.cat([best, queries_BD @ part.float().T], dim=1).topk(K, dim=1).values
    return best[:, -1].cpu().numpy()


def engines(rows_ND: torch.Tensor, wanted: list[str]) -> dict[str, Callable[[], Search]]:
    """The engines that can run here; each is created only when it is measured, because two may not fit."""

    def torch_search(*, fused: bool) -> Search:
        kernels = gpu.fused_kernels(rows_ND) if fused else None

        def search(queries: np.ndarray) -> np.ndarray:
            queries_BD = torch.from_numpy(queries).to(rows_ND.device)
            return top_rows(rows_ND, queries_BD, K, max_norm=1.01, kernels=kernels)[1].cpu().numpy()

        return search

    def faiss_search() -> Search:
        index = open_with_faiss(rows_ND.cpu().numpy())  # FAISS takes host memory
        return lambda queries: index.search(queries, K)[1]

    found: dict[str, Callable[[], Search]] = {"torch": lambda: torch_search(fused=False)}
    if gpu.fused_kernels(rows_ND) is not None:
        found = {"torch, fused kernels": lambda: torch_search(fused=True), **found}
    if "faiss" in wanted:
        require_faiss_gpu()
        found["faiss-gpu"] = faiss_search
    return {name: make for name, make in found.items() if name.split(",")[0].removesuffix("-gpu") in wanted}


def measure(search: Search, queries: np.ndarray, device: torch.device, repeats: int) -> tuple[float, np.ndarray, int]:
    """Median seconds, the rows found, and the peak of additional GPU memory."""
    for _ in range(2):
        rows = search(queries)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        rows = search(queries)
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return statistics.median(times), rows, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=21_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--engines", nargs="+", choices=("torch", "faiss"), default=["torch"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--bandwidth_tb_s", type=float, default=4.3, help="bandwidth of the GPU's memory (default: an H200's)"
    )
    parser.add_argument(
        "--tflops", type=float, default=989, help="rate of fp16 products with fp32 sums (default: an H200's)"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a smoke run"
    if device.type == "cuda":
        gpu.check_gpu_memory(arguments.count, arguments.dim, [torch.cuda.mem_get_info(device)[0]])
    rows_ND = make_rows(arguments.count, arguments.dim, device)
    queries = np.random.default_rng(1).standard_normal((max(arguments.batches), arguments.dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    kth = exact_scores(rows_ND, queries[:CHECKED])
    bound_s = rows_ND.nbytes / (arguments.bandwidth_tb_s * 1e12)
    print(f"{name}: {arguments.count:,} x {arguments.dim} fp16, {rows_ND.nbytes / 1e9:.1f} GB; k = {K}\n")
    print("| engine | batch | ms | bound ms | x bound | products ms | q/s | recall@3 | scratch GB |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for engine, make in tqdm(engines(rows_ND, arguments.engines).items(), disable=None):
        search = make()
        for batch in arguments.batches:
            asked = queries[:batch]
            seconds, rows, scratch = measure(search, asked, device, arguments.repeats)
            checked = min(batch, CHECKED)
            found = rows_ND[torch.from_numpy(rows[:checked]).to(device)].float().cpu().numpy()
            scores = np.einsum("bkd,bd->bk", found, asked[:checked])
            recall = float((scores >= kth[:checked, None] - 1e-6).mean())
            products_s = 2 * arguments.count * arguments.dim * batch / (arguments.tflops * 1e12)
            print(
                f"| {engine} | {batch} | {seconds * 1e3:.2f} | {bound_s * 1e3:.2f} | {seconds / bound_s:.1f} | "
                f"{products_s * 1e3:.2f} | {batch / seconds:.0f} | {recall:.3f} | {scratch / 1e9:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
