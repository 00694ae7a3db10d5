"""Two gloo processes: one dies, and the other, which would wait forever, ends too and says why."""

from __future__ import annotations

import pytest

from tests.support.two_ranks import start_ranks, wait_for_ranks
from trl_search.trainer.rank_watch import ending_together


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        (
            "killed",
            [1, -9],
            "rank 0 ends: rank 1 has sent no heartbeat for 1 s: it was killed, or its host is gone\n",
        ),
        ("killed_at_once", [1, -9], "rank 0 ends: rank 1 has sent no heartbeat for 1 s"),
        ("raises", [1, 1], "rank 0 ends: rank 1 failed: MemoryError: rank 1 is full"),
        ("together", [1, 1], "MemoryError: rank 0 is full"),
        ("finishes", [0, 0], ""),
        ("again", [0, 0], ""),
    ],
)
def test_if_one_rank_dies_all_ranks_end(tmp_path, how, codes, said):
    assert wait_for_ranks(start_ranks("tests.support.dying_rank", [how], tmp_path), tmp_path) == codes
    log = (tmp_path / "rank0.log").read_text()
    assert said in log
    assert ("rank 0 ends" in log) == (how in ("killed", "killed_at_once", "raises"))


def test_a_single_process_is_not_watched():
    with ending_together(0, 1):
        pass
