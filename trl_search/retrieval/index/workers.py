"""The processes that build one index together: `accelerate launch -m trl_search index ...` starts one per GPU.

Worker r takes the shards with `shard % count == r`. Worker 0 also writes the corpus first and the index last. A single
process never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from trl_search.common.launched import launched_processes

LONGEST_WAIT = timedelta(days=7)  # the slowest process may read a corpus or encode for days


@dataclass(frozen=True)
class Workers:
    """This process among `count`, numbered by `rank`."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        """Waits until every process has called it."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


ALONE = Workers()


def launched_workers() -> Workers:
    """The processes that `accelerate launch` started, including this one. Makes this process's GPU torch's default."""
    if launched_processes() == 1:
        return ALONE
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=LONGEST_WAIT)
    return Workers(state.process_index, state.num_processes)
