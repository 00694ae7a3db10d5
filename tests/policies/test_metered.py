"""The bubble is the share of the rollout with fewer than a quarter of the slots busy; the tests set the clock."""

from __future__ import annotations

import asyncio

import pytest

from trl_search.policies.base import Policy
from trl_search.policies.metered import MeteredPolicy
from trl_search.types import Completion, FinishReason, Sampling


class Held(Policy):
    """Answers a request when the test tells it to."""

    def __init__(self, slots=None):
        self.slots = slots
        self.open_requests = []

    async def generate(self, prompt_ids, **options):
        answer = asyncio.get_running_loop().create_future()
        self.open_requests.append(answer)
        return await answer

    async def finish(self, count):
        for _ in range(count):
            self.open_requests.pop().set_result(Completion((1,), (-0.5,), FinishReason.EOS))
        await asyncio.sleep(0)
        await asyncio.sleep(0)


# 8 requests for 6 s, then 2 for 3 s, then 1 for 1 s.
@pytest.mark.parametrize(("slots", "bubble"), [(8, 0.1), (9, 0.4), (64, 1.0)])
def test_the_bubble_counts_time_with_under_a_quarter_of_the_slots_busy(slots, bubble):
    assert measured(slots=slots, policy=Held()) == pytest.approx(bubble)


def test_an_engine_with_fewer_slots_than_trajectories_is_full_while_others_queue():
    assert measured(slots=64, policy=Held(slots=4)) == 0.0


def measured(*, slots, policy):
    now = 0.0
    metered = MeteredPolicy(policy, slots=slots, clock=lambda: now)

    async def rollout():
        nonlocal now
        await metered.open()
        turns = [asyncio.create_task(metered.generate([1], max_tokens=1, sampling=Sampling())) for _ in range(8)]
        await asyncio.sleep(0)
        for seconds, finished in ((6.0, 6), (3.0, 1), (1.0, 1)):
            now += seconds
            await policy.finish(finished)
        await asyncio.gather(*turns)
        await metered.close()

    asyncio.run(rollout())
    return metered.bubble
