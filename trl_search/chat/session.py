"""An agent that answers one question after another and reports each token, search and result to a listener.

    with load_chat("runs/qwen3b", load_retriever("web")) as chat:
        print(chat.ask("Who founded Orlune?").answer)

Each answer is a rollout of one trajectory, with the loop, environment and protocol of training. Two things differ
(`events.py`): a listener gets the text token by token, and the model is told if a search failed, while training would
discard the trajectory. As in training, the model does not see earlier questions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from trl_search.chat.events import Event, HeardEnvironment, HeardPolicy, Listener, unheard
from trl_search.chat.interrupts import interrupts_blocked, wait_for
from trl_search.common.errors import UserError
from trl_search.common.event_loop import BackgroundLoop
from trl_search.config.agent import (
    AgentSettings,
    build_environment,
    protocol_of,
    refuse_unnamed_code,
    trained_settings,
)
from trl_search.policies.base import Policy
from trl_search.protocols import Protocol
from trl_search.retrieval import Retriever, as_retriever
from trl_search.rewards.answers import last_answer
from trl_search.rollout import Limits, run_trajectory
from trl_search.types import Passage, Sampling, StopReason, Trajectory

Result = TypeVar("Result")

# The temperature in the inference script of Seungyoun Shin's reproduction of Search-R1 (June 2025).
SAMPLING = Sampling(temperature=0.7)


@dataclass(frozen=True)
class Reply:
    """The answer to a question and how it was found. `calls` counts the calls of all tools, including searches.

    `error` is the reason if the environment failed; `failed_searches` has the reason of each failed search.
    """

    question: str
    answer: str | None
    turns: tuple[dict[str, str], ...]
    queries: tuple[str, ...]
    passages: tuple[Passage, ...]
    failed_searches: tuple[str, ...]
    error: str
    stop_reason: StopReason
    searches: int
    calls: int
    model_tokens: int
    observation_tokens: int
    seconds: float
    seed: int

    def as_json(self) -> dict[str, Any]:
        """The line that `trl-search chat --json` prints."""
        told = asdict(self)
        tokens = {"model": told.pop("model_tokens"), "observation": told.pop("observation_tokens")}
        return {**told, "tokens": tokens, "seconds": round(self.seconds, 3)}


class Chat:
    """A policy and its environment, kept open between questions. Created by [`load_chat`]; `close` it, or use `with`.

    Args:
        policy (`Policy`): The engine.
        protocol (`Protocol`): The protocol with which the policy was trained.
        environment (`HeardEnvironment`): The environment of the agent.
        limits (`Limits`): Token budgets of an answer.
        sampling (`Sampling`, *optional*): The sampling settings; each question has its own seed.
    """

    def __init__(
        self,
        policy: Policy,
        protocol: Protocol,
        environment: HeardEnvironment,
        limits: Limits,
        sampling: Sampling = SAMPLING,
    ) -> None:
        self.policy, self.protocol = HeardPolicy(policy, protocol), protocol
        self.environment, self.limits, self.sampling = environment, limits, sampling
        # The chat has its own event loop in a thread: engine and connections stay open between questions, and the
        # running loop of a notebook does not interfere. Ctrl-C reaches the asking thread, which cancels the question.
        self._loop = BackgroundLoop("chat")
        self._opened = False

    def ask(self, question: str, listener: Listener = unheard, *, seed: int | None = None) -> Reply:
        """Answers one question. The listener is called from other threads, with one event at a time.

        Args:
            seed (`int`, *optional*): The same seed gives the same answer if searches find the same passages. By
                default it is random; the reply contains it.

        Raises:
            UserError: for an empty question.
        """
        if not question.strip():
            raise UserError("the question is empty: give a text")
        heard = _Switch(listener)
        try:
            return self._run(self._answer(question, heard, random.getrandbits(32) if seed is None else seed))
        except KeyboardInterrupt:
            # An abandoned search would delay the next one.
            self._run(self._forget_searches())
            raise
        finally:
            heard.on = False

    def check_length(self, question: str) -> None:
        """Checks that a question leaves room for a turn.

        Raises:
            UserError: if the model has fewer positions.
        """
        length = len(self.protocol.prompt_ids(self.protocol.messages(question)))
        turn, positions = min(self.limits.turn_tokens, self.limits.completion_tokens), self.policy.engine.positions
        if positions is not None and length + turn > positions:
            raise UserError(
                f"the question {question[:60]!r} ... is too long: its prompt has {length} tokens and a turn may have "
                f"{turn}, but the model has {positions} positions"
            )

    def close(self) -> None:
        """Stops the engine and the searches. Safe to call twice."""
        if self._opened:
            self._run(self.environment.close())
            self._run(self.policy.close())
            self._opened = False
        self._loop.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _answer(self, question: str, listener: Listener, seed: int) -> Reply:
        if not self._opened:
            await self.policy.open()
            await self.environment.open()
            self._opened = True
        self.policy.listener = listener
        episode = self.environment.start({"question": question})
        assert isinstance(episode, HeardEnvironment)
        episode.listener = listener
        started = time.perf_counter()
        trajectory = await run_trajectory(
            self.protocol.prompt_ids(self.protocol.messages(question)),
            episode,
            policy=self.policy,
            protocol=self.protocol,
            limits=self.limits,
            sampling=replace(self.sampling, seed=seed),
        )
        return _reply(question, trajectory, episode, time.perf_counter() - started, seed)

    async def _forget_searches(self) -> None:
        await self.environment.close()
        await self.environment.open()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        with interrupts_blocked():  # the first coroutine starts the loop's thread
            future = self._loop.submit(coroutine)
        try:
            return wait_for(future)
        except KeyboardInterrupt:
            future.cancel()
            raise


@dataclass
class _Switch:
    """A listener that can be switched off, because an engine may sample one more token after an interrupt."""

    listener: Listener
    on: bool = True

    def __call__(self, event: Event) -> None:
        if self.on:
            self.listener(event)


def _reply(question: str, trajectory: Trajectory, episode: HeardEnvironment, seconds: float, seed: int) -> Reply:
    assert trajectory.stop_reason is not None
    return Reply(
        question=question,
        answer=last_answer(trajectory.spoken),
        turns=tuple(trajectory.messages),
        queries=tuple(query for queries in episode.searched for query in queries),
        passages=tuple(passage for passages in trajectory.passages for passage in passages),
        failed_searches=tuple(episode.failures),
        error=trajectory.error,
        stop_reason=trajectory.stop_reason,
        searches=len(episode.searched),
        calls=len(episode.searched) + trajectory.calls - trajectory.searches,
        model_tokens=trajectory.model_tokens,
        observation_tokens=trajectory.observation_tokens,
        seconds=seconds,
        seed=seed,
    )


def load_chat(
    model: str | Path,
    retriever: Retriever | None = None,
    *,
    settings: AgentSettings | None = None,
    sampling: Sampling = SAMPLING,
    device: str | None = None,
    dtype: str | None = None,
    server: str | None = None,
    served_model: str | None = None,
) -> Chat:
    """Loads a model for a chat.

    Args:
        model (`str` or `Path`): A model on the hub, a folder (of a model or of a PEFT adapter), or `"tiny"`.
        retriever (`Retriever`, *optional*): The retriever, if the environment needs one. The caller must close it.
        settings (`AgentSettings`, *optional*): The agent settings. By default those of training (`config/agent.py`).
        sampling (`Sampling`, *optional*): By default temperature 0.7; `Sampling(temperature=0)` is greedy.
        device (`str`, *optional*): By default `"cuda"` if there is a GPU, else `"cpu"`.
        dtype (`str`, *optional*): By default bfloat16 on a GPU and float32 on a CPU.
        server (`str`, *optional*): The address of a `vllm serve` with the model; then only the tokenizer is loaded.
        served_model (`str`, *optional*): The model's name there; by default the first that the server lists.

    Raises:
        UserError: if `model` is not a name, or the model cannot be found or loaded.

    Example:
        >>> with load_chat("runs/qwen3b", load_retriever("web")) as chat:
        ...     chat.ask("Who founded Orlune?").answer
    """
    from trl_search.policies.loading import load_model, load_tokenizer
    from trl_search.policies.server_tokenizer import refuse_other_tokenizer
    from trl_search.policies.tiny import tiny_policy_path
    from trl_search.policies.transformers_policy import TransformersPolicy
    from trl_search.policies.vllm_server import VLLMServerPolicy

    if not isinstance(model, str | Path):
        raise UserError(f"model must be a folder, a model on the hub or 'tiny'; got {model!r:.60}")
    model = str(model)
    if settings is None:
        settings = trained_settings(model)
        refuse_unnamed_code(settings)
    environment = HeardEnvironment(build_environment(settings, None if retriever is None else as_retriever(retriever)))
    name = tiny_policy_path() if model == "tiny" else model
    tokenizer = load_tokenizer(name)
    protocol = protocol_of(settings, tokenizer, environment.tools, environment.instruction)
    policy: Policy
    if server is None:
        loaded = load_model(name, device=device, dtype=dtype)
        policy = TransformersPolicy(loaded, tokenizer, max_sequences=1)
    else:
        refuse_other_tokenizer(server, tokenizer, model, served_model)
        policy = VLLMServerPolicy(server, model=served_model, patience_s=30.0)
    return Chat(policy, protocol, environment, settings.limits, sampling)
