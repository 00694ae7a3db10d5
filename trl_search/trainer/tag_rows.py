"""Detects and initialises tags of the protocol whose embeddings were never trained.

In Qwen2.5-Coder, `<tool_call>` and `</tool_call>` have the same embedding as two thousand unused rows of the
vocabulary (their relative distance is below 1 %). Such a policy cannot distinguish the tags, and in place of a tag it
samples any of those rows: rare tokens of other scripts. Supervised steps at a small learning rate do not fix this.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from trl_search.common.errors import UserError
from trl_search.policies.probe import bare_model
from trl_search.protocols import Protocol
from trl_search.types import Answer, Search

logger = logging.getLogger(__name__)

# Two rows closer than this share of their norm count as the same. Trained rows are never this close.
_SAME = 0.1
# The norm of the random offset of initialised rows, as a share of their norm.
_APART = 0.3
_CHUNK_ROWS = 16_384


def tag_ids(protocol: Protocol) -> dict[str, int]:
    """The added tokens (not pieces of text) with which a policy calls, answers and ends its turn."""
    tokenizer = protocol.tokenizer
    written = [protocol.write("x", action) for action in (Search(("x",)), Answer("x"))]
    ids = {token for text in written for token in protocol.encode(text)} & set(tokenizer.added_tokens_decoder)
    return {str(tokenizer.convert_ids_to_tokens(token)): token for token in sorted(ids | set(protocol.stop_token_ids))}


def untrained_tags(model: PreTrainedModel, protocol: Protocol) -> dict[str, int]:
    """Tags that share their embedding with other tokens, and the number of those tokens.

    Example:
        >>> untrained_tags(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-Coder-0.5B-Instruct"), protocol)
        {'<tool_call>': 2839, '</tool_call>': 2839}
    """
    tags = tag_ids(protocol)
    counts: dict[str, int] = {}
    for rows_VD in _tables(model):
        if rows_VD.numel():  # empty under ZeRO-3, where no process has the whole table
            for tag, token in tags.items():
                if same := _same_rows(rows_VD, token):
                    counts[tag] = max(same, counts.get(tag, 0))
    return counts


def warn_of_untrained_tags(model: PreTrainedModel, protocol: Protocol) -> None:
    """Warns at the start about tags that the policy cannot write yet, and names remedies."""
    found = untrained_tags(model, protocol)
    if found:
        tags = ", ".join(f"{tag} (the same as {count} other rows)" for tag, count in found.items())
        logger.warning(
            "The embeddings of these tags were never trained: %s. The policy will write random rare tokens in their "
            "place. Set protocol: search_r1, whose tags are plain text, or start with a cold start that initialises "
            "the embeddings: trl-search sft ... --initialise_tags.",
            tags,
        )


@torch.no_grad()
def initialise_tags(model: PreTrainedModel, protocol: Protocol) -> list[str]:
    """Gives each untrained tag the mean embedding of its own text: that of `<`, `tool`, `_call` and `>`.

    Returns:
        `list[str]`: The tags that were initialised.

    Raises:
        UserError: if no process has the whole vocabulary (ZeRO-3).
    """
    if not all(rows_VD.numel() for rows_VD in _tables(model)):
        raise UserError("initialise_tags needs the whole vocabulary in one process: use ZeRO-2 instead of ZeRO-3")
    tags = {tag: token for tag, token in tag_ids(protocol).items() if tag in untrained_tags(model, protocol)}
    for rows_VD in _tables(model):
        for tag, token in tags.items():
            # Encoded in two parts, so that the tokenizer does not recognise the tag.
            pieces = [*protocol.encode(tag[:1]), *protocol.encode(tag[1:])]
            mean_D = rows_VD[pieces].float().mean(dim=0)
            # Noise, because an opening and a closing tag differ in one piece only, and their means may be too close.
            noise_D = torch.randn(mean_D.shape, generator=torch.Generator().manual_seed(token)).to(mean_D)
            rows_VD[token] = (mean_D + _APART * mean_D.norm() * noise_D / noise_D.norm()).to(rows_VD.dtype)
    if tags:
        logger.info("Initialised the embeddings of %s from their text", ", ".join(tags))
    return list(tags)


def _tables(model: PreTrainedModel) -> Iterable[torch.Tensor]:
    """The input and output embeddings, (V, hidden) each; one table if they are tied."""
    bare = bare_model(model)
    tables = [bare.get_input_embeddings().weight, bare.get_output_embeddings().weight]
    return tables[:1] if tables[0] is tables[1] else tables


@torch.no_grad()
def _same_rows(rows_VD: torch.Tensor, token: int) -> int:
    row_D = rows_VD[token].float()
    near = _SAME * row_D.norm()
    return sum(int(((part.float() - row_D).norm(dim=1) <= near).sum()) for part in rows_VD.split(_CHUNK_ROWS)) - 1
