"""Refuses a tokenizer without a vocabulary, which transformers makes of a folder that holds none."""

from __future__ import annotations

from typing import Any

from trl_search.common.errors import UserError


def refuse_empty_tokenizer(tokenizer: Any, name: str) -> None:
    """Checks a tokenizer of transformers; others are taken as they are.

    Raises:
        UserError: if it has special tokens alone: it would read every text as unknown, or as nothing.
    """
    if hasattr(tokenizer, "all_special_ids") and len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"{name} holds no tokenizer: beside special tokens it has no vocabulary. Copy tokenizer.json and "
            "tokenizer_config.json there from the model's base"
        )
