"""Each of two ranks runs this for tests/policies/test_vllm_tensor_parallel.py, on vLLM's CPU build.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... \
        python -m tests.support.vllm_tensor_parallel_run FOLDER          # FOLDER contains model/; writes rank<r>.json

Greedy completions of prompts that differ per rank, from an engine that both ranks share and from the model itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM
from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators import cpu_communicator

from trl_search.policies.base import Policy
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.policies.vllm_tensor_parallel import VLLMTensorParallelPolicy, over_gloo
from trl_search.rollout import run_sync
from trl_search.types import Sampling


def generate(policy: Policy, prompts: list[list[int]]) -> Any:
    """Three turns per prompt; each continues all tokens before it."""

    async def trajectory(ids: list[int]) -> list[int]:
        for turn in range(3):
            completion = await policy.generate([*ids, 300 + turn], max_tokens=6, sampling=Sampling(temperature=0.0))
            ids = [*ids, 300 + turn, *completion.ids]
        return ids

    async def go() -> Any:
        await policy.open()
        try:
            return await asyncio.gather(*map(trajectory, prompts))
        finally:
            await policy.close()

    return run_sync(go())


def main(folder: Path) -> None:
    model = str(folder / "model")
    # The name of the ranks' shared memory: vLLM's default is the same for all engines of a machine.
    shared = f"trl-search-{os.environ['MASTER_PORT']}"
    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: shared)
    llm = LLM(
        model=model,
        tensor_parallel_size=2,
        distributed_executor_backend="external_launcher",
        max_model_len=256,
        dtype="float32",
        enforce_eager=True,
        enable_chunked_prefill=False,
        logprobs_mode="processed_logprobs",
    )
    rank, group = dist.get_rank(), get_tp_group()
    policy = VLLMTensorParallelPolicy(llm, rank=group.rank_in_group, exchange=over_gloo(group.cpu_group))
    # Rank 1 has fewer and longer prompts, so the ranks close the policy at different times.
    prompts = [[400 + 7 * rank + number] * (4 + 40 * rank) for number in range(5 - 3 * rank)]
    found = {"shared": generate(policy, prompts)}
    alone = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    found["alone"] = generate(TransformersPolicy(alone, AutoTokenizer.from_pretrained(model)), prompts)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    for left in Path("/dev/shm").glob(f"{shared}*"):
        left.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the engine's threads may not end cleanly
