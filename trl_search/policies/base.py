"""`Policy`: what the rollout loop asks for a turn. Implementations differ in the engine, not in what they return."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Required, TypedDict

from trl_search.types import Completion, Sampling


class Turn(TypedDict, total=False):
    """The keywords of [`Policy.generate`], for a policy that passes them on, or needs few: `**turn: Unpack[Turn]`."""

    max_tokens: Required[int]
    sampling: Required[Sampling]
    stop: Sequence[str]
    stop_token_ids: Sequence[int]


class Policy(abc.ABC):
    """Generates turns for many trajectories at once; a call is one request to an engine that batches continuously.

    Attributes:
        slots (`int`, *optional*): Requests that the engine runs at once; others queue. None: not known.
    """

    slots: int | None = None

    @abc.abstractmethod
    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> Completion:
        """Samples one turn after `prompt_ids` (the whole conversation so far).

        Args:
            max_tokens (`int`): What is left of the trajectory's budget; at least 1 token is always sampled.
            stop (`Sequence[str]`): Ends the turn once the sampled text contains one of these strings. A stop string
                can end inside a token. The ids and logprobs of all sampled tokens are kept, so the text may go on for
                a character.
            stop_token_ids (`Sequence[int]`): Tokens that end the turn, beside the model's own EOS: those with which
                the chat template closes the assistant's turn. They are sampled, so they are part of the completion.

        Returns:
            `Completion`: The sampled ids, EOS included, and their logprobs under the temperature-scaled distribution
                before top-p, top-k and min-p: what TRL computes in training.
        """

    async def interrupt(self) -> None:
        """Ends all requests under way: each returns what it has sampled, with `FinishReason.INTERRUPTED`.

        Called on the event loop, by those who let no new request through meanwhile. Its tokens may be none.

        Raises:
            NotImplementedError: if the engine cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot interrupt its requests")

    async def open(self) -> None:
        """Called on the event loop before a rollout batch: start or wake the engine."""

    async def close(self) -> None:
        """Called on the event loop after it, also when it failed: put the engine to sleep. Safe to call twice."""
