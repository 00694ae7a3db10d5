"""An environment without a search: one tool that adds, with its own budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_search.environment import Environment
from trl_search.types import Action, Answer, Observation, StopReason, ToolCall

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}


class Calculator(Environment):
    """Adds, at most `max_calls` times per question."""

    tools = (ADD,)

    def __init__(self, max_calls: int = 3) -> None:
        self.max_calls = max_calls
        self.left = max_calls

    def start(self, row: Mapping[str, Any]) -> Environment:
        return super().start(row)

    def step(self, action: Action) -> Observation:  # type: ignore[override]  # a plain function works, too
        if isinstance(action, Answer):
            return Observation(done=StopReason.ANSWER)
        if not isinstance(action, ToolCall) or not self.left:
            return Observation(done=StopReason.END_OF_TURN)
        self.left -= 1
        return Observation(documents=(str(action.arguments["a"] + action.arguments["b"]),))


def make(max_calls: int = 5) -> Calculator:
    return Calculator(max_calls)


def wrong() -> int:
    return 4
