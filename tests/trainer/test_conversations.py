"""Conversations that are given as prompts reach the policy whole, or are refused before anything is generated."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from tests.support.scripted_trainer import real_trainer
from trl_search.common.errors import UserError

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
