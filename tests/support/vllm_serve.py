"""`vllm serve` with a forked engine process, as on GPUs.

On CPUs vLLM ignores VLLM_WORKER_MULTIPROC_METHOD and spawns the engine, which then imports all of vLLM again: ten CPU
seconds at each start.

    python -m tests.support.vllm_serve serve MODEL --port 8000
"""

from __future__ import annotations

import multiprocessing

from vllm.entrypoints.cli.main import main
from vllm.v1.engine import utils

if __name__ == "__main__":
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    main()
