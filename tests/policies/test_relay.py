"""The relay: requests wait while no engine is attached, and every token has the version of its weights."""

from __future__ import annotations

import asyncio

import pytest

from trl_search.common.errors import UserError
from trl_search.policies.base import Policy
from trl_search.policies.relay import RelayPolicy
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.types import Completion, FinishReason, Sampling

ASK = {"max_tokens": 9, "sampling": Sampling()}


class Endless(Policy):
    """Answers only when it is interrupted, with two tokens."""

    def __init__(self, deaf_to: int = 0) -> None:
        self.requests, self.log, self.deaf_to = [], [], deaf_to

    async def open(self):
        self.log.append("open")

    async def close(self):
        self.log.append("close")

    async def interrupt(self):
        self.log.append("interrupt")
        await asyncio.sleep(0)
        if self.log.count("interrupt") > self.deaf_to:
            while self.requests:
                self.requests.pop().set_result(Completion((1, 2), (-0.1, -0.2), FinishReason.INTERRUPTED))
            await asyncio.sleep(0)

    async def generate(self, prompt_ids, **options):
        answer = asyncio.get_running_loop().create_future()
        self.requests.append(answer)
        return await answer


def test_requests_wait_for_an_engine_and_carry_its_version():
    async def go():
        relay, first, second = RelayPolicy(), Endless(), Endless()
        early = asyncio.create_task(relay.generate([1], **ASK))
        await asyncio.sleep(0)
        await relay.attach(first, 7)
        await asyncio.sleep(0)
        await relay.detach()
        late = asyncio.create_task(relay.generate([1], **ASK))
        await asyncio.sleep(0)
        assert early.done() and not late.done() and not first.requests
        await relay.attach(second, 8)
        await asyncio.sleep(0)
        await relay.detach()
        await relay.detach()
        return await early, await late, first.log, second.log

    early, late, first, second = asyncio.run(go())
    assert (early.versions, late.versions) == ((7, 7), (8, 8))
    # The first engine is interrupted once before it has any work.
    assert first == ["open", "interrupt", "interrupt", "close"] and second == ["open", "interrupt", "close"]


def test_a_request_that_reaches_the_server_after_the_interruption_is_interrupted_again():
    async def go():
        relay, engine = RelayPolicy(), Endless(deaf_to=3)
        await relay.attach(engine, 1)
        asked = asyncio.create_task(relay.generate([1], **ASK))
        await asyncio.sleep(0)
        await relay.detach()
        return await asked, engine.log.count("interrupt")

    completion, interruptions = asyncio.run(go())
    assert completion.versions == (1, 1) and interruptions == 4


def test_an_engine_that_cannot_be_interrupted_is_refused_at_the_start():
    class Deaf(Endless):
        async def interrupt(self):
            raise UserError("start it with VLLM_SERVER_DEV_MODE=1")

    async def go():
        relay, engine = RelayPolicy(), Deaf()
        asked = asyncio.create_task(relay.generate([1], **ASK))
        with pytest.raises(UserError, match="DEV_MODE"):
            await relay.attach(engine, 1)
        await relay.detach()
        asked.cancel()
        return engine

    engine = asyncio.run(go())
    assert engine.log == ["open", "close"] and not engine.requests


def test_an_interrupted_turn_equals_an_uninterrupted_one(random_model, tokenizer):
    """With the same weights, a greedy turn in three parts equals the turn in one part, including log-probs."""
    greedy, prompt = Sampling(temperature=0.0), [300, 400, 500]

    async def whole():
        policy = TransformersPolicy(random_model, tokenizer)
        policy.eos_token_ids = set()
        await policy.open()
        completion = await policy.generate(prompt, max_tokens=90, sampling=greedy)
        await policy.close()
        return completion

    async def in_parts():
        relay, sampled = RelayPolicy(), Completion((), (), FinishReason.INTERRUPTED)
        for version in range(3):
            policy = TransformersPolicy(random_model, tokenizer)
            policy.eos_token_ids = set()
            some = asyncio.Event()
            loop = asyncio.get_running_loop()
            policy.on_token = lambda ids, loop=loop, some=some: len(ids) < 9 or loop.call_soon_threadsafe(some.set)
            await relay.attach(policy, version)
            left = 90 - len(sampled.ids)
            asked = asyncio.create_task(relay.generate([*prompt, *sampled.ids], max_tokens=left, sampling=greedy))
            await (some.wait() if version < 2 else asked)
            await relay.detach()
            sampled = sampled.then(await asked)
        return sampled

    expected, found = asyncio.run(whole()), asyncio.run(in_parts())
    assert found.ids == expected.ids and found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert list(found.versions) == sorted(found.versions) and set(found.versions) == {0, 1, 2}
