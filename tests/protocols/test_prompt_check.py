"""Templates that do not show the policy what it is asked are refused when the protocol is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl

from tests.support.families import FAMILIES, SMOLLM2, make_tokenizer
from trl_search.common.errors import UserError
from trl_search.protocols import load_protocol

IMAGES = (Path(trl.__file__).parent / "chat_templates" / "llava_next.jinja").read_text(encoding="utf-8")
# As in Nemotron Nano 2, where "/think" switches the thinking on.
WITHOUT_THINK = SMOLLM2.replace("m.content", "m.content.replace('/think', '')")
NEEDS_TOOLS = "{% for t in tools %}{% endfor %}" + SMOLLM2
ONE_QUESTION = "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}" + SMOLLM2


@pytest.mark.parametrize(
    ("template", "protocol", "told"),
    [
        (IMAGES, "search_r1", "does not show the question, as those for images.*: set tokenizer.chat_template"),
        (IMAGES, "qwen_tools", "does not show the question"),
        (WITHOUT_THINK, "search_r1", r"\('inside <think> and </think> first.*: set an instruction without this text"),
        (WITHOUT_THINK, "qwen_tools", "changes the question"),
        (NEEDS_TOOLS, "search_r1", r"fails on a question \('NoneType' object is not iterable\)"),
        (ONE_QUESTION, "search_r1", r"fails on a conversation of question, answer and question \(one message\)"),
        (None, "qwen_inline", "'qwen_inline' needs a chat template, .*use protocol='search_r1'"),
    ],
)
def test_a_template_that_cannot_ask_is_refused(template, protocol, told):
    with pytest.raises(UserError, match=told):
        load_protocol(protocol, make_tokenizer(FAMILIES["SmolLM2"], template))


def test_another_instruction_avoids_what_a_template_removes():
    tokenizer = make_tokenizer(FAMILIES["SmolLM2"], WITHOUT_THINK)
    protocol = load_protocol("search_r1", tokenizer, instruction="Search, then answer: ")
    assert "Search, then answer: Who?" in protocol.decode(protocol.prompt_ids(protocol.messages("Who?")))


def test_a_tokenizer_may_have_several_templates():
    """Hermes and Command R have one with tools and one without; the markers of thoughts are those of both."""
    family = FAMILIES["Qwen3"]
    several = {"default": SMOLLM2 + "{# [THINK] #}", "tool_use": family.tokenizer().chat_template}
    tokenizer = make_tokenizer(family, several)
    assert load_protocol("qwen_tools", tokenizer).call_format.name == "hermes"
    protocol = load_protocol("search_r1", tokenizer)
    assert protocol.read_turn(protocol.encode("[THINK]hm[/THINK]")) == "<think>hm</think>"
    with pytest.raises(UserError, match="multiple chat templates with no default"):
        load_protocol("search_r1", make_tokenizer(family, {"rag": SMOLLM2}))


@pytest.mark.parametrize(
    ("family", "option", "told"),
    [
        ("Qwen3", "enable_thinkin", "did you mean 'enable_thinking'"),
        (
            "Qwen3-2507",
            "enable_thinking",
            "does not read 'enable_thinking' of chat_template_kwargs, so it has no effect: leave it out",
        ),
        ("Qwen3", "chat_template", "does not read 'chat_template'"),
    ],
)
def test_an_option_that_the_template_does_not_read_is_refused(family, option, told):
    with pytest.raises(UserError, match=told):
        load_protocol("search_r1", FAMILIES[family].tokenizer(), chat_template_kwargs={option: False})
