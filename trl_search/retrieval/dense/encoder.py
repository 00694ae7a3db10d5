"""Loads encoders by name, with the prefixes, pooling, length and normalisation that each was trained with.

    intfloat/e5-base-v2       "query: ..." and "passage: ...", mean over the tokens, length 1, 256 tokens
    BAAI/bge-base-en-v1.5     "Represent this sentence ...: " before queries only, first token, length 1, 512 tokens
    any sentence-transformers model     as its files say; for what they omit, as its family above

sentence-transformers encodes; this module chooses the settings. The wrong pooling, or a superfluous prefix, loses half
of the passages without an error. So a checkpoint of an unknown family whose files do not define these settings is an
error until the user passes them, and an index records every choice in its `EncoderFingerprint` (`fingerprint.py`).

Code from a checkpoint runs only with `trust_remote_code=True`.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.common.errors import UserError, first_line, unknown_name
from trl_search.common.extras import import_extra
from trl_search.common.files import home_expanded
from trl_search.common.hub import only_cached
from trl_search.common.vocabulary import refuse_empty_tokenizer
from trl_search.retrieval.dense.fingerprint import EncoderFingerprint, hash_weights, refuse_other_encoder

DTYPES = ("float32", "float16", "bfloat16")
POOLINGS = ("mean", "cls", "max", "lasttoken")
CHARACTERS_PER_TOKEN = 32  # more than in any text, so that cutting at max_length times this changes no tokens


@dataclass(frozen=True)
class Family:
    """The settings of one family of encoders. The pattern `name` is matched against the last part of an encoder's
    name."""

    name: str
    query_prompt: str
    passage_prompt: str
    pooling: str
    max_length: int
    normalize: bool = True


FAMILIES = (
    # e5-mistral and the -instruct models put a whole instruction before the query, so they are excluded.
    Family(r"(^|[-_])e5-(small|base|large)(?!.*instruct)", "query: ", "passage: ", "mean", 256),
    Family(r"^bge-(small|base|large)-en", "Represent this sentence for searching relevant passages: ", "", "cls", 512),
    Family(r"^bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", "", "cls", 512),
    Family(r"^bge-m3", "", "", "cls", 8192),
)


class Encoder:
    """A loaded encoder, from `load_encoder`: `encode_queries` and `encode_passages` return float32 (n, dim)."""

    def __init__(self, model: Any, fingerprint: EncoderFingerprint, query_model: Any = None) -> None:
        self.model, self._query_model = model, query_model if query_model is not None else model
        self.fingerprint = fingerprint
        # Two threads in one tokenizer fail with "Already borrowed".
        self._lock = threading.Lock()

    @property
    def dim(self) -> int:
        return self.fingerprint.dim

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(self._query_model, texts, self.fingerprint.query_prompt, batch_size=64)

    def encode_passages(self, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
        """Encodes texts in any order. They are batched by length, longest first, so memory runs out at once or
        never."""
        return self._encode(self.model, texts, self.fingerprint.passage_prompt, batch_size)

    def cut_share(self, texts: Sequence[str]) -> float:
        """The share of passages with more tokens than the encoder reads; 0.0 if its tokenizer cannot count them."""
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        if not texts or not hasattr(tokenizer, "num_special_tokens_to_add"):
            return 0.0
        with self._lock:
            ids = tokenizer(
                [self.fingerprint.passage_prompt + text for text in texts],
                truncation=False,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        return sum(len(tokens) > self.fingerprint.max_length for tokens in ids) / len(texts)

    def _encode(self, model: Any, texts: Sequence[str], prompt: str, batch_size: int) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        longest = CHARACTERS_PER_TOKEN * self.fingerprint.max_length
        # JSON can contain lone surrogates, which a tokenizer rejects.
        readable = [text[:longest].encode("utf-8", "replace").decode("utf-8") for text in texts]
        with self._lock:
            vectors_ND = model.encode(
                readable,
                prompt=prompt,  # "" means no prompt; None would mean the model's default prompt
                prompt_name=None,
                batch_size=batch_size,
                normalize_embeddings=self.fingerprint.normalize,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        return np.asarray(vectors_ND, dtype=np.float32)


def load_encoder(
    name_or_path: str | Path,
    *,
    query_encoder: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    max_length: int | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Loads an encoder; the options are those of [`EncodingOptions`], each by default as the family or the model's own
    files say. A prompt may be the name of one of the model's prompts ("s2p_query"), and "" is none; `pooling` is
    required for a plain checkpoint of an unknown family.

    Raises:
        UserError: if the encoder cannot be loaded, or does not define a setting that must then be passed.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype of an encoder", dtype, DTYPES)
    if pooling is not None and pooling not in POOLINGS:
        raise unknown_name("pooling", pooling, POOLINGS)
    name = home_expanded(str(name_or_path))
    family = _family(name)
    model, chosen = _load_model(name, device, pooling, family, trust_remote_code)
    weights, query_model, query_weights = hash_weights(model), None, None
    if query_encoder is not None:
        query_encoder = str(home_expanded(query_encoder))
        query_model, _ = _load_model(query_encoder, device, pooling, family, trust_remote_code)
        query_weights = hash_weights(query_model)
        if query_model.get_embedding_dimension() != model.get_embedding_dimension():
            raise UserError(
                f"{query_encoder!r} and {name!r} make vectors of different dimensions, so they are not a pair"
            )
    models = [model] if query_model is None else [model, query_model]
    own_length = min(one.max_seq_length or 0 for one in models)
    wanted = max_length or (family.max_length if family else own_length)
    if not wanted:
        raise UserError(
            f"encoder {name!r} does not define how many tokens it reads; pass max_length, 512 for most encoders"
        )
    positions = min(map(_positions, models))
    if max_length is not None and max_length > positions and max_length != (family.max_length if family else None):
        raise UserError(f"max_length={max_length}: encoder {name!r} has positions for {positions} tokens")
    length = int(min(wanted, positions))
    import torch

    for one in models:
        refuse_empty_tokenizer(getattr(one, "tokenizer", None), name if one is model else str(query_encoder))
        one.to(getattr(torch, dtype)).eval()
        one.max_seq_length = length
    if normalize is None:
        normalize = family.normalize if family else chosen is not None or _normalizes(model)
    if _normalizes(model) and not normalize:
        raise UserError(f"normalize=False: encoder {name!r} normalises by itself (its modules.json)")
    asks = models[-1]
    return Encoder(
        model,
        EncoderFingerprint(
            name=name,
            weights=weights,
            pooling=chosen,
            modules=" + ".join(map(_module, model)),
            query_prompt=_prompt(asks, query_prompt, ("query",), family.query_prompt if family else None, name),
            passage_prompt=_prompt(
                model, passage_prompt, ("document", "passage"), family.passage_prompt if family else "", name
            ),
            max_length=length,
            normalize=normalize,
            dim=int(model.get_embedding_dimension()),
            query_encoder=query_encoder,
            query_weights=query_weights,
        ),
        query_model,
    )


def load_recorded(recorded: dict[str, Any], given: str | Path | Encoder | None, where: str, **options: Any) -> Encoder:
    """Loads the encoder whose fingerprint the index `where` recorded, from its name or, if its files have moved, from
    `given`.

    Raises:
        UserError: if it is a different encoder, which would find the wrong passages.
    """
    fingerprint = EncoderFingerprint(**recorded)
    if not isinstance(given, Encoder):
        given = load_encoder(given or fingerprint.name, **fingerprint.options, **options)
    refuse_other_encoder(given.fingerprint, fingerprint, where)
    return given


def _prompt(model: Any, given: str | None, names: Sequence[str], otherwise: str | None, encoder: str) -> str:
    """The prompt to use: the given one (its name or text), else the model's own prompt of one of `names`, else the
    family's.

    Raises:
        UserError: if a model has prompts, but none is known to be the one for queries.
    """
    own: dict[str, str] = {key: value for key, value in model.prompts.items() if value}
    if given is not None:
        return own.get(given, given)
    for name in names:
        if name in own:
            return own[name]
    others = set(own) - {"query", "document", "passage"}
    if otherwise is None and others:
        raise UserError(
            f"encoder {encoder!r} has its own prompts, and none is named 'query': pass query_prompt, one of "
            f"{', '.join(sorted(others))}, or '' for none (see its model card)"
        )
    return otherwise or ""


def _load_model(
    name: str, device: str | None, pooling: str | None, family: Family | None, trust_remote_code: bool
) -> tuple[Any, str | None]:
    """The model in its checkpoint's precision, and the pooling that was added: `None` if the model has its own."""
    import_extra("sentence_transformers", "a dense retriever", "dense")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model

    if _looks_like_path(name) and not Path(name).is_dir():
        raise UserError(f"there is no encoder folder {name}")
    local = only_cached(name)
    # Without `trust_remote_code`, transformers asks on the terminal, and runs the code on a "y".
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    with loading_model(f"encoder {name!r}"):
        if is_sentence_transformer_model(name, local_files_only=local):
            if pooling is not None:
                raise UserError(f"pooling={pooling!r}: encoder {name!r} defines its own pooling (its modules.json)")
            return SentenceTransformer(name, device=device, model_kwargs={"dtype": "auto"}, **options), None
        pooling = pooling or (family.pooling if family else None)
        if pooling is None:
            raise UserError(
                f"encoder {name!r} is a plain checkpoint that does not define its pooling, and the wrong pooling "
                f"finds the wrong passages; pass pooling, one of {', '.join(POOLINGS)} (see its model card)"
            )
        body = Transformer(
            name,
            model_kwargs={"dtype": "auto", **options},
            config_kwargs=dict(options),
            processor_kwargs=dict(options),
        )
        if getattr(body.config, "model_type", None) == "dpr":
            raise UserError(
                f"{name!r} is a checkpoint of DPR, whose passage encoder transformers would fill with random "
                "weights: take the conversion sentence-transformers/facebook-dpr-ctx_encoder-single-nq-base, with "
                "query_encoder='sentence-transformers/facebook-dpr-question_encoder-single-nq-base'"
            )
        modules = [body, Pooling(body.get_embedding_dimension(), pooling)]
        return SentenceTransformer(modules=modules, device=device), pooling


@contextlib.contextmanager
def loading_model(model: str) -> Iterator[None]:
    """Turns what a library raises while it loads a checkpoint into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{model} needs Python code from its checkpoint, which is not run by default. Read that code, and if "
                "you trust it, pass trust_remote_code=True (--trust_remote_code)"
            ) from error
        raise UserError(f"{model} cannot be loaded: {first_line(error)}") from error


def _positions(model: Any) -> float:
    """Tokens that a model has positions for; infinity if it does not say."""
    limit = getattr(model[0].config, "max_position_embeddings", None) if hasattr(model[0], "config") else None
    if limit is None:
        return math.inf
    # RoBERTa models number positions from after the padding index: 514 positions are 512 tokens.
    tables = [module for name, module in model[0].named_modules() if name.endswith("position_embeddings")]
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), -1)
    return int(limit) - padding - 1


def _family(name: str) -> Family | None:
    # In a folder of the hub's cache, .../models--intfloat--e5-base-v2/snapshots/<commit>, the name is two levels up.
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
