"""Compares the tokenizer of a vLLM server with ours: ids of another one mean other text, and nothing would fail."""

from __future__ import annotations

import httpx
from transformers import PreTrainedTokenizerBase

from trl_search.common.errors import UserError
from trl_search.policies.vllm_address import client_options

# Control tokens, other alphabets, digits and brackets: what tokenizers split differently.
PROBE = '<|im_start|>assistant\n<think> Wer schrieb „Die Mühle“? 東京 3.14 </think>\n<tool_call> {"a": [1]}<|im_end|>'


def server_ids(url: str, model: str | None = None) -> list[int]:
    """The ids that a server gives the probe.

    Raises:
        httpx.HTTPError, KeyError, ValueError: if it gives none, for example without a tokenizer.
    """
    asked = {"prompt": PROBE, "add_special_tokens": False} | ({"model": model} if model else {})
    with httpx.Client(**client_options(url)) as client:
        ids: list[int] = client.post("/tokenize", json=asked).raise_for_status().json()["tokens"]
    return ids


def refuse_other_tokenizer(url: str, tokenizer: PreTrainedTokenizerBase, name: str, served: str | None = None) -> None:
    """Refuses a server that reads ids as another text, as another model's does. One that does not answer, or has no
    tokenizer, is left to the policy."""
    try:
        theirs = _read(tokenizer, server_ids(url, served))
    except (httpx.HTTPError, KeyError, TypeError, ValueError, OverflowError):
        return
    # Two versions of transformers may split a text differently, but both read it back.
    if theirs != _read(tokenizer, tokenizer.encode(PROBE, add_special_tokens=False)):
        raise UserError(
            f"the server at {url} has another tokenizer than {name}, so it serves another model: start it with "
            f"{name}, or give the model that it serves"
        )


def _read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids, without white space."""
    return "".join(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).split())
