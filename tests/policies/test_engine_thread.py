"""The engine's thread: requests arrive, finish, fail and are cancelled between steps."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trl_search.policies.engine_thread import EngineThread
from trl_search.types import Completion, FinishReason, Sampling


class CountingEngine(EngineThread):
    """Answers a prompt (n, ...) after n steps. It refuses prompts that begin with 0, and breaks at those with -1."""

    def __init__(self):
        super().__init__()
        self.left, self.dropped, self.stopped_with = {}, [], None
        self.gate = threading.Event()

    def add(self, request):
        if request.prompt_ids[0] == 0:
            raise ValueError("zero")
        self.left[request] = request.prompt_ids[0]

    def drop(self, request):
        del self.left[request]
        self.dropped.append(request)
        self.gate.set()
        return Completion((7,), (-0.7,), FinishReason.INTERRUPTED)

    def step(self):
        if any(left < 0 for left in self.left.values()):
            raise RuntimeError("device lost")
        self.left = {request: left - 1 for request, left in self.left.items()}
        done = [request for request, left in self.left.items() if left == 0]
        for request in done:
            del self.left[request]
        return [(request, Completion((1,), (0.0,), FinishReason.EOS)) for request in done]

    def stop_engine(self, unfinished):
        self.stopped_with = list(unfinished)


def run(scenario):
    engine = CountingEngine()

    async def go():
        await engine.open()
        try:
            return await asyncio.wait_for(scenario(engine), timeout=200)
        finally:
            await engine.close()

    return engine, asyncio.run(go())


def ask(engine, steps):
    return asyncio.create_task(engine.generate([steps], max_tokens=1, sampling=Sampling()))


def test_a_request_that_the_engine_refuses_fails_alone():
    async def scenario(engine):
        return await asyncio.gather(ask(engine, 3), ask(engine, 0), ask(engine, 1), return_exceptions=True)

    engine, (first, refused, last) = run(scenario)
    assert first.ids == last.ids == (1,) and isinstance(refused, ValueError)
    assert engine.stopped_with == []


def test_a_cancelled_request_is_dropped_and_the_others_go_on():
    async def scenario(engine):
        endless = ask(engine, 10**12)
        await asyncio.sleep(0)
        await ask(engine, 2)
        endless.cancel()
        await asyncio.to_thread(engine.gate.wait, 20)
        return await ask(engine, 1)

    engine, completion = run(scenario)
    assert completion.ids == (1,) and len(engine.dropped) == 1 and not engine.left


def test_a_broken_engine_fails_waiting_and_later_requests():
    async def scenario(engine):
        early = await asyncio.gather(ask(engine, 10**12), ask(engine, -1), return_exceptions=True)
        return [*early, *await asyncio.gather(ask(engine, 1), return_exceptions=True)]

    engine, outcomes = run(scenario)
    assert [str(outcome) for outcome in outcomes] == ["device lost"] * 3
    assert len(engine.stopped_with) == 2


def test_closing_ends_unfinished_requests():
    async def scenario(engine):
        endless = ask(engine, 10**12)
        await ask(engine, 1)
        await engine.close()
        return await asyncio.gather(endless, return_exceptions=True)

    engine, (outcome,) = run(scenario)
    assert isinstance(outcome, asyncio.CancelledError)
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(engine.generate([1], max_tokens=1, sampling=Sampling()))


def test_interrupted_requests_return_their_tokens_and_the_engine_continues():
    async def scenario(engine):
        endless = [ask(engine, 10**12), ask(engine, 10**12)]
        await ask(engine, 1)
        await engine.interrupt()
        await engine.interrupt()  # interrupts nothing
        return [*await asyncio.gather(*endless), await ask(engine, 1)]

    engine, (*cut, whole) = run(scenario)
    assert cut == [Completion((7,), (-0.7,), FinishReason.INTERRUPTED)] * 2
    assert whole.finish_reason is FinishReason.EOS and engine.stopped_with == [] and not engine.left


def test_interrupting_a_broken_engine_raises_its_error():
    async def scenario(engine):
        broken = await asyncio.gather(ask(engine, -1), return_exceptions=True)
        return [*broken, *await asyncio.gather(engine.interrupt(), return_exceptions=True)]

    _, outcomes = run(scenario)
    assert [str(outcome) for outcome in outcomes] == ["device lost"] * 2


def test_an_unknown_keyword_is_refused():
    """It had no effect: a turn with stop_strings, which is stop here, went on to its last token."""

    async def scenario(engine):
        with pytest.raises(TypeError, match="stop_strings"):
            await engine.generate([1], max_tokens=1, sampling=Sampling(), stop_strings=("</search>",))

    run(scenario)
