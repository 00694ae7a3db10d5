"""The rollout: how a policy and a world write a trajectory together. Read `run_trajectory` first; it is the algorithm.

    prompt ─► Policy.generate ─► Trajectory.act        mask 1
                                 Protocol.parse ─► Environment.step
                                 Trajectory.observe    mask 0
              └──────── until the environment says done, or the tokens are spent ────────┘

One coroutine a trajectory, all on one event loop, and no barrier between turns: while one trajectory waits for its
search, the engine generates the others. What comes next is always prompt ids + sampled ids + observation ids; nothing
that was sampled is ever decoded and encoded again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tqdm.auto import tqdm

from trl_search.environment import Environment
from trl_search.policies.base import Policy
from trl_search.protocols import Protocol
from trl_search.types import Answer, FinishReason, Observation, Sampling, Search, StopReason, ToolCall, Trajectory

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# After an observation the policy needs at least this many tokens to say something.
MIN_TURN_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Limits:
    """Token budgets: of everything after the prompt, of one turn of the policy, and of one observation."""

    completion_tokens: int
    turn_tokens: int
    observation_tokens: int


async def run_trajectory(
    prompt_ids: tuple[int, ...],
    episode: Environment,
    *,
    policy: Policy,
    protocol: Protocol,
    limits: Limits,
    sampling: Sampling,
) -> Trajectory:
    """Runs one trajectory to its end. `sampling.seed` makes it repeatable, whatever runs beside it."""
    trajectory = Trajectory(prompt_ids)
    eos = protocol.tokenizer.eos_token_id
    turn = 0
    while True:
        # 1. The policy speaks, with at most what is left of its budget.
        left = limits.completion_tokens - len(trajectory.ids)
        started = time.perf_counter()
        completion = await policy.generate(
            [*prompt_ids, *trajectory.ids],
            max_tokens=min(left, limits.turn_tokens),
            sampling=replace(sampling, seed=random.Random(f"{sampling.seed}/{turn}").getrandbits(63)),
            stop=protocol.stop,
            stop_token_ids=protocol.stop_token_ids,
        )
        trajectory.generation_s += time.perf_counter() - started
        turn += 1
        text = protocol.read(completion.ids)
        trajectory.act(completion, text)

        # 2. What it did is read from what it wrote.
        action = protocol.parse(text)
        if completion.finish_reason is FinishReason.LENGTH and not isinstance(action, Search | ToolCall | Answer):
            trajectory.finish(StopReason.TOKEN_BUDGET)
            return trajectory
        trajectory.actions.append(action)

        # 3. The world answers.
        started = time.perf_counter()
        observation = await _step(episode, action)
        trajectory.search_s += time.perf_counter() - started
        if observation.done is not None:
            trajectory.finish(observation.done, eos_token_id=eos, error=observation.error)
            return trajectory
        if isinstance(action, Search):
            trajectory.passages.append(observation.passages)
        left = limits.completion_tokens - len(trajectory.ids)
        written = protocol.observation_ids(
            observation,
            max_tokens=min(limits.observation_tokens, left - MIN_TURN_TOKENS),
            turn_closed=completion.ids[-1] == eos,
        )
        if written is None:
            trajectory.finish(StopReason.TOKEN_BUDGET)
            return trajectory
        trajectory.observe(*written)


async def _step(episode: Environment, action: Any) -> Observation:
    try:
        return await episode.step(action)
    # An environment is the user's code: whatever it raises ends this trajectory only, and is counted as a failure.
    except Exception as error:
        logger.warning("%s.step raised; its trajectory is masked from the loss", type(episode).__name__, exc_info=True)
        return Observation(done=StopReason.RETRIEVAL_FAILED, error=repr(error))


async def run_batch(
    prompts: Sequence[tuple[int, ...]],
    rows: Sequence[Mapping[str, Any]],
    *,
    policy: Policy,
    environment: Environment,
    protocol: Protocol,
    limits: Limits,
    sampling: Sampling,
    description: str = "Rollout",
) -> list[Trajectory]:
    """Runs one trajectory a prompt, all at once, and returns them in the order of the prompts."""
    bar = tqdm(total=len(prompts), desc=description, unit="trajectory", delay=2, leave=False, disable=None)

    async def run(index: int) -> Trajectory:
        seed = random.Random(f"{sampling.seed}/{index}").getrandbits(63)
        trajectory = await run_trajectory(
            prompts[index],
            environment.start(rows[index]),
            policy=policy,
            protocol=protocol,
            limits=limits,
            sampling=replace(sampling, seed=seed),
        )
        bar.update()
        return trajectory

    try:
        return await run_together(
            [functools.partial(run, index) for index in range(len(prompts))], policy=policy, environment=environment
        )
    finally:
        bar.close()


async def run_together(
    jobs: Sequence[Callable[[], Coroutine[Any, Any, Result]]],
    *,
    policy: Policy,
    environment: Environment,
    concurrency: int | None = None,
) -> list[Result]:
    """Runs all jobs on the open policy and environment, and returns what they return, in their order.

    Args:
        concurrency (`int`, *optional*): So many at a time; the others have not begun. Default: all at once.
    """
    gate = asyncio.Semaphore(concurrency or max(1, len(jobs)))

    async def run(job: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        async with gate:
            return await job()

    tasks: list[asyncio.Task[Result]] = []
    try:
        await policy.open()
        await environment.open()
        tasks = [asyncio.create_task(run(job)) for job in jobs]
        return list(await asyncio.gather(*tasks))
    finally:
        # When one fails (the engine broke), the others must not go on behind the exception's back.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await environment.close()  # the user's code
        finally:
            await policy.close()


def rollout(prompts: Sequence[tuple[int, ...]], rows: Sequence[Mapping[str, Any]], **options: Any) -> list[Trajectory]:
    """[`run_batch`] for callers without an event loop, a notebook's running one included."""
    return run_sync(run_batch(prompts, rows, **options))


def run_sync(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine to its end on a fresh event loop, in a thread of its own where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:  # carried over to the calling thread
            failure.append(error)

    thread = threading.Thread(target=target, name="rollout")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
