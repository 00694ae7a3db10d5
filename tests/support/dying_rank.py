"""Each of two ranks runs this for tests/trainer/test_rank_watch.py; the argument says how rank 1 ends.

python -m tests.support.dying_rank killed|killed_at_once|raises|together|finishes|again
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch.distributed

from trl_search.trainer.rank_watch import _Watch, ending_together


def train_again_and_again(rank: int) -> None:
    """Each rank begins the next training as soon as it has seen that the other left the last one."""
    left: list[bool] = []
    theirs = _Watch.wait_for_the_others

    def recorded(watch: _Watch) -> bool:
        left.append(theirs(watch))
        return left[-1]

    _Watch.wait_for_the_others = recorded  # type: ignore[method-assign]
    for _ in range(20):
        with ending_together(rank, 2, silence_s=5.0, beat_s=0.1):
            pass
    assert len(left) == 20 and all(left[:-1])  # rank 0, which hosts the store, may be gone after the last


def main(how: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if how == "again":
        return train_again_and_again(rank)
    beat_s = 60.0 if how == "killed_at_once" and rank == 1 else 0.1  # 60: it is killed before its first heartbeat
    with ending_together(rank, 2, silence_s=1.0, grace_s=0.5, beat_s=beat_s):
        if how == "finishes":
            return
        if how == "together" or (how == "raises" and rank == 1):
            raise MemoryError(f"rank {rank} is full")
        if how == "killed" and rank == 1:
            threading.Event().wait(0.5)  # rank 0 has seen it before
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "killed_at_once" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # like a rank that waits inside NCCL


if __name__ == "__main__":
    main(sys.argv[1])
