"""The rollout loop, in which a policy and an environment take turns writing a trajectory. Start at `run_trajectory`.

    prompt ─► Policy.generate ─► Trajectory.act        mask 1
                                 Protocol.parse ─► Environment.step
                                 Trajectory.observe    mask 0
              └──────── until the environment says done, or the tokens are spent ────────┘

There is one coroutine per trajectory, all on one event loop, and no barrier between turns: while one trajectory waits
for its search, the engine generates the others. The context is always prompt ids + sampled ids + observation ids;
sampled ids are never decoded and re-encoded.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.common.event_loop import run_sync
from trl_search.environment import Environment, start_episode, take_step
from trl_search.policies.base import Policy
from trl_search.protocols import Protocol
from trl_search.protocols.turn import in_thought
from trl_search.retrieval.base import RetrievalError
from trl_search.types import (
    Action,
    Answer,
    Completion,
    FinishReason,
    Observation,
    Sampling,
    Search,
    StopReason,
    ToolCall,
    Trajectory,
)

logger = logging.getLogger(__name__)

# An observation must leave the policy at least this many tokens.
MIN_TURN_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Limits:
    """Token budgets: for everything after the prompt, for one turn of the policy, and for one observation."""

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
    """Runs one trajectory to its end. With `sampling.seed` it is repeatable, regardless of concurrent trajectories."""
    trajectory = Trajectory(prompt_ids)
    eos = protocol.tokenizer.eos_token_id
    turn = 0
    while True:
        # 1. The policy generates a turn within its remaining budget.
        left = limits.completion_tokens - len(trajectory.ids)
        started = time.perf_counter()
        completion, text = await _speak(
            policy,
            protocol,
            [*prompt_ids, *trajectory.ids],
            max_tokens=min(left, limits.turn_tokens),
            sampling=replace(sampling, seed=random.Random(f"{sampling.seed}/{turn}").getrandbits(63)),
        )
        trajectory.generation_s += time.perf_counter() - started
        turn += 1
        trajectory.act(completion, text)

        # 2. The protocol parses the action from the text.
        action = protocol.parse(text)
        if completion.finish_reason is FinishReason.LENGTH and not isinstance(action, Search | ToolCall | Answer):
            trajectory.finish(StopReason.TOKEN_BUDGET)
            return trajectory
        trajectory.actions.append(action)

        # 3. The environment answers.
        started = time.perf_counter()
        observation = await _step(episode, action)
        trajectory.search_s += time.perf_counter() - started
        if observation.done is not None:
            trajectory.finish(observation.done, eos_token_id=eos, error=observation.error)
            return trajectory
        if isinstance(action, Search) or observation.passages:
            trajectory.passages.append(observation.passages)
        left = limits.completion_tokens - len(trajectory.ids)
        try:
            # In a thread, so that other trajectories do not wait while passages are tokenized.
            written = await asyncio.to_thread(
                protocol.observation_ids,
                observation,
                max_tokens=min(limits.observation_tokens, left - MIN_TURN_TOKENS),
                turn_closed=completion.ids[-1:] == (protocol.turn_end_id,),
                turn_ids=completion.ids,
            )
        # Observations are user data: a bad passage ends this trajectory only.
        except Exception as error:
            _tell_once("an observation cannot be written", error)
            trajectory.finish(StopReason.ENVIRONMENT_FAILED, eos_token_id=eos, error=repr(error))
            return trajectory
        if written is None:
            trajectory.finish(StopReason.TOKEN_BUDGET)
            return trajectory
        trajectory.observe(*written)


async def _speak(
    policy: Policy, protocol: Protocol, context: list[int], *, max_tokens: int, sampling: Sampling
) -> tuple[Completion, str]:
    """Returns one turn of the policy and its text. A stop string inside a thought does not end the turn.

    After an interruption, generation continues from the tokens sampled so far. An engine finds a stop string only
    within one request; if the interruption may have split one, tokens are requested singly until that is decided.
    """
    whole = Completion((), (), FinishReason.LENGTH)
    part = 0
    cut_at: int | None = None  # the position in the text of a stop string that the interruption may have split
    while len(whole.ids) < max_tokens:
        more = await policy.generate(
            [*context, *whole.ids],
            max_tokens=max_tokens - len(whole.ids) if cut_at is None else 1,
            sampling=sampling if part == 0 else replace(sampling, seed=sampling.seed ^ part),
            stop=protocol.stop,
            stop_token_ids=protocol.stop_token_ids,
        )
        part += 1
        whole = whole.then(more)
        text = protocol.read_turn(whole.ids, context=context)
        if cut_at is not None and more.finish_reason is FinishReason.LENGTH:
            found = any(stop in protocol.read(whole.ids)[cut_at:] for stop in protocol.stop)
            whole = replace(whole, finish_reason=FinishReason.STOP if found else FinishReason.INTERRUPTED)
        if whole.finish_reason is FinishReason.INTERRUPTED:
            cut_at = _begun_stop(protocol.read(whole.ids), protocol.stop)
        elif whole.finish_reason is not FinishReason.STOP or not more.ids or not in_thought(text):
            return whole, text
        else:
            cut_at = None
    return replace(whole, finish_reason=FinishReason.LENGTH), protocol.read_turn(whole.ids, context=context)


def _begun_stop(text: str, stop: Sequence[str]) -> int | None:
    """The position of a partial stop string at the end of `text`; `None` if there is none."""
    starts = (len(text) - n for string in stop for n in range(1, len(string)) if text.endswith(string[:n]))
    return min(starts, default=None)


async def _step(episode: Environment, action: Action) -> Observation:
    try:
        return await take_step(episode, action)
    except RetrievalError as error:
        return Observation(done=StopReason.RETRIEVAL_FAILED, error=str(error))
    # An environment is user code: an exception in it ends this trajectory only, and is counted as a failure.
    except Exception as error:
        _tell_once(f"{type(episode).__name__}.step failed", error)
        return Observation(done=StopReason.ENVIRONMENT_FAILED, error=repr(error))


# Failures already logged: what failed, the type of the error, and where it was raised.
_told: set[tuple[str, type[Exception], tuple[tuple[str, int | None], ...]]] = set()


def _tell_once(what: str, error: Exception) -> None:
    """Logs a failure of user code with the user's part of the traceback, once per place that raises it."""
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_frame.f_globals["__name__"].startswith("trl_search."):
        trace = trace.tb_next  # keeps the user's own frames
    kind = (what, type(error), tuple((frame.filename, frame.lineno) for frame in traceback.extract_tb(trace)))
    if kind not in _told:
        _told.add(kind)
        logger.warning(
            "%s. The trajectory is masked from the loss and counted in stop/environment_failed; the same error is not "
            "logged again.",
            what,
            exc_info=(type(error), error, trace),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One trajectory to run."""

    # The prompt's ids, or a coroutine function that returns them (one-shot RAG searches first). A `RetrievalError`
    # raised by it fails this trajectory only.
    prompt: tuple[int, ...] | Callable[[], Awaitable[tuple[int, ...]]]
    row: Mapping[str, Any]  # the dataset row, passed to the environment's `start`
    key: str  # combined with the batch's seed to give the trajectory's own seed
    policy: Policy | None = None  # replaces the batch's policy in this trajectory, as scripted players do
    finished: Trajectory | None = None  # the trajectory of an earlier process, returned instead of a new one


async def run_batch(
    jobs: Iterable[Job],
    *,
    count: int,
    policy: Policy | None,
    environment: Environment,
    protocol: Protocol,
    limits: Limits,
    sampling: Sampling,
    on_finish: Callable[[int, Trajectory], None],
    more: Callable[[int, Trajectory], Awaitable[Mapping[int, Job]]] | None = None,
    concurrency: int | None = None,
    progress: str | None = "Rollout",
) -> None:
    """Runs many trajectories on one event loop, for training, evaluation, cold start and scripted players.

    Args:
        jobs (`Iterable[Job]`): Consumed as trajectories begin, so a generator of a million jobs needs little memory.
        count (`int`): Number of jobs.
        policy (`Policy`, *optional*): Used by every job that has no policy of its own.
        sampling (`Sampling`): Its seed and a job's key give the trajectory's seed.
        on_finish (`Callable`): Called with a job's index and its trajectory, as each one ends. An exception in it ends
            the batch.
        more (`Callable`, *optional*): Awaited after `on_finish`, with the same arguments. The jobs that it returns, by
            index, start at once as part of the batch; refill uses it to replace questions.
        concurrency (`int`, *optional*): Maximum trajectories in progress, not counting those of `more`. Default: all.
        progress (`str`, *optional*): Title of the progress bar in a terminal; None for no bar.

    Raises:
        Exception: the first exception of the policy, `on_finish` or `more`.
    """
    queue = iter(enumerate(jobs))
    bar = tqdm(total=count, desc=progress, unit="trajectory", delay=2, leave=False, disable=None if progress else True)

    async def run(index: int, job: Job) -> None:
        trajectory = await run_job(job, policy, environment, protocol, limits, sampling)
        on_finish(index, trajectory)
        bar.update()
        added = await more(index, trajectory) if more is not None else {}
        for place, extra in added.items():
            tasks.create_task(run(place, extra))
        bar.total += len(added)

    async def work() -> None:
        for index, job in queue:
            await run(index, job)

    failed: BaseException | None = None
    try:
        if policy is not None:
            await policy.open()
        await environment.open()
        # If one task fails (the engine broke), the task group cancels the others.
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency or count, count)):
                tasks.create_task(work())
    except BaseExceptionGroup as several:
        failed = several.exceptions[0]
    finally:
        bar.close()
        try:
            await environment.close()  # user code, which may raise
        finally:
            if policy is not None:
                await policy.close()
    if failed is not None:
        raise failed


async def run_job(
    job: Job, policy: Policy | None, environment: Environment, protocol: Protocol, limits: Limits, sampling: Sampling
) -> Trajectory:
    """Runs one job to its end. A failure of the environment marks the trajectory as failed; it does not raise."""
    speaker = job.policy or policy
    assert speaker is not None, "a job without a policy needs a batch with one"
    if job.finished is not None:
        return job.finished
    seed = random.Random(f"{sampling.seed}/{job.key}").getrandbits(63)
    started = time.perf_counter()
    try:
        prompt_ids = job.prompt if isinstance(job.prompt, tuple) else await job.prompt()
    except RetrievalError as error:
        trajectory = Trajectory(prompt_ids=())
        trajectory.finish(StopReason.RETRIEVAL_FAILED, error=str(error))
        return trajectory
    searched_s = time.perf_counter() - started
    try:
        episode = start_episode(environment, job.row)
    except UserError:  # a mistake in the set-up, so no trajectory could start
        raise
    except Exception as error:  # user code, as in _step
        _tell_once(f"{type(environment).__name__}.start failed", error)
        trajectory = Trajectory(prompt_ids)
        eos = protocol.tokenizer.eos_token_id
        trajectory.finish(StopReason.ENVIRONMENT_FAILED, eos_token_id=eos, error=repr(error))
        return trajectory
    trajectory = await run_trajectory(
        prompt_ids, episode, policy=speaker, protocol=protocol, limits=limits, sampling=replace(sampling, seed=seed)
    )
    trajectory.search_s += searched_s
    return trajectory


def rollout(
    prompts: Sequence[tuple[int, ...]],
    rows: Sequence[Mapping[str, Any]],
    *,
    policies: Sequence[Policy] | None = None,
    finished: Mapping[int, Trajectory] | None = None,
    on_finish: Callable[[int, Trajectory], None] | None = None,
    **options: Any,
) -> list[Trajectory]:
    """Runs one trajectory per prompt, all concurrently, and returns them in the order of the prompts.

    For callers that are not coroutines; it also works in a notebook, where an event loop is already running.

    Args:
        policies (`Sequence[Policy]`, *optional*): One per trajectory, in place of the batch's policy.
        finished (`Mapping[int, Trajectory]`, *optional*): Trajectories, by index, that are not run again.
        on_finish (`Callable`, *optional*): Called with an index and its trajectory, as each one ends.
        **options: The arguments of [`run_batch`].
    """
    done: dict[int, Trajectory] = {}
    finished = finished or {}
    jobs = [
        Job(prompt, row, key=str(i), policy=policies[i] if policies else None, finished=finished.get(i))
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]

    def keep(place: int, trajectory: Trajectory) -> None:
        done[place] = trajectory
        if on_finish is not None:
            on_finish(place, trajectory)

    run_sync(run_batch(jobs, count=len(jobs), on_finish=keep, **options))
    return [done[place] for place in range(len(prompts))]
