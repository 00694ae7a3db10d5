"""Ends all ranks within a minute when one rank dies; each prints which one died and why.

Otherwise the others would wait in a collective operation until NCCL's timeout (half an hour by default) or, between
hosts, forever. On every rank, a thread writes a heartbeat to the ranks' rendezvous store and reads those of the
others:

    beat/3    "17"                        grows every two seconds
    failed/3  "OutOfMemoryError: …"       the exception that ended rank 3
    done/3    "1"                         rank 3 has left the training loop without an error

Each training of a process has its own keys, because a rank may begin the next one before the others have seen that it
left the last.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

BEAT_S = 2.0
# After this long without a heartbeat a rank counts as dead. No C code holds Python's GIL nearly as long.
SILENCE_S = 45.0
# An error on one rank often occurs on all, so each rank gets this long to report its own.
GRACE_S = 10.0
_TRAININGS = itertools.count()  # of this process; the same on all ranks, which begin each one together


@contextlib.contextmanager
def ending_together(
    rank: int, ranks: int, *, silence_s: float = SILENCE_S, grace_s: float = GRACE_S, beat_s: float = BEAT_S
) -> Iterator[None]:
    """Within the context, the death of another rank ends this process."""
    if ranks == 1:
        yield
        return
    watch = _Watch(rank, ranks, silence_s, grace_s, beat_s)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.leave("failed", f"{type(error).__name__}: {error}")
        raise
    watch.leave("done", "1")
    watch.wait_for_the_others()


class _Watch:
    def __init__(self, rank: int, ranks: int, silence_s: float, grace_s: float, beat_s: float) -> None:
        self.rank, self.silence_s, self.grace_s, self.beat_s = rank, silence_s, grace_s, beat_s
        self.others = [other for other in range(ranks) if other != rank]
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def start(self) -> None:
        torch.distributed.barrier()
        # A separate connection, because a main thread that waits on the store would block the heartbeat.
        met: Any = _get_default_store()
        self.store: Any = torch.distributed.PrefixStore(f"trl-search/ranks/{next(_TRAININGS)}", met.clone())
        self.thread.start()

    def leave(self, name: str, text: str) -> None:
        self.left.set()
        self.thread.join()
        with contextlib.suppress(RuntimeError):  # the store may have died with the rank that hosts it
            self.store.set(f"{name}/{self.rank}", text)

    def wait_for_the_others(self) -> bool:
        """Keeps this process alive until the other ranks have left, because it may host the store.

        Returns:
            Whether they have left; False after `silence_s`, or if the store is gone.
        """
        deadline = time.monotonic() + self.silence_s
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if all(
                    self.store.check([f"done/{other}"]) or self.store.check([f"failed/{other}"])
                    for other in self.others
                ):
                    return True
                time.sleep(0.05)
        return False

    def _run(self) -> None:
        beats = 0
        heard: dict[int, tuple[bytes, float]] = {}
        while not self.left.wait(self.beat_s):
            try:
                beats += 1
                self.store.set(f"beat/{self.rank}", str(beats))
                problem = self._problem(heard)
            except RuntimeError as error:
                problem = f"the process that hosts the rendezvous store has died ({error})"
            if problem:
                self._end(problem)
                return

    def _problem(self, heard: dict[int, tuple[bytes, float]]) -> str:
        read: Callable[[str], bytes] = self.store.get
        now = time.monotonic()
        for other in self.others:
            if self.store.check([f"failed/{other}"]):
                return f"rank {other} failed: {read(f'failed/{other}').decode()}"
            if self.store.check([f"done/{other}"]):
                continue
            # A rank may die before its first heartbeat.
            beat = read(f"beat/{other}") if self.store.check([f"beat/{other}"]) else b""
            if other not in heard or heard[other][0] != beat:
                heard[other] = (beat, now)
            elif now - heard[other][1] > self.silence_s:
                said = f"rank {other} has sent no heartbeat for {self.silence_s:.0f} s"
                return f"{said}: it was killed, or its host is gone"
        return ""

    def _end(self, problem: str) -> None:
        if self.left.wait(self.grace_s):
            return
        print(f"rank {self.rank} ends: {problem}", file=sys.stderr, flush=True)
        os._exit(1)  # no exception can reach the main thread, which waits in a collective operation
