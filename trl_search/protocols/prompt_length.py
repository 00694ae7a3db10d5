"""Finds the prompts that are too long for a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from trl_search.protocols.base import Protocol


def too_long_prompts(prompts: Sequence[Any], protocol: Protocol, room: int) -> dict[int, int]:
    """The lengths in tokens of the prompts that are longer than `room`, by row."""
    frame = len(protocol.prompt_ids(protocol.messages("")))
    found: dict[int, int] = {}
    for row, prompt in enumerate(prompts):
        # A token has at least one byte, so a prompt with few bytes need not be tokenized.
        if frame + len(json.dumps(prompt, ensure_ascii=False).encode(errors="replace")) > room:
            length = len(protocol.prompt_ids(prompt))
            if length > room:
                found[row] = length
    return found
