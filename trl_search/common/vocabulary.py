"""Rejects a tokenizer without a vocabulary, which transformers builds from a folder without tokenizer files."""

from __future__ import annotations

from typing import Any

from trl_search.common.errors import UserError


def refuse_empty_tokenizer(tokenizer: Any, name: str) -> None:
    """Checks a tokenizer of transformers; other tokenizers pass.

    Raises:
        UserError: if the tokenizer has only special tokens, so that it would encode every text as unknown or empty.
    """
    if hasattr(tokenizer, "all_special_ids") and len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"{name} holds no tokenizer: it has special tokens but no vocabulary. Copy tokenizer.json and "
            "tokenizer_config.json there from the base model"
        )
