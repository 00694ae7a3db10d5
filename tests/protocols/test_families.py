"""Each model family with each protocol, with miniature tokenizers (`tests/support/families.py`)."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import add_response_schema

from tests.support.fakes import FixedRetriever
from tests.support.families import FAMILIES, SMOLLM2, Family, make_tokenizer
from trl_search.data.scripted_players import as_sampled, play_scripts
from trl_search.environment import SearchEnvironment
from trl_search.protocols import Protocol, load_protocol
from trl_search.protocols.call_formats import CALL_FORMATS
from trl_search.protocols.calls import NO_SUCH_TOOL, call_of
from trl_search.protocols.tool_template import call_history, write_turn
from trl_search.rewards.tag_structure import format_score
from trl_search.types import Answer, Observation, Passage, Search, StopReason

QUERIES = ('who wrote "Quiet Raven" [1], {it\'s} here?', "Zürich\nLausanne")
NATIVE = [name for name, family in FAMILIES.items() if family.form]
# In these families, a turn may end with several tokens besides the EOS.
TWO_ENDS = {
    "Llama 3.1": ("<|eot_id|>", "<|eom_id|>"),
    "Gemma 3": ("<end_of_turn>",),
    "Phi-3, Phi-4": ("<|end|>",),
    "Phi-4-mini": ("<|end|>",),
    "Gemma 4": ("<turn|>", "<|tool_response>"),
    "gpt-oss": ("<|return|>", "<|call|>"),
    "GLM-4.5": ("<|user|>", "<|observation|>"),
    "GLM-4.7": ("<|user|>", "<|observation|>"),
}


@functools.cache
def protocol_of(family: str, name: str = "") -> Protocol:
    name = name or ("qwen_tools" if FAMILIES[family].form else "search_r1")
    return load_protocol(name, FAMILIES[family].tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_template_has_its_call_format_or_is_refused(family):
    form = FAMILIES[family].form
    if form is None:
        with pytest.raises(ValueError, match="search_r1"):
            protocol_of(family, "qwen_tools")
    else:
        assert protocol_of(family, "qwen_tools").call_format.name == form
    assert protocol_of(family, "search_r1").tokenizer.eos_token_id in protocol_of(family, "search_r1").stop_token_ids


@pytest.mark.parametrize("family", ["Kimi K2", "MiniMax-M2", "OLMo 3", "Llama Nemotron Super 1.5"])
def test_an_unknown_format_of_calls_is_refused(family):
    """qwen_inline was accepted, and the prompt taught the policy two formats."""
    for name in ("qwen_tools", "qwen_inline"):
        with pytest.raises(ValueError, match=r"writes calls in an unknown format.*: use protocol='search_r1'"):
            protocol_of(family, name)
    assert load_protocol("qwen_inline", FAMILIES[family].tokenizer(), tools=()).call_format.name == "hermes"


@pytest.mark.parametrize("family", ["Kimi K2", "Llama 3", "Gemma 3"])
def test_with_other_tools_than_search_the_remedy_is_not_a_protocol_that_refuses_them(family):
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
    with pytest.raises(ValueError, match="use a model whose template can") as error:
        load_protocol("qwen_tools", FAMILIES[family].tokenizer(), tools=tools)
    assert "search_r1" not in str(error.value)


def test_with_other_tools_qwen_inline_names_only_the_protocol_that_takes_them():
    """search_r1 was named, too, which refuses them."""
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
    with pytest.raises(ValueError, match=r"use protocol='qwen_tools'$"):
        load_protocol("qwen_inline", FAMILIES["Qwen3-Coder"].tokenizer(), tools=tools)


@pytest.mark.parametrize("family", NATIVE)
def test_a_rendered_call_is_parsed(family):
    protocol = protocol_of(family)
    context = protocol.prompt_ids(protocol.messages("Who?"))
    for action in (Search(QUERIES), Answer("Lyon, 1899")):
        written = protocol.write("I <could> search.", action)
        written = written.removeprefix("<think>") if protocol.opened_thought(context) else written
        for end in ([], *([index] for index in protocol.stop_token_ids)):
            assert protocol.parse(protocol.read_turn([*protocol.encode(written), *end], context=context)) == action
    hostile = protocol.write("<answer>Lyon</answer>", Search(QUERIES))
    assert protocol.parse(protocol.read_turn(protocol.encode(hostile))) == Search(QUERIES)


def test_gpt_oss_writes_thought_call_and_answer_in_their_channels():
    protocol = protocol_of("gpt-oss")
    analysis = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    call = ' to=functions.search<|channel|>commentary json<|message|>{"query_list": ["x"]}'
    assert protocol.write("hm", Search(("x",))) == analysis + call
    answered = protocol.write("hm", Answer("Lyon"))
    assert answered == f"{analysis}<|channel|>final<|message|><answer> Lyon </answer>"
    assert protocol.read_turn(protocol.encode(answered)) == "<think>hm</think><answer> Lyon </answer>"
    browser = '<|channel|>analysis to=browser.search code<|message|>{"query": "x"}<|call|>'  # it was trained with it
    assert protocol.parse(protocol.read_turn(protocol.encode(browser))) == NO_SUCH_TOOL


@pytest.mark.parametrize("family", NATIVE)
def test_our_parser_agrees_with_the_response_parser_of_transformers(family):
    protocol = protocol_of(family)
    try:
        tokenizer = add_response_schema(FAMILIES[family].tokenizer())
    except ValueError:
        pytest.skip("TRL has no response template for this chat template")
    prompt = protocol.decode(protocol.prompt_ids(protocol.messages("Who?")))
    queries = ("author of Quiet Raven", "Mira [Talvane]")
    written = write_turn(protocol.template, protocol.show, call_of(Search(queries)))
    end = protocol.tokenizer.convert_ids_to_tokens(protocol.turn_end_id)
    parsed = tokenizer.parse_response(written + end, prefix=prompt, tools=protocol.tools)
    assert [call["function"]["arguments"]["query_list"] for call in parsed["tool_calls"]] == [list(queries)]


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("closed", [True, False])
def test_an_observation_extends_the_prompt_exactly(family, closed):
    """The concatenated ids of prompt, call and observation spell what the template renders for the conversation."""
    protocol = protocol_of(family)
    history = call_history(call_of(Search(QUERIES)), protocol.template.message)
    prompt = protocol.prompt_ids(history[:1])
    call = protocol.encode(write_turn(protocol.template, protocol.show, call_of(Search(QUERIES))))
    call += [protocol.turn_end_id] if closed else []
    observation = Observation(documents=('Doc 1 "x"\n<b>',), notice="Go on.")
    ids, said = protocol.observation_ids(observation, max_tokens=2000, turn_closed=closed, turn_ids=call)
    history[2]["content"] = 'Doc 1 "x"\n<b>\nGo on.'
    assert said == protocol.quote(history[2]["content"])
    spelled = protocol.decode([*prompt, *call, *ids])
    rendered = protocol.render_messages(history, add_generation_prompt=True)
    if FAMILIES[family].pieces == "sentencepiece":  # this tokenizer puts a space after each control token
        spelled, rendered = spelled.replace(" ", ""), rendered.replace(" ", "")
    # Nemotron's template drops the newline of a thought that the prompt began.
    assert spelled.replace("<think>\n<think>", "<think>") == rendered


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("family", ["Qwen3", "Qwen3.5, thinking", "Qwen3.5, not thinking"])
def test_qwen3_works_with_thinking_on_and_off(family, thinking):
    """With thinking off, the prompt contains an empty thought, which the template leaves out of earlier turns."""
    tokenizer = FAMILIES[family].tokenizer()
    protocol = load_protocol("qwen_tools", tokenizer, chat_template_kwargs={"enable_thinking": thinking})
    prompt = protocol.prompt_ids(protocol.messages("Who?"))
    written = protocol.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert written == (family == "Qwen3.5, not thinking" or not thinking) or family == "Qwen3.5, not thinking"
    for action in (Search(QUERIES), Answer("Lyon")):
        text = protocol.write("hm", action)
        text = text.removeprefix("<think>") if protocol.opened_thought(prompt) else text
        assert protocol.parse(protocol.read_turn(protocol.encode(text), context=prompt)) == action
    ids, _ = protocol.observation_ids(Observation(documents=("x",)), max_tokens=500, turn_closed=True)
    assert protocol.decode(ids).endswith(protocol.decode(prompt).rpartition("<|im_start|>")[2])


def test_a_reply_repeats_the_id_of_the_call():
    protocol = protocol_of("Mistral 7B")
    call = '[TOOL_CALLS] [{"name": "search", "arguments": {"query_list": ["x"]}, "id": "aB3dE6gH9"}]'
    assert protocol.parse(protocol.read_turn(protocol.encode(call))) == Search(("x",))
    ids, _ = protocol.observation_ids(
        Observation(documents=("Doc 1",)), max_tokens=500, turn_closed=False, turn_ids=protocol.encode(call)
    )
    assert '"call_id": "aB3dE6gH9"' in protocol.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_that_ends_a_turn_is_a_stop_token(family):
    protocol = protocol_of(family)
    ends = [protocol.tokenizer.convert_ids_to_tokens(index) for index in protocol.stop_token_ids]
    assert FAMILIES[family].eos in ends
    assert set(TWO_ENDS.get(family, ())) <= set(ends)
    if family == "gpt-oss":  # its thoughts end with <|end|>, but the turn continues
        assert "<|end|>" not in ends


@pytest.mark.parametrize(
    ("family", "end"),
    [("Phi-4-mini", "<|end|>"), ("GLM-4.5", "<|user|>"), ("gpt-oss", "<|return|>"), ("Llama 3.1", "<|eot_id|>")],
)
def test_a_script_ends_its_answer_as_the_template_does(family, end):
    """Else a cold start teaches two ends, of which one is in no conversation of the template."""
    protocol = protocol_of(family)
    said = as_sampled(protocol.write("hm", Answer("x")), protocol, [], ends=True, stop=())
    assert protocol.tokenizer.convert_ids_to_tokens(said.ids[-1]) == end


# Untrusted text


def hostile_texts(family: str) -> st.SearchStrategy[str]:
    contents = [token.content for token in FAMILIES[family].tokenizer().added_tokens_decoder.values()]
    tags = ["</answer>", "<tool_call>", "</tool_response>", "</information>", "<<SYS>>", "[INST]"]
    pieces = st.one_of(
        st.sampled_from([*contents, *tags]), st.characters(), st.just("\ud83d"), st.just("\ud83d\ude00")
    )
    return st.lists(pieces, max_size=8).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrusted_text_contains_no_control_tokens(family):
    protocol = protocol_of(family)
    frame, _ = protocol.observation_ids(Observation(), max_tokens=9999, turn_closed=True)
    control = protocol.control.ids
    bare = sum(index in control for index in frame)

    @settings(max_examples=25)
    @given(hostile_texts(family))
    def check(text):
        ids, _ = protocol.observation_ids(
            Observation(documents=(text, text), notice=text), max_tokens=9999, turn_closed=True
        )
        assert sum(index in control for index in ids) == bare
        assert control.isdisjoint(protocol.encode(protocol.escape(text)))
        rag = protocol.prompt_ids([{"role": "user", "content": protocol.escape(text)}])
        assert sum(i in control for i in rag) == sum(
            i in control for i in protocol.prompt_ids([{"role": "user", "content": "x"}])
        )
        asked, plain = (protocol.prompt_ids(protocol.messages(question)) for question in (text, "x"))
        assert sum(index in control for index in asked) == sum(index in control for index in plain)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_added_token_that_looks_like_control_counts_as_control(family):
    protocol = protocol_of(family)
    contents = [protocol.tokenizer.convert_ids_to_tokens(index) for index in protocol.control.ids]
    expected = {FAMILIES[family].eos, *FAMILIES[family].special, *FAMILIES[family].words}
    assert expected <= set(contents)
    # Years and runs of spaces are text, even if they are added tokens.
    year = protocol.tokenizer.convert_tokens_to_ids("2024")
    assert year not in protocol.control.ids and year in protocol.control.encode("in 2024")


def test_full_width_letters_do_not_become_control_tokens():
    tokenizer = Family(SMOLLM2, None, "</s>", ("[INST]",), pieces="normalising").tokenizer()
    eos = tokenizer.eos_token_id
    assert eos in tokenizer.encode("\uff1c/s\uff1e")
    protocol = load_protocol("search_r1", tokenizer)
    ids, _ = protocol.observation_ids(
        Observation(documents=("\uff1c/s\uff1e",), notice="\uff3bINST\uff3d"), max_tokens=999, turn_closed=True
    )
    assert protocol.control.ids.isdisjoint(ids)
    assert eos not in tokenizer.encode(protocol.escape("a \uff1c/s\uff1e b"))


def test_a_sentencepiece_tokenizer_puts_no_spaces_between_pieces():
    protocol = protocol_of("Mistral 7B")
    tokenizer = protocol.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x", add_special_tokens=False)) == ["▁", "x"]
    assert tokenizer.convert_ids_to_tokens(protocol.encode("x")) == ["x"]
    assert tokenizer.convert_ids_to_tokens(protocol.encode(" x")) == ["▁", "x"]


def test_a_base_model_without_a_template_gets_its_bos():
    from tokenizers import processors

    tokenizer = FAMILIES["Llama 3"].tokenizer()
    tokenizer.chat_template = None
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    protocol = load_protocol("search_r1", tokenizer, instruction="")
    prompt = protocol.prompt_ids(protocol.messages("Who?"))
    assert protocol.decode(prompt) == f"{bos}Who?\n"
    assert tokenizer.bos_token_id not in protocol.encode("Who?")


def test_a_template_that_refuses_a_system_message_is_reported_at_the_start():
    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    ignoring = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    for template in (refusing, ignoring):
        tokenizer = make_tokenizer(FAMILIES["SmolLM2"], template)
        load_protocol("search_r1", tokenizer)
        with pytest.raises(ValueError, match=r"system message.*put the text of system_prompt into instruction"):
            load_protocol("search_r1", tokenizer, system_prompt="Be brief.")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scripted_rollout_is_well_formed(family):
    """A prompt that begins a thought does not lower the format score, and scripted players do not begin it again."""
    protocol = protocol_of(family)

    def script():
        yield "I need the author.", Search(("author of Quiet Raven",))
        yield "It is Mira Talvane.", Answer("Mira Talvane")

    environment = SearchEnvironment(
        FixedRetriever([Passage("1", "Quiet Raven", "by Mira Talvane </answer> <|im_end|>")])
    )
    prompt = protocol.prompt_ids(protocol.messages("Who wrote Quiet Raven?"))
    (trajectory,) = play_scripts([script()], [prompt], protocol, environment)
    assert trajectory.stop_reason is StopReason.ANSWER and trajectory.searches == 1
    assert format_score(trajectory.spoken) == 1.0
    whole = protocol.decode([*prompt, *trajectory.ids])
    assert "<think>\n<think>" not in whole and "<think><think>" not in whole


@pytest.mark.parametrize("family", NATIVE)
@settings(max_examples=30)
@given(data=st.data())
def test_parsing_never_raises(family, data):
    protocol = protocol_of(family)
    form = protocol.call_format
    pieces = ("<think>", "</think>", *'{}[]"=x\n', "call:search{", "search(", "<function=search>", "</function>")
    marks = [form.opening, form.closing, *pieces, "[ARGS]", "<arg_key>", "<|channel|>analysis<|message|>"]
    text = "".join(data.draw(st.lists(st.sampled_from(marks), max_size=15)))
    protocol.parse(form.canonical(text))


@pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda form: form.name)
def test_every_call_format_is_parsed_in_linear_time(form):
    pieces = ["<tool_call>", "<function=a></function>", "<parameter=a>", "<arg_key>a</arg_key>", '<|"|>', "[", "a(b=",
              "-", "<|channel|>analysis<|message|>", "<|end|>", "[TOOL_CALLS]", "<think>", " ", "{,a:"]  # fmt: skip
    started = time.process_time()
    for piece in pieces:
        form.canonical((form.opening or "{") + piece * (200_000 // len(piece)) + form.closing)
    assert time.process_time() - started < 4  # a quadratic parser needs minutes


def test_the_table_of_models_agrees_with_the_code():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line]
    table = {row[0]: row[1:] for row in rows}
    for name, family in FAMILIES.items():
        native, template = table[name][0], table[name][1]
        assert native == (f"`{family.form}`" if family.form else "refused: `search_r1`"), name
        assert template == (f"TRL's `{family.template}`" if len(family.template) < 60 else "rebuilt"), name
