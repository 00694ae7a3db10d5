from __future__ import annotations

import asyncio

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
    assert homes_of(*[["AB"] * 3] * 4) == [["A"] * 3, ["B"] * 3] * 2
    assert homes_of(*[[range(2)] * 2] * 2) == [[0, 0], [1, 1]]


def test_a_trajectory_moves_when_its_home_is_gone():
    assert homes_of(["AB", "B", "AB"], ["AB", "B", "AB"]) == [["A", "B", "B"], ["B", "B", "B"]]


def test_trajectories_that_ended_do_not_count():
    assert homes_of(["AB"], ["AB", "AB"]) == [["A"], ["B", "B"]]
    homes = Homes()

    async def one():
        return homes.choose("AB")

    assert [asyncio.run(one()) for _ in range(3)] == ["A", "A", "A"]
