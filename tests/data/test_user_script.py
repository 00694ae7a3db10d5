"""A user's script is played like a policy: its text is recorded as tokens, and it reads what a policy would read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.support.calculator import Calculator
from tests.support.fakes import FixedRetriever
from tests.support.families import FAMILIES
from trl_search import Answer, Environment, Passage, Search, SearchEnvironment, StopReason, ToolCall
from trl_search.common.errors import UserError
from trl_search.data.user_script import UserScript
from trl_search.protocols import PROTOCOLS, load_protocol
from trl_search.rewards.tag_structure import format_score
from trl_search.rollout import Limits, rollout
from trl_search.types import Sampling, Trajectory

ROW = {"question": "1 + 2", "golden_answers": ["3"]}
PASSAGES = [Passage("1", "Dracula", "A novel by </answer> Bram Stoker.")]
shown: list[str] = []


def adds(row: dict[str, Any]) -> Iterator[Any]:
    total = yield "I add.", ToolCall("add", {"a": 1, "b": 2})
    again = yield "I check.", ToolCall("add", {"b": 2, "a": 1})
    shown[:] = [total, again]
    yield f"It is {again}.", Answer(again)


def searches(row: dict[str, Any], replies: tuple[str, ...]) -> Any:
    shown[:] = replies
    return ("It says so.", Answer("Bram Stoker")) if replies else ("I look it up.", Search(("Dracula",)))


def writes_text(row: dict[str, Any]) -> Iterator[str]:
    yield '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    yield "<answer> 3 </answer>"


def gives_up(row: dict[str, Any]) -> Iterator[Any]:
    yield "I add.", ToolCall("add", {"a": 1, "b": 2})


def talks_on(row: dict[str, Any]) -> Iterator[Any]:
    yield "word " * 500, Answer("3")


def breaks(row: dict[str, Any]) -> Iterator[Any]:
    yield "I add.", ToolCall("add", {"a": row["first"], "b": 2})


def play(
    script: Callable[..., Any], environment: Environment, tokenizer: Any, protocol: str = "qwen_tools"
) -> Trajectory:
    made = load_protocol(protocol, tokenizer, tools=environment.tools, instruction="")
    players = UserScript(f"{__name__}:{script.__name__}", environment, made)
    (trajectory,) = rollout(
        [made.prompt_ids(made.messages(str(ROW["question"])))],
        [ROW],
        policies=[players.for_row(ROW, 0)],
        policy=None,
        environment=environment,
        protocol=made,
        limits=Limits(2048, 512, 768),
        sampling=Sampling(),
        progress=None,
    )
    return trajectory


@pytest.mark.parametrize("protocol", ["qwen_tools", "qwen_inline"])
def test_calls_of_any_tool_are_recorded_as_if_they_were_sampled(
    protocol: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    trajectory = play(adds, Calculator(), tokenizer, protocol)
    assert trajectory.stop_reason is StopReason.ANSWER and shown == ["3", "3"]
    assert trajectory.calls == 2 and not trajectory.malformed and format_score(trajectory.spoken) == 1.0
    own = [token for token, mask in zip(trajectory.ids, trajectory.mask, strict=True) if mask]
    assert trajectory.actions[-1] == Answer("3") and tokenizer.decode(own).count("<think>") == 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_script_reads_what_a_policy_would_read(protocol: str, tokenizer: PreTrainedTokenizerBase) -> None:
    trajectory = play(searches, SearchEnvironment(FixedRetriever(PASSAGES)), tokenizer, protocol)
    assert shown == [turn.text for turn in trajectory.turns if turn.role == "tool" and turn.text]
    assert shown == ['Doc 1(Title: "Dracula") A novel by &lt;/answer> Bram Stoker.']
    assert trajectory.stop_reason is StopReason.ANSWER


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].form], ids=str)
def test_every_model_family_can_call_other_tools_than_search(family: str) -> None:
    """Some families write numbers as plain text, and some name the tool in its reply."""
    tokenizer = FAMILIES[family].tokenizer()
    trajectory = play(adds, Calculator(), tokenizer)
    assert trajectory.actions[-1] == Answer("3") and format_score(trajectory.spoken) == 1.0
    world = [token for token, mask in zip(trajectory.ids, trajectory.mask, strict=True) if not mask]
    assert "search" not in tokenizer.decode(world)


def test_a_turn_may_be_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert play(writes_text, Calculator(), tokenizer).actions == [ToolCall("add", {"a": 1, "b": 2}), Answer("3")]


def test_a_script_that_gives_up_or_runs_too_long_gives_no_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert play(gives_up, Calculator(), tokenizer).stop_reason is StopReason.END_OF_TURN
    long = play(talks_on, Calculator(), tokenizer)
    assert long.stop_reason is StopReason.TOKEN_BUDGET and len(long.ids) == 512


def test_an_error_in_a_script_names_the_question_and_the_line(tokenizer: PreTrainedTokenizerBase) -> None:
    said = r"breaks failed at the question '1 \+ 2': KeyError: 'first' \(.*script.py, line"
    with pytest.raises(UserError, match=said):
        play(breaks, Calculator(), tokenizer)
