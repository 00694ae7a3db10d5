"""Protocols: written calls are parsed back, untrusted text is inert, observations fit their budget."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_search.common.errors import UserError
from trl_search.protocols import MIN_DOCUMENT_TOKENS, PROTOCOLS, fair_limit, load_protocol, protocol_names
from trl_search.protocols.calls import read_query
from trl_search.types import Answer, EndOfTurn, Invalid, Observation, Search, ToolCall

NAMES = list(PROTOCOLS)
plain = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="<>"), min_size=1, max_size=40).filter(
    lambda text: isinstance(read_query(text), Search)
)
any_text = st.text(st.characters(blacklist_categories=["Cs"]), max_size=120)
tags = st.sampled_from(
    ["<answer>", "</answer>", "<tool_call>", "</tool_call>", "</tool_response>", "<|im_end|>", "<|im_start|>",
     "<search>", "</information>", "< / ANSWER >", "<|endoftext|>", "<think>", "<information>", "<tool_response>"]
)  # fmt: skip
hostile = st.lists(st.one_of(tags, any_text), max_size=8).map("".join)
common = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", NAMES)
@common
@given(thought=plain, queries=st.lists(plain, min_size=1, max_size=3))
def test_a_written_search_is_parsed_back(tokenizer, name, thought, queries):
    protocol = load_protocol(name, tokenizer)
    queries = queries[:1] if name == "search_r1" else queries
    action = Search(tuple(query.strip() for query in queries))
    assert protocol.parse(protocol.write(thought, action)) == action


@pytest.mark.parametrize("name", NAMES)
@common
@given(thought=plain, answer=plain)
def test_a_written_answer_is_parsed_back(tokenizer, name, thought, answer):
    protocol = load_protocol(name, tokenizer)
    assert protocol.parse(protocol.write(thought, Answer(answer.strip()))) == Answer(answer.strip())


@pytest.mark.parametrize("name", NAMES)
@common
@given(text=hostile)
def test_parsing_model_output_never_raises(tokenizer, name, text):
    load_protocol(name, tokenizer).parse(text)
    load_protocol(name, tokenizer).parse(f"<tool_call>{text}</tool_call>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>\n{"name": "search", "arguments": {"query_list": ["a", " b"]}}</tool_call>', Search(("a", "b"))),
        ('<tool_call>{"name": "search", "arguments": {"query": "a"}}</tool_call>', Search(("a",))),
        ("<tool_call> who wrote Quiet Raven </tool_call>", Search(("who wrote Quiet Raven",))),
        ('<tool_call>{"name": "search", "arguments": {"query_list": []}}</tool_call>', "empty"),
        ('<tool_call>{"name": "search", "arguments": {"query_list": [1]}}</tool_call>', "list of strings"),
        ('<tool_call>{"name": "search", "arguments": "x"}</tool_call>', "no arguments"),
        ('<tool_call>{"name": "shell", "arguments": {}}</tool_call>', "no tool of that name"),
        ('<tool_call>{"name": "search", </tool_call>', "not valid JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "must be"),
        ("<tool_call>\nsomething", "not closed"),
        ('<tool_call>{"name": "search", "arguments": {"query_list": ["' + "x" * 2000 + '"]}}</tool_call>', "at most"),
        ("<tool_call>x</tool_call><tool_response>made up</tool_response><answer>y</answer>", "only the search tool"),
        ("<tool_call>x</tool_call><answer>a guess</answer>", Search(("x",))),
        ("<answer>y</answer><tool_call>x</tool_call>", Answer("y")),
        ("<think> I do not know </think>", EndOfTurn()),
    ],
)  # fmt: skip
def test_qwen_tools_parses(tokenizer, text, expected):
    action = load_protocol("qwen_tools", tokenizer).parse(text)
    if isinstance(expected, str):
        assert isinstance(action, Invalid) and expected in action.problem
    else:
        assert action == expected


def test_a_call_of_a_users_tool_is_a_tool_call(tokenizer):
    tool = {"type": "function", "function": {"name": "multiply", "parameters": {}}}
    protocol = load_protocol("qwen_tools", tokenizer, tools=[tool])
    call = json.dumps({"name": "multiply", "arguments": {"a": 2, "b": 3}})
    assert protocol.parse(f"<tool_call>{call}</tool_call>") == ToolCall("multiply", {"a": 2, "b": 3})


def test_search_r1_parses(tokenizer):
    protocol = load_protocol("search_r1", tokenizer)
    assert protocol.parse("<think> t </think>\n<search> a query </search>") == Search(("a query",))
    assert isinstance(protocol.parse("<search> a query"), Invalid)
    assert isinstance(protocol.parse("<search> </search>"), Invalid)
    assert isinstance(protocol.parse("<information>mine</information><answer>x</answer>"), Invalid)


# Pitfall 6: a passage can neither answer nor call a tool nor end a turn.
@pytest.mark.parametrize("name", NAMES)
@common
@given(text=hostile)
def test_untrusted_text_is_inert(tokenizer, name, text):
    protocol = load_protocol(name, tokenizer)
    ids, _ = protocol.observation_ids(Observation(documents=(text, text)), max_tokens=4000, turn_closed=True)
    clean, _ = protocol.observation_ids(Observation(documents=("x", "x")), max_tokens=4000, turn_closed=True)
    names = (
        "<answer>",
        "</answer>",
        " </answer>",
        "<tool_call>",
        "</tool_call>",
        "</tool_response>",
        "</information>",
    )
    dangerous = {tokenizer.convert_tokens_to_ids(token) for token in (*tokenizer.all_special_tokens, *names)}
    assert [i for i in ids if i in dangerous] == [i for i in clean if i in dangerous]
    assert "<answer>" not in protocol.escape(text) and "<|im_end|>" not in protocol.escape(text)


# Pitfall 4: each document is truncated in tokens, the frame never.
@pytest.mark.parametrize("name", NAMES)
@common
@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=5),
    budget=st.integers(0, 300),
    notice=st.sampled_from(["", "You have no searches left: answer now."]),
    closed=st.booleans(),
)
def test_observations_fit_their_budget_and_keep_their_frame(tokenizer, name, lengths, budget, notice, closed):
    protocol = load_protocol(name, tokenizer)
    documents = tuple(f"Doc {i + 1}" + " Mira" * length for i, length in enumerate(lengths))
    observation = Observation(documents=documents, notice=notice)
    frame, _ = protocol.observation_ids(Observation(notice=notice), max_tokens=10_000, turn_closed=closed)
    written = protocol.observation_ids(observation, max_tokens=budget, turn_closed=closed)
    if written is None:
        assert budget < len(frame)
        return
    ids, text = written
    assert len(ids) <= budget
    closing = protocol.closing_ids
    assert list(ids[len(ids) - len(closing) :]) == closing and notice in text
    whole, _ = protocol.observation_ids(observation, max_tokens=10_000, turn_closed=closed)
    if len(whole) <= budget:
        assert ids == whole and all(document in text for document in documents)


@given(st.lists(st.integers(1, 300), max_size=6), st.integers(0, 1000))
def test_fair_limit_uses_the_room_evenly(lengths, room):
    limit, kept = fair_limit(lengths, room)
    used = sum(min(length, limit) for length in lengths[:kept])
    assert used <= room
    if sum(lengths) <= room:
        assert kept == len(lengths) and (not lengths or limit >= max(lengths))
    elif kept:
        assert limit >= MIN_DOCUMENT_TOKENS or used == sum(lengths[:kept])
        # One more token for each would not fit.
        assert sum(min(length, limit + 1) for length in lengths[:kept]) > room or used == sum(lengths[:kept])


def test_qwen_tools_agrees_with_the_chat_template(tokenizer):
    """The concatenated ids of prompt, turn and observation spell what the template renders for the conversation."""
    protocol = load_protocol("qwen_tools", tokenizer, instruction="")
    messages = protocol.messages("Who wrote Quiet Raven?")
    call = '<tool_call>\n{"name": "search", "arguments": {"query_list": ["x"]}}\n</tool_call>'
    ids, text = protocol.observation_ids(Observation(documents=("Doc 1 it",)), max_tokens=500, turn_closed=True)
    spelled = protocol.decode([*protocol.prompt_ids(messages), *protocol.encode(call + "<|im_end|>"), *ids])
    rendered = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": call}, {"role": "tool", "content": text}],
        tools=protocol.tools,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert spelled == rendered


# Pitfall 3: tokens that close a turn for the policy belong to the observation.
def test_an_open_turn_is_closed_in_the_observation(tokenizer):
    protocol = load_protocol("qwen_tools", tokenizer)
    closed, _ = protocol.observation_ids(Observation(documents=("x",)), max_tokens=500, turn_closed=True)
    open_, _ = protocol.observation_ids(Observation(documents=("x",)), max_tokens=500, turn_closed=False)
    assert open_ == (tokenizer.eos_token_id, *closed)


def test_a_template_without_tools_is_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"needs a chat template.*search_r1"):
        load_protocol("qwen_tools", bare)
    bare.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="does not show the tools to the policy"):
        load_protocol("qwen_tools", bare)
    prompt = load_protocol("search_r1", copy.deepcopy(bare)).prompt_ids([{"role": "user", "content": "Q"}])
    assert tokenizer.decode(list(prompt)) == "Q<|im_end|>"


def test_an_unknown_protocol_lists_the_known_ones(tokenizer):
    with pytest.raises(ValueError, match="qwen_inline, qwen_tools, search_r1"):
        load_protocol("react", tokenizer)


def test_an_installed_package_adds_a_protocol(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "toy_protocol.py").write_text(
        "from trl_search.protocols import SearchR1\n\n\nclass Toy(SearchR1):\n    name = 'toy'\n"
    )
    info = tmp_path / "toy_protocol-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-protocol\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[trl_search.protocols]\ntoy = toy_protocol:Toy\ngone = toy_protocol:Gone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert protocol_names()[-2:] == ["gone", "toy"]
    assert load_protocol("toy", tokenizer).name == "toy"
    with pytest.raises(UserError, match=r"protocol 'gone' of package 'toy-protocol'.*cannot be imported"):
        load_protocol("gone", tokenizer)
    with pytest.raises(UserError, match="did you mean 'toy'"):
        load_protocol("toi", tokenizer)
