"""Turns of a trajectory on one engine of a data-parallel vLLM server, or on any of them: seconds, and cached tokens.

    python benchmarks/server_engines.py                                   # 2 GPUs, 512 trajectories of the 3B shape
    python benchmarks/server_engines.py --serve '--api-server-count 6'    # more options of `vllm serve`
    python benchmarks/server_engines.py --shape tiny --trajectories 32 --scale 0.1 --repeats 1     # CPUs, a smoke run

Each engine has its own prefix cache, which is emptied before each round. The trajectories follow a plan
(`vllm_shape.py`) and wait `--search_ms` for each search. "one engine" is what `VLLMServerPolicy` does: all requests of
a trajectory name the same engine. In "any engine" they name none, and the server chooses one per turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import torch
import vllm_shape
from kills import kill_with_descendants, vllm_environment
from vllm_shape import GROUP, Plan

from trl_search.policies.vllm_server import VLLMServerPolicy
from trl_search.types import Sampling

PROMPT_TOKENS = 150
HANGS_S = 600.0


@contextlib.contextmanager
def serving(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Runs `vllm serve` with random weights; yields its address once it answers."""
    model = vllm_shape.write_model_folder(folder / "model", arguments.shape)
    url = f"http://127.0.0.1:{arguments.port}"
    command = vllm_shape.serve_command(model, arguments.port, arguments.engines) + shlex.split(arguments.serve)
    if not torch.cuda.is_available():
        command += ["--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    environment = {**vllm_environment(folder), "VLLM_SERVER_DEV_MODE": "1"}
    # Settings of the tests' CPU engine that a server of several engines refuses.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)
    log = folder / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + HANGS_S
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"vllm serve did not start; its log ends:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        if process.poll() is None:
            kill_with_descendants(psutil.Process(process.pid))


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


async def roll_out(policy: VLLMServerPolicy, plans: list[Plan], search_s: float, names_engine: bool) -> float:
    """Seconds of one round."""
    await policy.open()
    if not names_engine:
        policy._engines = range(1)

    async def trajectory(plan: Plan) -> None:
        prompt, draw = random.Random(plan.index // GROUP), random.Random(plan.index)
        ids = prompt.choices(range(300, 1500), k=PROMPT_TOKENS)
        for turn, tokens in enumerate(plan.turns):
            sampling = Sampling(seed=draw.getrandbits(60))
            ids += (await policy.generate(ids, max_tokens=tokens, sampling=sampling)).ids
            if turn < len(plan.observations):
                await asyncio.sleep(search_s)
                ids += draw.choices(range(300, 1500), k=plan.observations[turn])

    started = time.perf_counter()
    await asyncio.gather(*(trajectory(plan) for plan in plans))
    seconds = time.perf_counter() - started
    await policy.close()
    return seconds


def counted(url: str) -> tuple[float, float]:
    """Prompt tokens of all engines since the start of the server: all, and those from the cache."""
    metrics = httpx.get(f"{url}/metrics").text
    queries, hits = (
        sum(map(float, re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)$", metrics, re.MULTILINE)))
        for name in ("queries", "hits")
    )
    return queries, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--shape", choices=list(vllm_shape.SHAPES), default="3b")
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--search_ms", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", default="", help="more options of `vllm serve`")
    parser.add_argument("--port", type=int, default=8_190)
    arguments = parser.parse_args()
    plans = vllm_shape.make_plans(arguments.trajectories, arguments.scale)
    print(f"{vllm_shape.describe(plans)}; {arguments.engines} engines\n{vllm_shape.describe_machine()}", flush=True)
    names = {"one engine": True, "any engine": False}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    shares: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, serving(arguments, Path(folder)) as url:
        policy = VLLMServerPolicy(url)
        asyncio.run(roll_out(policy, plans, 0.0, True))  # compiles kernels
        for _ in range(arguments.repeats):
            for name, names_engine in names.items():
                httpx.post(f"{url}/reset_prefix_cache", timeout=60).raise_for_status()
                queries, hits = counted(url)
                seconds[name].append(asyncio.run(roll_out(policy, plans, arguments.search_ms / 1000, names_engine)))
                after = counted(url)
                shares[name].append((after[1] - hits) / (after[0] - queries))
                print(f"{name}: {seconds[name][-1]:.1f} s, {shares[name][-1]:.3f} from the cache", flush=True)
    print("| turns of a trajectory | seconds (median) | share of prompt tokens from the cache |\n|---|---|---|")
    for name in names:
        low, high = min(seconds[name]), max(seconds[name])
        middle = statistics.median(seconds[name])
        print(f"| {name} | {middle:.1f} ({low:.1f}–{high:.1f}) | {statistics.median(shares[name]):.2f} |")


if __name__ == "__main__":
    main()
