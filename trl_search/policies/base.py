"""`Policy`: generates the turns of a rollout. Implementations differ in the engine, not in what they return."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Required, TypedDict

from trl_search.types import Completion, Sampling


class Turn(TypedDict, total=False):
    """The keywords of [`Policy.generate`], for policies that pass them on: `**turn: Unpack[Turn]`."""

    max_tokens: Required[int]
    sampling: Required[Sampling]
    stop: Sequence[str]
    stop_token_ids: Sequence[int]


class Policy(abc.ABC):
    """Generates turns for many trajectories at once. A call is one request to an engine with continuous batching."""

    slots: int | None = None  # requests that the engine runs at once; others queue. `None`: unknown.
    positions: int | None = None  # tokens of the longest conversation. `None`: unknown.

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
            max_tokens (`int`): The rest of the trajectory's token budget. At least 1 token is always sampled.
            stop (`Sequence[str]`): Ends the turn once the sampled text contains one of these strings. If a stop
                string ends inside a token, the whole token is kept, so the text may be a few characters longer.
            stop_token_ids (`Sequence[int]`): Tokens that end the turn besides EOS, with which the chat template closes
                the assistant's turn. They are sampled, so they are part of the completion.

        Returns:
            `Completion`: The sampled ids, including EOS, and their logprobs under the temperature-scaled distribution
                before top-p, top-k and min-p, as TRL computes them in training.
        """

    async def interrupt(self) -> None:
        """Ends all requests in flight: each returns its tokens so far, possibly none, with `FinishReason.INTERRUPTED`.

        Called on the event loop. The caller must not send new requests until it returns.

        Raises:
            NotImplementedError: if the engine cannot interrupt requests.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot interrupt its requests")

    async def open(self) -> None:
        """Starts or wakes the engine. Called on the event loop before a rollout batch."""

    async def close(self) -> None:
        """Puts the engine to sleep. Called on the event loop after a rollout batch, also a failed one, maybe twice."""
