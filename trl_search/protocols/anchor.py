"""Keeps a SentencePiece tokenizer from putting a space before a piece in the middle of a conversation.

An anchor before the piece absorbs the space, and the ids of the anchor are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_search.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "=")


def find_anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text to put before a piece, whose ids are then left out; `""` for a tokenizer that adds no space.

    Raises:
        UserError: if there is no such text.
    """
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("x", add_special_tokens=False)[:1])
    if not first or not str(first[0]).startswith("\N{LOWER ONE EIGHTH BLOCK}"):
        return ""
    for anchor in _ANCHORS:
        alone = tokenizer.encode(anchor, add_special_tokens=False)
        if all(
            tokenizer.encode(anchor + piece, add_special_tokens=False)[: len(alone)] == alone
            for piece in ("\n", "<", "x", " x")
        ):
            return anchor
    raise UserError("the tokenizer puts a space before every piece of text: set its add_prefix_space to False")
