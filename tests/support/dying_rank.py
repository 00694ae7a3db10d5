"""Each of two ranks runs this for tests/trainer/test_rank_watch.py; the argument says how rank 1 ends.

python -m tests.support.dying_rank killed|raises|together|finishes
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch.distributed

from trl_search.trainer.rank_watch import ending_together


def main(how: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    with ending_together(rank, 2, silence_s=1.0, grace_s=0.5, beat_s=0.1):
        if how == "finishes":
            return
        if how == "together" or (how == "raises" and rank == 1):
            raise MemoryError(f"rank {rank} is full")
        if how == "killed" and rank == 1:
            threading.Event().wait(0.5)  # rank 0 has seen it before
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # like a rank that waits inside NCCL


if __name__ == "__main__":
    main(sys.argv[1])
