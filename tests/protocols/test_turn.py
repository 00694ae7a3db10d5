"""A turn is parsed once for environment, rewards and metrics: thoughts are not actions; parsing takes linear time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_search.protocols import PROTOCOLS, load_protocol
from trl_search.protocols.turn import in_thought, outside_thoughts, read_turn
from trl_search.rewards.answers import extract_answer, last_answer
from trl_search.rewards.tag_structure import duplicate_tags, format_score
from trl_search.types import Answer, EndOfTurn, Invalid, Observation, Search

TAGS = [
    f"<{slash}{tag}>"
    for tag in ("think", "tool_call", "search", "answer", "tool_response", "information")
    for slash in ("", "/")
]
turns = st.lists(st.one_of(st.sampled_from(TAGS), st.sampled_from([" ", "a", "<", "{", '"', "```"])), max_size=12).map(
    "".join
)
# Texts that once made a parser quadratic or worse, or could.
HOSTILE = [
    "<answer>", "<think>", "<tool_call>", "</think>", "<search>", "</answer>", "<tool_response>", "<answer></answer>",
    "<think></think>", "<tool_call></tool_call>", "<tool_call>{</tool_call>", " ", "\n", "<", "< ", "[", '{"a":', "a",
    "```", "search(", "'name':", "<|", "<|a|>", "</s>", "Wait, ", "<function=search>", "<parameter=",
    "[TOOL_CALLS]", "\ud800", "\uff1c/s\uff1e", "query: ",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "acts"),
    [
        ("a <think> b </think> c <answer>d</answer>", [("answer", "d")]),
        ("no tags, a < b", []),
        ("<think> inside <answer> and </answer> </think> <tool_call>x</tool_call>", [("tool_call", "x")]),
        ("<think> I could use <tool_call> … </think> <answer> Lyon </answer>", [("answer", " Lyon ")]),
        ("<think> <tool_response> comes next </think> <answer>x</answer>", [("answer", "x")]),
        ("<think> never closed <answer>x</answer>", []),
        ("the prompt opened <answer>this</answer> </think> <search>x</search>", [("answer", "this"), ("search", "x")]),
        ("the prompt opened this </think> <search>x</search>", [("search", "x")]),
        ("<tool_call>about <answer>a</answer></tool_call>", [("tool_call", "about <answer>a</answer>")]),
        ("<answer> or <search>x</search>", [("search", "x")]),
        ("<search> x <answer>y</answer>", [("search", " x <answer>y</answer>")]),
    ],
)
def test_actions_are_parsed_from_the_text_after_the_thoughts(text, acts):
    assert [(block.tag, block.content) for block in read_turn(text).blocks if block.tag != "think"] == acts


def test_open_and_closed_thoughts_are_distinguished():
    assert in_thought("<think> I could <search> x </search>") and not in_thought(
        "<think> a </think> <search>x</search>"
    )
    assert outside_thoughts("<think>a</think>b<think>c</think>d<think>e") == "bd"


@given(text=turns)
def test_environment_and_rewards_parse_the_same_action(tokenizer, text):
    for name in PROTOCOLS:
        action = load_protocol(name, tokenizer).parse(text)
        assert (last_answer([text]) is not None) == isinstance(action, Answer)
        if isinstance(action, Answer):
            assert action.text == last_answer([text]) == extract_answer(text)
        assert (format_score([text]) > 0) == isinstance(action, Answer)


@given(text=turns, thought=turns.filter(lambda text: "</think>" not in text))
def test_the_text_of_a_thought_does_not_matter(tokenizer, text, thought):
    for name in PROTOCOLS:
        protocol = load_protocol(name, tokenizer)
        plain, thoughtful = f"<think> a </think>{text}", f"<think>{thought}</think>{text}"
        assert protocol.parse(thoughtful) == protocol.parse(plain)
        assert format_score([thoughtful]) == format_score([plain])


@pytest.mark.parametrize("piece", HOSTILE)
def test_parsing_takes_linear_time(tokenizer, piece):
    """200,000 characters take under 0.2 s on a quiet machine, but minutes if parsing is quadratic."""
    protocol = load_protocol("qwen_tools", tokenizer)
    for text in (piece * (200_000 // len(piece)), "<tool_call>" + piece * (200_000 // len(piece)) + "</tool_call>"):
        for read in (
            protocol.parse,
            extract_answer,
            lambda said: format_score([said]),
            lambda said: duplicate_tags([said]),
        ):
            started = time.process_time()
            read(text)
            assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "call",
    [
        '```json\n{"name": "search", "arguments": {"query": "x"}}\n```', 'search(query="x")', 'search: {"query": "x"}',
        "<function=search><parameter=query_list>x</parameter></function>", "null", '"[\\"a\\", \\"b\\"]"',
        'search{"query_list": ["x"]}', "call:search{query: x}",
    ],
)  # fmt: skip
def test_a_near_call_is_not_a_query(tokenizer, call):
    for name, tag in (("qwen_tools", "tool_call"), ("qwen_inline", "tool_call"), ("search_r1", "search")):
        protocol = load_protocol(name, tokenizer)
        action = protocol.parse(f"<{tag}>{call}</{tag}>")
        assert isinstance(action, Invalid) and action.near
        assert format_score([f"<{tag}>{call}</{tag}>", "<answer>x</answer>"]) == 0.5


def test_a_call_without_its_tags_is_a_near_call(tokenizer):
    protocol = load_protocol("qwen_tools", tokenizer)
    fenced = 'I will look it up.\n```json\n{"name": "search", "arguments": {"query": "x"}}\n```'
    assert protocol.parse(fenced) == Invalid(protocol.correction, near=True)
    assert protocol.parse("<search> x </search>") == Invalid(protocol.correction, near=True)
    built_in = '<|python_tag|>brave_search.call(query="x")'  # Llama 3.1 was trained with it
    assert protocol.parse(built_in) == Invalid(protocol.correction, near=True)
    assert protocol.parse(f"<think> {fenced} </think> Hm.") == EndOfTurn()
    assert protocol.parse("I could search (again) or give up.") == EndOfTurn()
    assert load_protocol("qwen_tools", tokenizer, tools=()).parse(fenced) == EndOfTurn()


@pytest.mark.parametrize(
    ("call", "queries"),
    [
        ('{"name": "search", "arguments": "{\\"query_list\\": [\\"a\\", \\"b\\"]}"}', ("a", "b")),
        ('{"name": "search", "arguments": {"query_list": "[\\"a\\", \\"b\\"]"}}', ("a", "b")),
        ('{"name": "search", "arguments": {"query_list": "[draft] a memo"}}', ("[draft] a memo",)),
        ('"Quiet Raven" author', ('"Quiet Raven" author',)),
        ("what is 3 < 4", ("what is 3 < 4",)),
        ("search engines: history", ("search engines: history",)),
    ],
)
def test_arguments_written_as_strings_are_parsed(tokenizer, call, queries):
    assert load_protocol("qwen_tools", tokenizer).parse(f"<tool_call>{call}</tool_call>") == Search(queries)


@pytest.mark.parametrize("text", ["<" + " " * 200_000, "< " * 100_000, "</" * 100_000, "<answer " * 25_000])
def test_escaping_takes_linear_time(tokenizer, text):
    protocol = load_protocol("search_r1", tokenizer)
    started = time.process_time()
    protocol.escape(text)
    protocol.observation_ids(Observation(documents=(text,), notice="x"), max_tokens=500, turn_closed=True)
    assert time.process_time() - started < 3  # a quadratic pattern took 40 s for a tenth of this
