"""Encoders by name: text in, vectors out, with the prefixes, pooling, length and normalisation each was trained with.

    intfloat/e5-base-v2       "query: ..." and "passage: ...", mean over the tokens, length 1, 256 tokens
    BAAI/bge-base-en-v1.5     "Represent this sentence ...: " before queries only, first token, length 1, 512 tokens
    any sentence-transformers model     as its own files say; what they leave out, as its family above

sentence-transformers does the work. What is here is the choice: the wrong pooling or a prefix too many loses half of
the passages and raises no error (RETRIEVAL.md), so a checkpoint that says nothing and is of no known family is refused
until the user says how, and every choice is in the `EncoderFingerprint` that an index
keeps of the encoder it was made with.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.common.errors import UserError, unknown_name

DTYPES = ("float32", "float16", "bfloat16")
POOLINGS = ("mean", "cls", "max", "lasttoken")
CHARACTERS_A_TOKEN = 32  # more than any text has: what lies beyond max_length tokens of them never reaches the model


@dataclass(frozen=True)
class Family:
    """How the encoders of one family are used. `name` is searched for in the last part of the encoder's name."""

    name: str
    query_prompt: str
    passage_prompt: str
    pooling: str
    max_length: int
    normalize: bool = True


FAMILIES = (
    # e5-mistral and the -instruct models put a whole instruction before the query: not these.
    Family(r"(^|[-_])e5-(small|base|large)(?!.*instruct)", "query: ", "passage: ", "mean", 256),
    Family(r"^bge-(small|base|large)-en", "Represent this sentence for searching relevant passages: ", "", "cls", 512),
    Family(r"^bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", "", "cls", 512),
    Family(r"^bge-m3", "", "", "cls", 8192),
)


@dataclass(frozen=True)
class EncoderFingerprint:
    """What makes two encoders the same: vectors of equal fingerprints may be compared, others may not.

    Args:
        name (`str`): What it was loaded as. Only for people: a moved folder is the same encoder.
        weights (`str`): SHA-256 over the tensors, in the checkpoint's own precision.
        pooling (`str`, *optional*): What was chosen for a plain checkpoint; `None` where the model says it itself.
        modules (`str`): What follows the transformer: `"Transformer + Pooling(mean) + Normalize"`.
        query_prompt (`str`): Stands before every query.
        passage_prompt (`str`): Stands before every passage.
        max_length (`int`): Tokens of a text that are read, prompt and special tokens among them.
        normalize (`bool`): Whether vectors have length 1.
        dim (`int`): Numbers a vector.
    """

    name: str
    weights: str
    pooling: str | None
    modules: str
    query_prompt: str
    passage_prompt: str
    max_length: int
    normalize: bool
    dim: int

    def differences(self, other: EncoderFingerprint) -> list[str]:
        """What differs, in words: `["max_length is 256, not 512"]`; `[]` for the same encoder."""
        # How tokens become one vector, whoever chose it, is in `modules`.
        named = [field.name for field in fields(self) if field.name not in ("name", "pooling")]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in named]
        return [f"{name} is {_short(mine)}, not {_short(its)}" for name, mine, its in pairs if mine != its]


class Encoder:
    """An encoder that is ready: `encode_queries` and `encode_passages`, float32 (n, dim). Made by `load_encoder`."""

    def __init__(self, model: Any, fingerprint: EncoderFingerprint) -> None:
        self._model, self.fingerprint = model, fingerprint
        # Two threads in one tokenizer fail with "Already borrowed".
        self._lock = threading.Lock()

    @property
    def dim(self) -> int:
        return self.fingerprint.dim

    def encode_queries(self, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
        return self._encode(texts, self.fingerprint.query_prompt, batch_size)

    def encode_passages(self, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
        """Texts of any order: they are batched by length, the longest first, so memory runs out at once or never."""
        return self._encode(texts, self.fingerprint.passage_prompt, batch_size)

    def _encode(self, texts: Sequence[str], prompt: str, batch_size: int) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        longest = CHARACTERS_A_TOKEN * self.fingerprint.max_length
        # A lone half of a surrogate pair, which JSON can carry, is no text to a tokenizer.
        readable = [text[:longest].encode("utf-8", "replace").decode("utf-8") for text in texts]
        with self._lock:
            vectors_ND = self._model.encode(
                readable,
                prompt=prompt,  # "" is none; None would be the one that a model has by default
                prompt_name=None,
                batch_size=batch_size,
                show_progress_bar=False,
                normalize_embeddings=self.fingerprint.normalize and not _normalizes(self._model),
            )
        return np.asarray(vectors_ND, dtype=np.float32)


def load_encoder(
    name_or_path: str | Path,
    *,
    device: str | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
) -> Encoder:
    """Loads an encoder. Code that lies in a checkpoint is never run.

    Args:
        name_or_path (`str | Path`): A model on the hub or a folder, of sentence-transformers or plain transformers.
        device (`str`, *optional*): `"cuda:1"`, `"cpu"`; by default a GPU where there is one.
        dtype (`str`): In which it computes. `"float16"` is three times as fast on a GPU and changes scores by 1e-3.
        max_length (`int`, *optional*): Tokens of a text; by default the family's, else the model's own.
        query_prompt (`str`, *optional*): Before every query; by default the model's own, else the family's. So too the
            `passage_prompt`.
        pooling (`str`, *optional*): `"mean"`, `"cls"`, `"max"` or `"lasttoken"`; for a plain checkpoint of no known
            family, which needs it.
        normalize (`bool`, *optional*): Vectors of length 1; by default the family's, else the model's own, else yes.

    Example:
        >>> encoder = load_encoder("intfloat/e5-base-v2")
        >>> encoder.encode_queries(["where was Mira Talvane born?"]).shape
        (1, 768)
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype of an encoder", dtype, DTYPES)
    if pooling is not None and pooling not in POOLINGS:
        raise unknown_name("pooling", pooling, POOLINGS)
    name = str(name_or_path)
    family = _family(name)
    model, pooling = _load_model(name, device, pooling, family)
    weights = _hash_weights(model)
    model = model.to(_torch_dtype(dtype)).eval()
    own = {key: value for key, value in model.prompts.items() if value}
    max_length = max_length or (family.max_length if family else model.max_seq_length)
    if max_length is None:
        raise UserError(f"encoder {name!r} does not say how many tokens it reads; pass max_length, 512 for most")
    positions = getattr(model[0].config, "max_position_embeddings", None) if hasattr(model[0], "config") else None
    if positions is not None and max_length > positions:
        if family is None or max_length != family.max_length:
            raise UserError(f"max_length={max_length}: encoder {name!r} has positions for {positions} tokens")
        max_length = positions
    model.max_seq_length = max_length
    if normalize is None:
        normalize = family.normalize if family else pooling is not None or _normalizes(model)
    if _normalizes(model) and not normalize:
        raise UserError(f"normalize=False: encoder {name!r} normalises by itself (its modules.json)")
    if query_prompt is None:
        query_prompt = own.get("query") or (family.query_prompt if family else "")
    if passage_prompt is None:
        passage_prompt = own.get("document") or own.get("passage") or (family.passage_prompt if family else "")
    return Encoder(
        model,
        EncoderFingerprint(
            name=name,
            weights=weights,
            pooling=pooling,
            modules=" + ".join(map(_module, model)),
            query_prompt=query_prompt,
            passage_prompt=passage_prompt,
            max_length=max_length,
            normalize=normalize,
            dim=int(model.get_embedding_dimension()),
        ),
    )


def refuse_other_encoder(encoder: Encoder, recorded: dict[str, Any], where: str) -> None:
    """Fails unless `encoder` is the one whose fingerprint an index recorded."""
    differences = encoder.fingerprint.differences(EncoderFingerprint(**recorded))
    if differences:
        raise UserError(
            f"encoder {encoder.fingerprint.name!r} is not the one {where} was built with ({recorded['name']!r}): its "
            f"{', '.join(differences)}; load the index with that encoder, or build it again with this one"
        )


def recorded(encoder: Encoder) -> dict[str, Any]:
    """The fingerprint as it stands in a manifest."""
    return asdict(encoder.fingerprint)


def _load_model(name: str, device: str | None, pooling: str | None, family: Family | None) -> tuple[Any, str | None]:
    """The model in the precision of its checkpoint, and the pooling that it got from us: `None` if it has its own."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        from sentence_transformers.util import is_sentence_transformer_model
    except ImportError:
        raise UserError(
            "a dense retriever encodes with sentence-transformers: pip install 'trl-search[dense]'"
        ) from None
    if _looks_like_path(name) and not Path(name).is_dir():
        raise UserError(f"there is no encoder folder {name}")
    try:
        if is_sentence_transformer_model(name):
            if pooling is not None:
                raise UserError(f"pooling={pooling!r}: encoder {name!r} says itself how it pools (its modules.json)")
            return SentenceTransformer(name, device=device, model_kwargs={"dtype": "auto"}), None
        pooling = pooling or (family.pooling if family else None)
        if pooling is None:
            raise UserError(
                f"encoder {name!r} is a plain checkpoint that does not say how its tokens become one vector, and the "
                f"wrong way finds the wrong passages; pass pooling, one of {', '.join(POOLINGS)} (see its model card)"
            )
        body = Transformer(name, model_kwargs={"dtype": "auto"})
        modules = [body, Pooling(body.get_embedding_dimension(), pooling)]
        return SentenceTransformer(modules=modules, device=device), pooling
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"encoder {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _family(name: str) -> Family | None:
    # A folder of the hub's cache, .../models--intfloat--e5-base-v2/snapshots/<commit>, says it two levels up.
    cached = re.search(r"models--.*--([^/]+)/snapshots/", name)
    last = cached.group(1) if cached else Path(name).name
    return next((family for family in FAMILIES if re.search(family.name, last, re.IGNORECASE)), None)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def _normalizes(model: Any) -> bool:
    return any(type(module).__name__ == "Normalize" for module in model)


def _module(module: Any) -> str:
    pooling = getattr(module, "pooling_mode", None)
    mode = pooling if isinstance(pooling, str) else "+".join(pooling or ())
    return type(module).__name__ + (f"({mode})" if mode else "")


def _hash_weights(model: Any) -> str:
    """Of what the tensors hold, not of files or names: the same weights saved anew, or read by a later release of
    transformers that calls them otherwise, are the same encoder."""
    import torch

    digests = []
    for name, tensor in model.state_dict().items():
        if ".pooler." in name:  # unused here, and random where the checkpoint has none
            continue
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digests.append(hashlib.sha256(raw.numpy()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:12]}...'"
