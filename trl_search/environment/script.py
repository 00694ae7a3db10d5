"""A script plays a question turn by turn, without a model, to make demonstrations for a policy.

A script takes the question's row, yields turns, and is sent the reply that the policy would see:

    def open_page(row):
        title = row["question"].removeprefix("Who wrote ").removesuffix("?")
        page = yield f"I open the page of {title}.", ToolCall("open", {"title": title})
        yield "The page names the author.", Answer(page.partition(" by ")[2])

Or the script takes the row and all replies so far, and returns the next turn:

    def open_page(row, replies):
        if not replies:
            title = row["question"].removeprefix("Who wrote ").removesuffix("?")
            return f"I open the page of {title}.", ToolCall("open", {"title": title})
        return "The page names the author.", Answer(replies[-1].partition(" by ")[2])

In a cold start the row has only `id`, `question`, `golden_answers` and `data_source`.

A turn is a pair of thought and action, for which the protocol writes the tags, or the whole text of a turn with its
tags. A script that returns without an answer has given up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.registry import import_object
from trl_search.environment.base import Environment
from trl_search.protocols.instructions import tool_names
from trl_search.types import Action, Answer, Observation, Search, ToolCall

Script = Callable[..., Any]
ScriptTurn = str | tuple[str, Search | ToolCall | Answer]


def load_script(path: str) -> Script:
    """Imports a script from its import path, such as `my_agent:open_page`.

    Raises:
        UserError: if it cannot be imported, or is not a function of a row.
    """
    return check_script(import_object("script", path), path)


def check_script(script: Any, name: str = "") -> Script:
    """Returns the script if it is a function of a row, or of a row and the replies.

    Raises:
        UserError: for anything else.
    """
    if not callable(script) or isinstance(script, type) or _parameters(script) not in (1, 2):
        raise UserError(
            f"script {name or _name(script)} must be a function: either it takes the question's row and yields "
            f"turns, or it takes the row and the replies so far and returns the next turn. It is {script!r:.60}"
        )
    return script


def start_script(script: Script, row: Mapping[str, Any]) -> Generator[Any, str | None, None]:
    """Returns a generator of the turns of one question; send it each reply.

    Raises:
        UserError: if the script is not a generator of turns.
    """
    if _parameters(script) == 2:
        return _turn_by_turn(script, row)
    turns = script(row)
    if not isinstance(turns, Generator):
        raise UserError(
            f"script {_name(script)} must yield its turns, but returned {turns!r:.60}; to return turns one by "
            "one, give it a second parameter, the replies so far"
        )
    return turns


def _turn_by_turn(script: Script, row: Mapping[str, Any]) -> Generator[Any, str | None, None]:
    replies: list[str] = []
    while (turn := script(row, tuple(replies))) is not None:
        replies.append((yield turn) or "")


def check_script_turn(turn: Any, environment: Environment) -> ScriptTurn:
    """Returns the turn if it is valid.

    Raises:
        UserError: if it is not a turn, or calls a tool that the environment does not have.
    """
    if isinstance(turn, str):
        return turn
    if not (
        isinstance(turn, tuple)
        and len(turn) == 2
        and isinstance(turn[0], str)
        and isinstance(turn[1], Search | ToolCall | Answer)
    ):
        raise UserError(
            "a script's turn must be a pair ('I look it up.', Search(('query',))) of thought and action, or the text "
            f"of the turn, not {turn!r:.80}"
        )
    check_tool(turn[1], environment)
    return turn


def check_tool(action: Action, environment: Environment) -> None:
    """Raises `UserError` if the action calls a tool that the environment does not have."""
    names = tool_names(environment.tools)
    if isinstance(action, ToolCall) and action.name not in names:
        raise UserError(
            f"{type(environment).__name__} has no tool {action.name!r}: its tools are {', '.join(names) or 'none'}"
        )


def reply_of(observation: Observation) -> str:
    """The text of an observation as the policy sees it when it is not truncated.

    Example:
        >>> reply_of(Observation(documents=("3",), notice="You have no calls left."))
        '3\\nYou have no calls left.'
    """
    return "\n".join([*observation.documents, *([observation.notice] if observation.notice else [])])


def _parameters(script: Script) -> int:
    """The number of a script's parameters without a default."""
    try:
        parameters = inspect.signature(script).parameters.values()
    except (TypeError, ValueError):  # some built-in functions have no signature
        return 0
    return sum(one.default is one.empty and one.kind is not one.VAR_KEYWORD for one in parameters)


def _name(script: Script) -> str:
    return getattr(script, "__qualname__", type(script).__name__)
