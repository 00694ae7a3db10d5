"""`vllm serve` whose engine is forked from it, as on GPUs.

On CPUs vLLM spawns the engine, whatever VLLM_WORKER_MULTIPROC_METHOD says, and a spawned one imports all of vLLM
again: ten CPU seconds at each start.

    python -m tests.support.vllm_serve serve MODEL --port 8000
"""

from __future__ import annotations

import multiprocessing

from vllm.entrypoints.cli.main import main
from vllm.v1.engine import utils

if __name__ == "__main__":
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    main()
