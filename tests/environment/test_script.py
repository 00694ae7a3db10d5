"""A script plays a question turn by turn: it receives the observations, and its mistakes are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.calculator import Calculator
from trl_search import Answer, Search, StopReason, ToolCall, play
from trl_search.common.errors import UserError
from trl_search.environment.script import load_script
from trl_search.types import EndOfTurn

ROW = {"question": "1 + 2", "golden_answers": ["3"]}


def adds(row: dict[str, Any]) -> Iterator[Any]:
    a, _, b = row["question"].split()
    total = yield "I add.", ToolCall("add", {"a": int(a), "b": int(b)})
    yield f"It is {total}.", Answer(total)


def adds_turn_by_turn(row: dict[str, Any], replies: tuple[str, ...]) -> Any:
    a, _, b = row["question"].split()
    if not replies:
        return "I add.", ToolCall("add", {"a": int(a), "b": int(b)})
    return f"It is {replies[-1]}.", Answer(replies[-1])


def adds_in_text(row: dict[str, Any]) -> Iterator[str]:
    total = yield '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    yield f"<answer> {total} </answer>"


def gives_up(row: dict[str, Any]) -> Iterator[Any]:
    yield "I add.", ToolCall("add", {"a": 1, "b": 1})


NOT_A_SCRIPT = 3


@pytest.mark.parametrize("script", [adds, adds_turn_by_turn, adds_in_text])
def test_a_script_receives_the_observations(script: Any) -> None:
    said, end = play(Calculator(), script, ROW)
    assert said.documents == ("3",) and end.done is StopReason.ANSWER


def test_a_script_may_give_up() -> None:
    (said,) = play(Calculator(), gives_up, ROW)
    assert said.documents == ("2",)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda: None, "must be a function: either it takes the question's row"),
        (Calculator, "must be a function: either it takes the question's row"),
        (lambda row: [("I add.", Answer("3"))], "must yield its turns, but returned"),
        (lambda row, replies: Answer("3"), r"a script's turn must be a pair .* of thought and action, .* not Answer"),
        (lambda row, replies: ("", EndOfTurn()), r"a script's turn must be a pair .* of thought and action"),
        (lambda row, replies: ("I open.", ToolCall("open", {})), "Calculator has no tool 'open': its tools are add"),
        (3, "turns must be a list of actions or texts, or a script, not 3"),
    ],
)
def test_mistakes_in_a_script_are_named(script: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        play(Calculator(), script, ROW)


def test_each_turn_is_checked_once() -> None:
    looked_up = []

    class Watched(Calculator):
        @property
        def tools(self) -> Any:
            looked_up.append(1)
            return Calculator.tools

    def looked_up_for(adding: int) -> int:
        looked_up.clear()
        call = "I add.", ToolCall("add", {"a": 1, "b": 2})
        play(Watched(), lambda row, replies: call if len(replies) < adding else None, ROW)
        return len(looked_up)

    assert looked_up_for(4) - looked_up_for(3) == 1


def test_a_script_is_loaded_by_import_path() -> None:
    assert load_script(f"{__name__}:adds") is adds
    for path, message in (
        (f"{__name__}:subtracts", "script '.*:subtracts' cannot be imported"),
        ("my_script", "script 'my_script' cannot be imported: write module:name, as in my_script:name$"),
        ("no_such_module:play", "cannot be imported: No module named"),
        (f"{__name__}:NOT_A_SCRIPT", "must be a function: .* It is 3"),
        (f"{__name__}:Calculator", "must be a function"),
    ):
        with pytest.raises(UserError, match=message):
            load_script(path)


def test_thoughts_and_actions_can_be_played_from_a_list() -> None:
    end = play(Calculator(), [("I know.", Answer("3"))])[-1]
    assert end.done is StopReason.ANSWER
    with pytest.raises(UserError, match="a script's turn"):
        play(Calculator(), [(Search(("x",)), "I know.")])
