"""A tokenizer that TRL can hold while our rollouts run, and that decodes nothing for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UnreadTokenizer:
    """A tokenizer that keeps TRL from decoding and parsing completions.

    TRL would decode a trajectory into one string with the policy's words and the world's. Nobody reads that string, it
    takes a second in a step of 700k tokens, and it may not parse.
    """

    response_template = response_schema = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def batch_decode(self, sequences: Sequence[Any], **options: Any) -> list[str]:
        return [""] * len(sequences)
