from __future__ import annotations

import asyncio
from collections import Counter

from trl_search.policies.homes import Homes


def homes_of(*trajectories):
    """The homes of trajectories, each of which is a list of the homes that exist at its turns."""
    homes = Homes()

    async def trajectory(turns):
        chosen = []
        for among in turns:
            chosen.append(homes.choose(among))
            await asyncio.sleep(0)
        return chosen

    async def go():
        return await asyncio.gather(*map(trajectory, trajectories))

    return asyncio.run(go())


def test_a_trajectory_stays_and_new_ones_are_spread():
    chosen = homes_of(*[["AB"] * 3] * 4)
    assert sorted(chosen) == [["A"] * 3] * 2 + [["B"] * 3] * 2
    assert sorted(homes_of(*[[range(2)] * 2] * 2)) == [[0, 0], [1, 1]]


def test_a_trajectory_moves_when_its_home_is_gone():
    for first, then, last in homes_of(*[["AB", "B", "AB"]] * 4):
        assert first in "AB" and then == last == "B"


def test_trajectories_that_ended_do_not_count():
    for _ in range(20):
        (ended,), (first, second) = homes_of(["AB"], ["AB", "AB"])
        assert ended != first == second
    homes = Homes()

    async def one():
        return homes.choose("AB")

    assert {asyncio.run(one()) for _ in range(50)} == {"A", "B"}


def test_ranks_with_fewer_trajectories_than_homes_use_all_of_them():
    ranks = [homes_of(*[[range(16)]] * 4) for _ in range(32)]  # each rank knows only its own
    assert all(len({home for (home,) in chosen}) == 4 for chosen in ranks)
    counts = Counter(home for chosen in ranks for (home,) in chosen)
    assert len(counts) == 16 and max(counts.values()) < 24
