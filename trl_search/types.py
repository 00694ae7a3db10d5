"""The values that travel through a rollout. No torch, no I/O: nearly everything in the package imports this file.

A trajectory grows by two verbs, and nothing else writes its ids, mask or logprobs:

    prompt | act(O1)      observe(O1')        act(O2)      ...
    ids    | 5 9 2 7      31 4 18 22          6 1 3
    mask   | 1 1 1 1       0 0  0  0          1 1 1          1 = sampled by the policy, trained on
    logp   | -.2 ...       0.0 ...            -.1 ...        0 = written by the world, never trained on
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_search.common.errors import UserError


@dataclass(frozen=True, slots=True)
class Passage:
    """One retrieved document: `Passage(id="17", title="Mira Talvane", text="Mira Talvane was born", score=9.1)`."""

    id: str
    title: str
    text: str
    score: float = 0.0
    url: str | None = None

    def __post_init__(self) -> None:
        # Retrievers have both from numpy or torch, and JSON takes neither: journals and `chat --json` write passages.
        if type(self.id) is not str:
            object.__setattr__(self, "id", str(self.id))
        if type(self.score) is not float:
            object.__setattr__(self, "score", float(self.score))

    @property
    def titled_text(self) -> str:
        """The title, a newline and the text, which are searched and judged together."""
        return f"{self.title}\n{self.text}"


# In the place of a policy version, for tokens that have none.
UNVERSIONED = -1


class FinishReason(enum.StrEnum):
    """Why the policy stopped sampling one turn."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    # The engine was taken away in the middle of the turn, which goes on with the next request.
    INTERRUPTED = "interrupted"


class StopReason(enum.StrEnum):
    """Why a trajectory ended. Logged one-hot as `stop/<value>`."""

    ANSWER = "answer"
    END_OF_TURN = "end_of_turn"
    SEARCH_BUDGET = "search_budget"
    TURN_BUDGET = "turn_budget"
    TOKEN_BUDGET = "token_budget"
    RETRIEVAL_FAILED = "retrieval_failed"
    ENVIRONMENT_FAILED = "environment_failed"
    ENVIRONMENT = "environment"


# The world failed such a trajectory: it is masked from the loss, gets no reward, and is counted.
FAILURES = (StopReason.RETRIEVAL_FAILED, StopReason.ENVIRONMENT_FAILED)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the policy samples. `temperature=0` is greedy. `seed` makes a request repeatable, whatever is beside it."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy sampled in one turn. `logprobs[i]` is that of `ids[i]`; a sampled EOS is in both.

    `versions[i]` is the optimizer step whose weights sampled `ids[i]`; empty if versions are not recorded.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.logprobs):
            raise ValueError(f"a completion of {len(self.ids)} ids came with {len(self.logprobs)} logprobs")
        if self.versions and len(self.ids) != len(self.versions):
            raise ValueError(f"a completion of {len(self.ids)} ids came with {len(self.versions)} versions")

    def then(self, more: Completion) -> Completion:
        """This completion, continued by the one that was sampled right after it."""
        return Completion(
            (*self.ids, *more.ids),
            (*self.logprobs, *more.logprobs),
            more.finish_reason,
            (*self.versions, *more.versions),
        )


# What the policy did in a turn, as `Protocol.parse` reads it.


@dataclass(frozen=True, slots=True)
class Search:
    """A call of the search tool: `Search(("birthplace of Mira Talvane",))`."""

    queries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A well-formed call of another tool that the user's `Environment` declares."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """A malformed call. `problem` is said back to the policy, so write it to the policy: "the JSON does not parse".

    `near` marks what was meant as a call in another notation, such as a code fence around JSON.
    """

    problem: str
    near: bool = False


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """The turn ended with neither a call nor an answer."""


Action = Search | ToolCall | Answer | Invalid | EndOfTurn


@dataclass(frozen=True, slots=True)
class Observation:
    """What the world says back. Only `documents` may be cut to fit a token budget, `notice` never is.

    Args:
        documents (`tuple[str, ...]`): Texts in rank order, each cut on its own when room is short. Untrusted.
        notice (`str`): The environment's own words, after the documents: a correction, "no searches left".
        passages (`tuple[Passage, ...]`): What was retrieved, for rewards and logs; never shown to the policy itself.
        done (`StopReason`, *optional*): Ends the trajectory; nothing of this observation is then shown.
        error (`str`): Why the world failed. Such a trajectory is masked from the loss and counted.

    Raises:
        UserError: for a value of another type, where it is made: one string as `documents` would be shown letter by
            letter.
    """

    documents: tuple[str, ...] = ()
    notice: str = ""
    passages: tuple[Passage, ...] = ()
    done: StopReason | None = None
    error: str = ""

    def __post_init__(self) -> None:
        for name, kind in (("documents", str), ("passages", Passage)):
            held = getattr(self, name)
            if not isinstance(held, tuple | list) or not all(isinstance(one, kind) for one in held):
                raise UserError(f"Observation({name}=...) takes a tuple of {kind.__name__}, and got {held!r:.80}")
        if not isinstance(self.notice, str):
            raise UserError(f"Observation(notice=...) takes a text, and got {self.notice!r:.80}")
        if self.done is not None and not isinstance(self.done, StopReason):
            raise UserError(f"Observation(done=...) takes a StopReason, and got {self.done!r:.80}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One span of a trajectory: `ids[start:end]`, written by the `assistant` or by the `tool` (the world)."""

    role: str
    text: str
    start: int
    end: int


@dataclass
class Trajectory:
    """One rollout: the only writer of ids, mask and logprobs. Finished by `finish()`, frozen from then on.

    Example:
        >>> trajectory = Trajectory(prompt_ids=(5, 9))
        >>> trajectory.act(Completion((2, 7), (-0.2, -0.1), FinishReason.EOS), text="<tool_call> ...")
        >>> trajectory.observe((31, 4), text="<tool_response> ...")
        >>> trajectory.ids, trajectory.mask
        ([2, 7, 31, 4], [1, 1, 0, 0])
    """

    prompt_ids: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # UNVERSIONED: observed, or not recorded
    turns: list[Turn] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    passages: list[tuple[Passage, ...]] = field(default_factory=list)
    stop_reason: StopReason | None = None
    error: str = ""
    nonfinite_logprobs: int = 0
    generation_s: float = 0.0
    search_s: float = 0.0

    def act(self, completion: Completion, text: str) -> None:
        """Appends what the policy sampled (mask 1). `text` is its decoding, for reading only."""
        # A logprob that is not finite cannot enter a ratio: NaN makes TRL drop the correction for that token.
        logprobs = [value if math.isfinite(value) else math.nan for value in completion.logprobs]
        self.nonfinite_logprobs += sum(map(math.isnan, logprobs))
        versions = completion.versions or [UNVERSIONED] * len(completion.ids)
        self._append("assistant", completion.ids, 1, logprobs, versions, text)

    def observe(self, ids: Sequence[int], text: str) -> None:
        """Appends what the world wrote (mask 0): passages, notices, any token that closes a turn for the policy."""
        self._append("tool", ids, 0, [0.0] * len(ids), [UNVERSIONED] * len(ids), text)

    def finish(self, reason: StopReason, *, eos_token_id: int | None = None, error: str = "") -> None:
        """Ends the trajectory. `eos_token_id` closes one that the policy did not end by EOS but by a stop string: TRL
        calls a completion without EOS truncated. The token is not the policy's, so its mask is 0."""
        if eos_token_id is not None and (not self.ids or self.ids[-1] != eos_token_id):
            self.observe((eos_token_id,), text="")
        self.stop_reason, self.error = reason, error

    def _append(
        self, role: str, ids: Sequence[int], mask: int, logprobs: Sequence[float], versions: Sequence[int], text: str
    ) -> None:
        if self.stop_reason is not None:
            raise RuntimeError(f"the trajectory is finished ({self.stop_reason.value}); nothing can be appended to it")
        if len(ids) != len(logprobs):
            raise ValueError(f"{len(ids)} ids came with {len(logprobs)} logprobs")
        start = len(self.ids)
        self.ids.extend(ids)
        self.mask.extend([mask] * len(ids))
        self.logprobs.extend(logprobs)
        self.versions.extend(versions)
        self.turns.append(Turn(role, text, start, len(self.ids)))

    @property
    def failed(self) -> bool:
        """Whether the world failed it: data about the failure, never trained on."""
        return self.stop_reason in FAILURES

    @property
    def model_tokens(self) -> int:
        return sum(self.mask)

    @property
    def observation_tokens(self) -> int:
        return len(self.mask) - sum(self.mask)

    @property
    def searches(self) -> int:
        return sum(isinstance(action, Search) for action in self.actions)

    @property
    def calls(self) -> int:
        """Calls of any tool, searches among them."""
        return sum(isinstance(action, Search | ToolCall) for action in self.actions)

    @property
    def malformed(self) -> int:
        return sum(isinstance(action, Invalid) for action in self.actions)

    @property
    def near_calls(self) -> int:
        return sum(isinstance(action, Invalid) and action.near for action in self.actions)

    @property
    def spoken(self) -> list[str]:
        """What the policy wrote, turn by turn: the only text that is scored or searched for phrases."""
        return [turn.text for turn in self.turns if turn.role == "assistant"]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as chat messages, `[{"role": "assistant", "content": ...}, {"role": "tool", ...}, ...]`: what
        reward functions read, so that they can tell the policy's words from the world's."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns if turn.text]
