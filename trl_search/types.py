"""The data types of a rollout. They need no torch and no I/O, because nearly every module imports this file.

Two methods extend a trajectory; nothing else writes its ids, mask or logprobs:

    prompt | act(O1)      observe(O1')        act(O2)      ...
    ids    | 5 9 2 7      31 4 18 22          6 1 3
    mask   | 1 1 1 1       0 0  0  0          1 1 1          1 = sampled by the policy, trained on
    logp   | -.2 ...       0.0 ...            -.1 ...        0 = written by the environment, never trained on
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
        # Retrievers return numpy and torch scalars, which the JSON of journals and `chat --json` cannot hold.
        if type(self.id) is not str:
            object.__setattr__(self, "id", str(self.id))
        if type(self.score) is not float:
            object.__setattr__(self, "score", float(self.score))

    @property
    def titled_text(self) -> str:
        """The title, a newline and the text; this is what is indexed and judged."""
        return f"{self.title}\n{self.text}"


# The policy version of tokens that have none.
UNVERSIONED = -1


class FinishReason(enum.StrEnum):
    """Why the policy stopped sampling one turn."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    # The engine was interrupted in the middle of the turn; the next request continues it.
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


# Failures of the environment, not of the policy: the trajectory is masked from the loss, unrewarded, and counted.
FAILURES = (StopReason.RETRIEVAL_FAILED, StopReason.ENVIRONMENT_FAILED)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the policy samples. `temperature=0` is greedy. `seed` makes a request repeatable in any batch."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy sampled in one turn. `logprobs[i]` belongs to `ids[i]`; a sampled EOS is in both.

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
        """This completion followed by `more`, which was sampled right after it."""
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
    """A malformed call. `problem` is shown to the policy, so address the policy: "the JSON does not parse".

    `near` marks an intended call in another notation, such as JSON in a code fence.
    """

    problem: str
    near: bool = False


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """The turn ended with neither a call nor an answer."""


Action = Search | ToolCall | Answer | Invalid | EndOfTurn


@dataclass(frozen=True, slots=True)
class Observation:
    """The environment's reply to an action. Only `documents` may be cut to fit a token budget, never `notice`.

    Args:
        documents (`tuple[str, ...]`): Untrusted texts in rank order, each cut separately when over the budget.
        notice (`str`): The environment's own words, after the documents: a correction, "no searches left".
        passages (`tuple[Passage, ...]`): The retrieved passages, for rewards and logs; never shown to the policy.
        done (`StopReason`, *optional*): Ends the trajectory; this observation is then not shown.
        error (`str`): Why the environment failed. The trajectory is then masked from the loss and counted.

    Raises:
        UserError: for a value of the wrong type: one string as `documents` would be shown letter by letter.
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
    """One span of a trajectory: `ids[start:end]`, written by the `assistant` or by the `tool` (the environment)."""

    role: str
    text: str
    start: int
    end: int


@dataclass
class Trajectory:
    """One rollout. Only this class writes ids, mask and logprobs; nothing can be appended after `finish()`.

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
        """Appends what the policy sampled (mask 1). `text` is the decoded text; it is never re-encoded."""
        # A ratio needs finite logprobs: for NaN, TRL drops the correction of that token.
        logprobs = [value if math.isfinite(value) else math.nan for value in completion.logprobs]
        self.nonfinite_logprobs += sum(map(math.isnan, logprobs))
        versions = completion.versions or [UNVERSIONED] * len(completion.ids)
        self._append("assistant", completion.ids, 1, logprobs, versions, text)

    def observe(self, ids: Sequence[int], text: str) -> None:
        """Appends what the environment wrote (mask 0): passages, notices, and tokens that close the policy's turn."""
        self._append("tool", ids, 0, [0.0] * len(ids), [UNVERSIONED] * len(ids), text)

    def finish(self, reason: StopReason, *, eos_token_id: int | None = None, error: str = "") -> None:
        """Ends the trajectory. `eos_token_id` is appended if the last token is another one, for example after a stop
        string, because TRL counts a completion without EOS as truncated. Its mask is 0: the policy did not sample it.
        """
        if eos_token_id is not None and (not self.ids or self.ids[-1] != eos_token_id):
            self.observe((eos_token_id,), text="")
        self.stop_reason, self.error = reason, error

    def _append(
        self, role: str, ids: Sequence[int], mask: int, logprobs: Sequence[float], versions: Sequence[int], text: str
    ) -> None:
        if self.stop_reason is not None:
            raise RuntimeError(f"the trajectory is finished ({self.stop_reason.value}); nothing can be appended to it")
        start = len(self.ids)
        self.ids.extend(ids)
        self.mask.extend([mask] * len(ids))
        self.logprobs.extend(logprobs)
        self.versions.extend(versions)
        self.turns.append(Turn(role, text, start, len(self.ids)))

    @property
    def failed(self) -> bool:
        """Whether the environment failed. Such a trajectory is never trained on."""
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
        """Number of calls of any tool, including searches."""
        return sum(isinstance(action, Search | ToolCall) for action in self.actions)

    @property
    def malformed(self) -> int:
        return sum(isinstance(action, Invalid) for action in self.actions)

    @property
    def near_calls(self) -> int:
        return sum(isinstance(action, Invalid) and action.near for action in self.actions)

    @property
    def spoken(self) -> list[str]:
        """What the policy wrote, one text per turn: the only text that is scored or searched for phrases."""
        return [turn.text for turn in self.turns if turn.role == "assistant"]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as chat messages for reward functions, which thereby see who wrote what:
        `[{"role": "assistant", "content": ...}, {"role": "tool", ...}, ...]`."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns if turn.text]
