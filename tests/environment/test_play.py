"""`play` runs an environment without a model, and reports mistakes in the environment at once."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.calculator import Calculator
from tests.support.fakes import FixedRetriever
from trl_search import Answer, Environment, Observation, Passage, Search, SearchEnvironment, StopReason, ToolCall, play
from trl_search.common.errors import UserError
from trl_search.environment import check_environment
from trl_search.protocols import load_protocol

SUM = ToolCall("add", {"a": 1, "b": 2})


def test_actions_are_played_until_the_end() -> None:
    seen = play(Calculator(), [SUM, Answer("3"), SUM], row={"question": "1 + 2"})
    assert [observation.documents for observation in seen] == [("3",), ()]
    assert seen[-1].done is StopReason.ANSWER


def test_texts_are_read_by_the_protocol() -> None:
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert play(Calculator(), [text])[0].documents == ("3",)
    environment = SearchEnvironment(FixedRetriever([Passage("1", "Dracula", "by Bram Stoker")]))
    (found,) = play(environment, ["<search> author of Dracula </search>"], protocol="search_r1")
    assert found.documents == ('Doc 1(Title: "Dracula") by Bram Stoker',)


def test_play_works_inside_a_running_event_loop() -> None:
    async def notebook() -> list[Observation]:
        return play(Calculator(), [SUM])

    assert asyncio.run(notebook())[0].documents == ("3",)


def test_an_exception_of_the_environment_keeps_its_traceback() -> None:
    with pytest.raises(KeyError) as raised:
        play(Calculator(), [ToolCall("add", {"a": 1})])
    assert raised.traceback[-1].path.name == "calculator.py"


@pytest.mark.parametrize(
    ("environment", "turns", "message"),
    [
        (Calculator, [SUM], r"environment=Calculator is a class: give an instance, Calculator\(...\)"),
        (lambda: Calculator(), [SUM], "is a function: call it"),
        ("calculator", [SUM], "an instance of a subclass of Environment, not 'calculator'"),
        (Calculator(), [ToolCall("ad", {})], "Calculator has no tool 'ad': its tools are add"),
        (Calculator(), [3], "a turn must be an action, .* not 3"),
        (Calculator(), [SUM, None], "a turn must be an action"),
    ],
)
def test_invalid_arguments_of_play_are_explained(environment: object, turns: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        play(environment, turns)


class World(Calculator):
    """A calculator with one mistake."""

    def __init__(self, **wrong: object) -> None:
        super().__init__()
        self.wrong = wrong

    def start(self, row):
        episode = super().start(row)
        return {"itself": self, "nothing": None, None: episode}[self.wrong.get("start")]

    def step(self, action):
        return self.wrong["step"]() if "step" in self.wrong else super().step(action)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": "itself"}, r"returned the environment itself, which all trajectories would share"),
        ({"start": "nothing"}, "World.start must return the Environment of one trajectory, not NoneType"),
        ({"step": lambda: None}, "World.step must return an Observation, but returned None for ToolCall"),
        ({"step": lambda: "3"}, "World.step must return an Observation, but returned '3'"),
        ({"step": lambda: Observation(documents="3")}, r"Observation\(documents=...\) takes a tuple of str"),
        ({"step": lambda: Observation(documents=(3,))}, r"Observation\(documents=...\) takes a tuple of str"),
        ({"step": lambda: Observation(passages=("3",))}, r"takes a tuple of Passage"),
        ({"step": lambda: Observation(notice=3)}, r"Observation\(notice=...\) takes a text"),
        ({"step": lambda: Observation(done=True)}, r"Observation\(done=...\) takes a StopReason"),
    ],
)
def test_mistakes_in_an_environment_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        play(World(**wrong), [SUM])


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"name": "add"}, "tools must be a list of JSON schemas; got dict"),
        ([{"name": "add"}], "a tool must be a JSON schema"),
        (["add"], "a tool must be a JSON schema"),
        (None, "tools must be a list"),
    ],
)
def test_invalid_tools_are_refused(tools: object, message: str) -> None:
    world = Calculator()
    world.tools = tools
    with pytest.raises(UserError, match=f"^Calculator.tools: .*{message}"):
        check_environment(world)


def test_the_instruction_names_exactly_the_tools_of_the_environment(tokenizer) -> None:
    def instruction(protocol: str, tools) -> str:
        return load_protocol(protocol, tokenizer, tools=tools).instruction

    told = instruction("qwen_tools", Calculator.tools)
    assert "call the tool add; its results" in told and "search" not in told
    both = instruction("qwen_tools", (*SearchEnvironment.tools, *Calculator.tools))
    assert "call the tools search and add; their results" in both
    assert "tool" not in instruction("qwen_tools", ())
    assert "search" not in instruction("search_r1", ())
    for protocol in ("qwen_tools", "qwen_inline", "search_r1"):
        assert instruction(protocol, SearchEnvironment.tools) == load_protocol(protocol, tokenizer).instruction
    with pytest.raises(UserError, match=r"'search_r1' has tags for search only, not for .* tool 'add'"):
        load_protocol("search_r1", tokenizer, tools=Calculator.tools)


@pytest.mark.parametrize("protocol", ["qwen_tools", "qwen_inline"])
def test_a_call_of_any_tool_is_written_and_read(tokenizer, protocol: str) -> None:
    made = load_protocol(protocol, tokenizer, tools=Calculator.tools)
    assert made.parse(made.write("I add.", SUM)) == SUM
    with pytest.raises(UserError, match="not for a call of add"):
        load_protocol("search_r1", tokenizer).write("I add.", SUM)


def test_an_environment_may_have_a_search_tool_and_a_page_tool() -> None:
    class Both(Environment):
        async def step(self, action):
            return Observation(notice=type(action).__name__)

    assert [one.notice for one in play(Both(), [Search(("a",)), Answer("b")])] == ["Search", "Answer"]
