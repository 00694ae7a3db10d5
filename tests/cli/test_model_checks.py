"""`trl-search doctor MODEL`: one line per protocol, without a GPU and without weights."""

from __future__ import annotations

from tests.support.families import FAMILIES, make_tokenizer
from trl_search.cli.commands.doctor import is_model
from trl_search.cli.model_checks import check_control, check_protocol, model_checks
from trl_search.cli.preflight import Status


def test_a_model_is_distinguished_from_a_recipe(tmp_path):
    assert is_model("tiny") and is_model("Qwen/Qwen3-4B") and is_model(str(tmp_path))
    assert not is_model("quickstart") and not is_model("recipes/qwen3b.yaml")


def test_the_shipped_model_is_exact_in_every_protocol():
    assert {check.status for check in model_checks("tiny")} == {Status.OK}


def test_each_line_says_what_was_found():
    gemma, smollm = FAMILIES["Gemma 4"].tokenizer(), FAMILIES["SmolLM2"].tokenizer()
    assert (
        "calls: gemma, parsed back exactly; a turn ends with <turn|>, <|tool_response>"
        in check_protocol("qwen_tools", gemma).said
    )
    refused = check_protocol("qwen_tools", smollm)
    assert refused.status is Status.NOTE and "search_r1" in refused.remedy and "tools" in refused.said
    thinking = FAMILIES["Qwen3.5, thinking"].tokenizer()
    assert "the prompt opens a thought" in check_protocol("search_r1", thinking).said
    assert check_control(gemma).status is Status.OK


def test_a_model_needs_one_protocol_that_can_be_used():
    needs_tools = "{% for tool in tools %}{{ tool }}{% endfor %}" + (
        FAMILIES["Qwen2.5"].tokenizer().chat_template or ""
    )
    only_tools, none = (make_tokenizer(FAMILIES["Qwen2.5"], template) for template in (needs_tools, "Hello!"))
    refused = check_protocol("search_r1", only_tools)
    assert refused.status is Status.NOTE and refused.remedy == "set tokenizer.chat_template"
    assert check_control(only_tools).status is Status.OK
    assert check_control(none).status is Status.PROBLEM
