"""A tokenizer for TRL that does not decode, for use during our rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class UnreadTokenizer:
    """Keeps TRL from decoding and parsing completions.

    TRL would decode each trajectory, observations included, into one string. The string is not used, takes a second
    in a step of 700k tokens, and may not parse.
    """

    response_template = response_schema = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def batch_decode(self, sequences: Sequence[Any], **options: Any) -> list[str]:
        return [""] * len(sequences)
