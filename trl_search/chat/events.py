"""The events of a chat: wrappers of policy and environment that report to a listener.

    HeardPolicy         Said, Said, Said ...                    token by token
    HeardEnvironment    Searching ─► Found | SearchFailed       a search
                        Calling ─► Returned                     a call of another tool
                        Corrected                               a call that could not be run

They wrap the policy and the environment of training, so `rollout.py` needs no code for chats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from trl_search.environment import Environment, SearchEnvironment, start_episode, take_step
from trl_search.environment.search import NO_SEARCHES_LEFT
from trl_search.policies.base import Policy, Turn
from trl_search.protocols import Protocol
from trl_search.types import Action, Completion, Observation, Passage, Search, StopReason, ToolCall

SEARCH_FAILED = "The search failed: nothing could be looked up. Search again, or answer from what you know."


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of text that the model writes."""

    text: str


@dataclass(frozen=True, slots=True)
class Searching:
    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The passages that a search found, possibly none. `notice` is a further message to the model."""

    passages: tuple[Passage, ...]
    notice: str = ""


@dataclass(frozen=True, slots=True)
class SearchFailed:
    error: str


@dataclass(frozen=True, slots=True)
class Corrected:
    """A call could not be run, and the model was told the reason."""

    notice: str


@dataclass(frozen=True, slots=True)
class Calling:
    """A call of a tool other than search."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Returned:
    """The result of such a call: documents, and the environment's notice."""

    documents: tuple[str, ...]
    notice: str = ""


Event = Said | Searching | Found | SearchFailed | Corrected | Calling | Returned
Listener = Callable[[Event], None]


def unheard(event: Event) -> None:
    """A listener that ignores all events."""


class HeardEnvironment(Environment):
    """Reports to a listener what another environment does, and tells the model if a search failed."""

    listener: Listener = staticmethod(unheard)
    searched: list[tuple[str, ...]]  # the queries of each search that was run
    failures: list[str]

    def __init__(self, inner: Environment) -> None:
        self.inner = inner
        self.tools, self.instruction = inner.tools, inner.instruction

    def start(self, row: Mapping[str, Any]) -> Environment:
        episode = super().start(row)
        assert isinstance(episode, HeardEnvironment)
        episode.inner = start_episode(self.inner, row)
        episode.searched, episode.failures = [], []
        return episode

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    async def step(self, action: Action) -> Observation:
        runs = isinstance(action, Search) and not self._spent
        if isinstance(action, Search) and runs:
            most = self.inner.max_queries if isinstance(self.inner, SearchEnvironment) else None
            self.searched.append(action.queries[:most])
            self.listener(Searching(self.searched[-1]))
        elif isinstance(action, ToolCall):
            self.listener(Calling(action.name, action.arguments))
        observation = await take_step(self.inner, action)
        if observation.done is StopReason.RETRIEVAL_FAILED:
            self.failures.append(observation.error)
            self.listener(SearchFailed(observation.error))
            return Observation(notice=f"{SEARCH_FAILED} {NO_SEARCHES_LEFT}" if self._spent else SEARCH_FAILED)
        if runs:
            self.listener(Found(observation.passages, observation.notice))
        elif isinstance(action, ToolCall):
            self.listener(Returned(tuple(observation.documents), observation.notice))
        elif observation.done is None:
            self.listener(Corrected(observation.notice))
        return observation

    @property
    def _spent(self) -> bool:
        return isinstance(self.inner, SearchEnvironment) and not self.inner.searches_left


@dataclass
class HeardPolicy(Policy):
    """Reports to a listener what an engine writes: token by token if the engine supports it, else turn by turn."""

    engine: Policy
    protocol: Protocol
    listener: Listener = unheard
    _said: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if hasattr(self.engine, "on_token"):
            self.engine.on_token = self.hear

    async def open(self) -> None:
        await self.engine.open()

    async def close(self) -> None:
        await self.engine.close()

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        self._said = ""
        completion = await self.engine.generate(prompt_ids, **turn)
        self._tell(self.protocol.read(completion.ids))
        return completion

    def hear(self, ids: Sequence[int]) -> None:
        text = self.protocol.read(ids)
        # The last character may still be incomplete.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text)

    def _tell(self, text: str) -> None:
        new, self._said = text[len(self._said) :], text
        if new:
            self.listener(Said(new))
