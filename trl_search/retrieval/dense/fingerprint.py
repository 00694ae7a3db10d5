"""Identifies an encoder: an index records the fingerprint of its encoder, and is searched with no other encoder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

from trl_search.common.errors import UserError


@dataclass(frozen=True)
class EncoderFingerprint:
    """Only vectors from encoders with equal fingerprints may be compared."""

    name: str  # the name that it was loaded by. For messages only: a moved folder is the same encoder.
    weights: str  # SHA-256 over the tensors, in the checkpoint's own precision
    pooling: str | None  # the pooling chosen for a plain checkpoint; `None` if the model's files define it
    modules: str  # the modules of the model: `"Transformer + Pooling(mean) + Normalize"`
    query_prompt: str  # text before every query
    passage_prompt: str  # text before every passage
    max_length: int  # tokens of a text that are read, including prompt and special tokens
    normalize: bool  # whether vectors have length 1
    dim: int  # numbers per vector
    query_encoder: str | None = None  # the checkpoint that encodes queries, if it is a different one
    query_weights: str | None = None  # SHA-256 over its tensors

    def differences(self, other: EncoderFingerprint) -> list[str]:
        """Describes the differences: `["max_length is 256, not 512"]`; `[]` for the same encoder."""
        # `modules` already names the pooling.
        named = [field.name for field in fields(self) if field.name not in ("name", "pooling", "query_encoder")]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in named]
        return [f"{name} is {_short(mine)}, not {_short(its)}" for name, mine, its in pairs if mine != its]

    @property
    def options(self) -> dict[str, Any]:
        """The options of `load_encoder`, apart from the name, that load this encoder."""
        names = ("max_length", "query_prompt", "passage_prompt", "pooling", "normalize", "query_encoder")
        return {name: getattr(self, name) for name in names}


def refuse_other_encoder(encoder: EncoderFingerprint, recorded: EncoderFingerprint, where: str) -> None:
    """Fails unless `encoder` is the one whose fingerprint an index recorded.

    Raises:
        UserError: if it is a different encoder.
    """
    if differences := encoder.differences(recorded):
        raise UserError(
            f"encoder {encoder.name!r} is not the one {where} was built with ({recorded.name!r}): its "
            f"{', '.join(differences)}; load the index with that encoder, or build it again with this one"
        )


def hash_weights(model: Any) -> str:
    """Hashes the values of the tensors, not files or names: the same weights are the same encoder, even if saved again
    or renamed by a later release of transformers."""
    import torch

    digests = []
    for name, tensor in model.state_dict().items():
        if ".pooler." in name:  # unused here, and random if the checkpoint has none
            continue
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digests.append(hashlib.sha256(raw.numpy()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:12]}...'"
