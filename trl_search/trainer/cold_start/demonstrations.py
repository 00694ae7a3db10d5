"""Demonstrations for a teacher: finished trajectories in its prompt, without which the student is trained.

    the teacher's prompt    [question A, its trajectory] [question B, its trajectory] [question C]
    what is recorded                                                                  [question C] attempt

The student learns to work without demonstrations: context distillation (Askell et al., arXiv:2112.00861). Scripted
players (`data/question_players.py`) or a user's script (`data/user_script.py`) play training questions in the
environment, and trajectories with a right answer become demonstrations. Their ids are prepended without re-encoding.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from trl_search.common.errors import UserError
from trl_search.data.question_players import QuestionPlayers
from trl_search.data.user_script import UserScript
from trl_search.environment import Environment
from trl_search.policies.base import Policy, Turn
from trl_search.protocols import Protocol
from trl_search.rewards.answers import exact_match, last_answer
from trl_search.rollout import Limits, rollout
from trl_search.types import Completion, Sampling

# The number of questions played: enough for variety, few enough to take seconds.
_POOL = 64


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A question, and the ids of its prompt and trajectory."""

    question: str
    ids: tuple[int, ...]


def play_demonstrations(
    rows: Sequence[Mapping[str, Any]],
    players: QuestionPlayers | UserScript,
    environment: Environment,
    protocol: Protocol,
    limits: Limits,
    *,
    seed: int,
) -> list[Demonstration]:
    """Plays some of the questions and returns the trajectories with a right answer.

    Raises:
        UserError: if there is none.
    """
    rng = random.Random(f"{seed}/demonstrations")
    drawn = rng.sample(list(rows), min(_POOL, len(rows)))
    prompts = [protocol.prompt_ids(protocol.messages(str(row["question"]))) for row in drawn]
    played = rollout(
        prompts,
        drawn,
        policies=[players.for_row(row, rng.getrandbits(63)) for row in drawn],
        policy=None,
        environment=environment,
        protocol=protocol,
        limits=limits,
        sampling=Sampling(),
        progress="Demonstrations",
    )
    newline = protocol.encode("\n")
    right = [
        Demonstration(str(row["question"]), (*trajectory.prompt_ids, *trajectory.ids, *newline))
        for row, trajectory in zip(drawn, played, strict=True)
        if exact_match(last_answer(trajectory.spoken) or "", row["golden_answers"])
    ]
    if not right:
        raise UserError(
            f"scripted players answered none of {len(drawn)} questions, so there are no demonstrations: set "
            "demonstrations: 0, or add gold passages to the questions"
        )
    return right


class Demonstrating(Policy):
    """Prepends demonstrations (`shown`, ids) to every prompt. The owner of `policy` opens and closes it."""

    def __init__(self, policy: Policy, shown: Sequence[int]) -> None:
        self._policy, self._shown = policy, tuple(shown)

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        return await self._policy.generate([*self._shown, *prompt_ids], **turn)


def demonstrating(
    policy: Policy, row: Mapping[str, Any], seed: int, *, pool: Sequence[Demonstration], count: int
) -> Policy:
    """The policy for one row, with `count` demonstrations of other questions."""
    others = [one for one in pool if one.question != str(row["question"])]
    chosen = random.Random(f"{seed}/shown").sample(others, min(count, len(others)))
    return Demonstrating(policy, [token for one in chosen for token in one.ids])
