"""A server whose tokenizer is another one is refused; one that cannot be asked is left to the policy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.servers import Asked, Said, serving
from trl_search.common.errors import UserError
from trl_search.evaluation.backends import Backend, open_policy
from trl_search.policies.server_tokenizer import refuse_other_tokenizer


@pytest.mark.parametrize("said", [Said({"error": "no tokenizer"}, 400), Said({"tokens": None}), Said(b"no JSON")])
def test_a_server_that_does_not_tokenize_is_left_to_the_policy(tokenizer: Any, said: Said) -> None:
    with serving(lambda asked: said) as server:
        refuse_other_tokenizer(server.url, tokenizer, "me/model")
    refuse_other_tokenizer(server.url, tokenizer, "me/model")  # nor one that is down


def test_an_evaluation_refuses_a_server_of_another_model(tokenizer: Any) -> None:
    shift = 0

    def tokenize(asked: Asked) -> Said:
        ids = tokenizer.encode(asked.json["prompt"], add_special_tokens=False)
        return Said({"tokens": [(token + shift) % len(tokenizer) for token in ids]})

    with serving(tokenize) as server:
        backend = Backend("vllm_server", server=server.url, served_model="policy")
        with open_policy(backend, "me/model", tokenizer):
            assert server.asked[0].json["model"] == "policy"
        shift = 1
        refused = pytest.raises(UserError, match=r"another tokenizer than me/model, so it serves another model")
        with refused, open_policy(backend, "me/model", tokenizer):
            pass
