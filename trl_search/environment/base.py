"""`Environment`: what a policy acts in. It takes an `Action` and returns an `Observation`. Users subclass it.

A trainer holds one `Environment`. `start(row)` makes a copy for each trajectory; keep the trajectory's state on that
copy:

    class GuessTheNumber(Environment):
        instruction = "Guess a number from 1 to 100: <answer> 50 </answer>. You are told whether it is too low. "

        def start(self, row):
            game = super().start(row)
            game.guesses = 0
            return game

        async def step(self, action):
            if not isinstance(action, Answer):
                return Observation(done=StopReason.END_OF_TURN)
            self.guesses += 1
            if action.text == self.row["number"] or self.guesses == 5:
                return Observation(done=StopReason.ANSWER)
            if not action.text.isdecimal():  # int() would raise, and the trajectory count as a failed environment
                return Observation(notice="Guess a whole number.")
            return Observation(notice="Too low." if int(action.text) < int(self.row["number"]) else "Too high.")
"""

from __future__ import annotations

import abc
import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.protocols.instructions import tool_names
from trl_search.types import Action, Answer, Observation, StopReason


class Environment(abc.ABC):
    """A multi-turn environment. Override `step`, and pass an instance as `SearchGRPOTrainer(environment=...)`.

    Attributes:
        row (`Mapping[str, Any]`): The dataset row of the trajectory, set by `start`.
        tools (`Sequence[dict]`): JSON schemas of the tools shown to the policy. `step` receives a call of `search` as
            a `Search`, and a call of any other tool as a `ToolCall`.
        instruction (`str`, *optional*): Text before each question; the default names the tools. The `instruction` of a
            configuration overrides it.
    """

    row: Mapping[str, Any]
    tools: Sequence[dict[str, Any]] = ()
    instruction: str | None = None
    _set_by_init: Sequence[str] = ()  # attributes that are missing if a subclass does not call this class's `__init__`

    def start(self, row: Mapping[str, Any]) -> Environment:
        """Returns the environment of one trajectory: a shallow copy of this one, with its `row` set.

        All copies share the lists and dictionaries of this environment. Create here whatever a trajectory modifies,
        like `guesses` above.
        """
        episode = copy.copy(self)
        episode.row = row
        return episode

    @abc.abstractmethod
    async def step(self, action: Action) -> Observation:
        """Answers one action. Called concurrently for all trajectories on one event loop: never block in it.

        A plain `def step` works too if it returns at once. An exception ends the trajectory as `environment_failed`:
        the trajectory is masked from the loss and counted.
        """

    async def open(self) -> None:
        """Called on the event loop before the trajectories of a rollout batch start."""

    async def close(self) -> None:
        """Called on the event loop after the trajectories have ended, even if the batch failed."""

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the last rollout batch, logged with those of its trajectories; see `Retriever.take_metrics`."""
        return {}


class AnswerOnly(Environment):
    """An environment without tools: the policy answers in one turn, from its own knowledge or from the prompt."""

    async def step(self, action: Action) -> Observation:
        return Observation(done=StopReason.ANSWER if isinstance(action, Answer) else StopReason.END_OF_TURN)


def check_environment(value: Any) -> Environment:
    """Returns the value if it is a usable environment.

    Raises:
        UserError: if it is not an instance of `Environment`, or if its tools or instruction are invalid.
    """
    name = getattr(value, "__name__", type(value).__name__)
    if isinstance(value, type) and issubclass(value, Environment):
        raise UserError(
            f"environment={name} is a class: give an instance, {name}(...). `start` copies it for each trajectory"
        )
    if not isinstance(value, Environment):
        if callable(value) and not isinstance(value, type):
            raise UserError(f"environment={name} is a function: call it, and give the Environment that it returns")
        raise UserError(
            f"an environment must be an instance of a subclass of Environment, not {value!r:.80}: docs/extending.md "
            "shows one"
        )
    if not all(hasattr(value, attribute) for attribute in value._set_by_init):
        raise UserError(f"{name}.__init__ does not call super().__init__(retriever, **options): call it first")
    try:
        tool_names(value.tools)
    except UserError as error:
        raise UserError(f"{name}.tools: {error}") from None
    if value.instruction is not None and not isinstance(value.instruction, str):
        raise UserError(f"{name}.instruction must be a string, not {value.instruction!r:.80}")
    return value


def start_episode(environment: Environment, row: Mapping[str, Any]) -> Environment:
    """Starts one trajectory and returns its environment.

    Raises:
        UserError: if `start` returns no `Environment`, or the environment itself, which all trajectories would share.
    """
    episode: Any = environment.start(row)
    name = type(environment).__name__
    if episode is environment:
        raise UserError(
            f"{name}.start returned the environment itself, which all trajectories would share: return the copy that "
            "super().start(row) makes"
        )
    if not isinstance(episode, Environment):
        raise UserError(
            f"{name}.start must return the Environment of one trajectory, not {type(episode).__name__}: end it "
            "with `return episode`"
        )
    return episode


async def take_step(episode: Environment, action: Action) -> Observation:
    """Runs one step of an environment; its `step` may be a coroutine function or a plain function.

    Raises:
        UserError: if `step` does not return an `Observation`.
    """
    observation: Any = episode.step(action)
    if inspect.isawaitable(observation):
        observation = await observation
    if not isinstance(observation, Observation):
        raise UserError(
            f"{type(episode).__name__}.step must return an Observation, but returned {observation!r:.80} for "
            f"{action!r:.80}"
        )
    return observation
