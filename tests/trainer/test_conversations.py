"""Conversations that are given as prompts reach the policy whole, or are refused before anything is generated."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from tests.support.families import FAMILIES
from tests.support.scripted_trainer import real_trainer
from trl_search.common.errors import UserError
from trl_search.protocols import load_protocol
from trl_search.trainer.prompts import with_prompts

ASKED = {"role": "user", "content": "Who?"}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([{"role": "human", "content": "Who?"}], {}, r"train_dataset\[0\] has a message of the role 'human'"),
        ([{"from": "human", "value": "Who?"}], {}, "has the message {'from': 'human', 'value': 'Who\\?'}: write"),
        (["Who?"], {}, "has the message 'Who\\?': write {'role': 'user'"),
        ([{"role": "user", "content": None}], {}, "has the content None: rollouts are text only"),
        ([{"role": "user", "content": [{"type": "text", "text": "Who?"}]}], {}, r"has the content .* write a string"),
        ([ASKED, {"role": "assistant", "content": "It is"}], {}, "ends with the assistant's own turn"),
        ([ASKED], {"system_prompt": "Be brief."}, "without a system message, .* so system_prompt has no effect"),
        ("  \n", {}, r"train_dataset\[0\] has no question"),
    ],
    ids=str,
)  # fmt: skip
def test_other_conversations_are_refused(
    tmp_path: Any, random_model: Any, tokenizer: Any, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        real_trainer(tmp_path, random_model, tokenizer, data=Dataset.from_list([{"prompt": prompt}] * 4), **options)


def test_a_conversation_of_several_turns_is_asked_unchanged(tmp_path: Any, random_model: Any, tokenizer: Any) -> None:
    system, said = {"role": "system", "content": "Be brief. "}, {"role": "assistant", "content": "Mira."}
    talk = [system, ASKED, said, {"role": "user", "content": " And then?"}]
    rows = [{"prompt": [ASKED]}, {"prompt": talk}] * 2
    trainer = real_trainer(tmp_path, random_model, tokenizer, data=Dataset.from_list(rows))
    assert trainer.train_dataset[1]["prompt"] == talk
    rows = [{"prompt": talk}] * 4
    trainer = real_trainer(tmp_path, random_model, tokenizer, data=Dataset.from_list(rows), system_prompt="Be long.")
    assert trainer.train_dataset[0]["prompt"] == talk


def called(name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation in which a tool was called before the question."""
    call = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}
    return [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "tool_call_id": "call00001", "content": 'By "Mira"\nin 1899.'},
        {"role": "assistant", "content": "Mira."},
        {"role": "user", "content": "And then?"},
    ]


@pytest.mark.parametrize("family", ["Qwen2.5", "Llama 3.1", "gpt-oss", "GLM-4.5"])
def test_calls_in_a_prompt_have_only_their_own_arguments(family: str) -> None:
    """A dataset gives every message and call the keys of all others, with None."""
    talks = [called("search", {"query_list": ["x"]}), called("add", {"a": 1.5}), [ASKED]]
    protocol = load_protocol("qwen_tools", FAMILIES[family].tokenizer())
    rows = with_prompts(Dataset.from_list([{"prompt": talk} for talk in talks]), protocol, [], "train_dataset")
    assert rows[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"query_list": ["x"], "a": None}
    for row, talk in zip(rows, talks, strict=True):
        assert protocol.prompt_ids(row["prompt"]) == protocol.prompt_ids(talk)


def test_a_call_that_the_template_refuses_is_found_in_any_row() -> None:
    talk = called("search", {"query_list": ["x"]})
    both = {"content": "so", "thinking": "why"}  # which gpt-oss' template does not take together with a call
    refused = [{**message, **both} if message.get("tool_calls") else message for message in talk]
    protocol = load_protocol("qwen_tools", FAMILIES["gpt-oss"].tokenizer())
    rows = Dataset.from_list([{"prompt": talk}, {"prompt": refused}])
    with pytest.raises(UserError, match=r"the prompt of train_dataset\[1\] is refused by the chat template"):
        with_prompts(rows, protocol, [], "train_dataset")
