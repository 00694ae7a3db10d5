"""Documents cut into passages: verbatim, complete, traceable; a warning if an encoder would truncate them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.policies.loading import load_tokenizer
from trl_search.policies.tiny import tiny_policy_path
from trl_search.retrieval.corpus.chunks import Split, cut_documents, split_words, token_splitter, windows
from trl_search.retrieval.corpus.passages import read_corpus
from trl_search.types import Passage

words = st.text(st.characters(categories=["Lu", "Ll", "Nd"], exclude_characters="ㆍ", max_codepoint=0x2FF), min_size=1)


@given(text=st.lists(words, min_size=1, max_size=40).map("  ".join), size=st.integers(1, 9), data=st.data())
def test_passages_are_verbatim_and_contain_every_word(text: str, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    chunks = list(cut_documents([Passage("7", "Orlune", text, url="u")], size, overlap=overlap))
    assert [chunk.id for chunk in chunks] == [f"7#{number}" for number in range(len(chunks))]
    assert all((chunk.title, chunk.url) == ("Orlune", "u") and chunk.text in text for chunk in chunks)
    pieces = [chunk.text.split() for chunk in chunks]
    assert pieces[0] + [word for piece in pieces[1:] for word in piece[overlap:]] == text.split()
    assert all(len(piece) == size for piece in pieces[:-1]) and len(pieces[-1]) > (overlap if len(pieces) > 1 else 0)


def test_letters_of_scripts_without_spaces_count_as_words() -> None:
    chunks = cut_documents([Passage("1", "", "東京タワーは1958年に。")], 5)
    assert [chunk.text for chunk in chunks] == ["東京タワー", "は1958年に。"]
    assert len(split_words("สวัสดี")) == 4  # vowel signs stay with their letters


@pytest.fixture(scope="module")
def by_tokens() -> Split:
    """Splits by a tokenizer with two to four tokens for most letters outside ASCII."""
    return token_splitter(load_tokenizer(str(tiny_policy_path())))


def cut(text: str, size: int, overlap: int, split: Split) -> list[str]:
    return [one.text for one in cut_documents([Passage("1", "", text)], size, overlap=overlap, split=split)]


def test_a_letter_of_several_tokens_stays_whole(by_tokens: Split) -> None:
    llama = "\N{LLAMA}"
    assert len(by_tokens(llama)) == 4
    assert cut(f"a{llama}b{llama}c", 4, 0, by_tokens) == ["a", llama, "b", llama, "c"]
    assert cut(f"a{llama}b{llama}c", 5, 0, by_tokens) == [f"a{llama}", f"b{llama}", "c"]
    assert cut(f"a{llama}b{llama}c", 6, 4, by_tokens) == [f"a{llama}b", f"b{llama}c"]
    assert cut(llama * 2, 3, 2, by_tokens) == [llama] * 2  # a letter longer than a passage
    accented = "xe\N{COMBINING ACUTE ACCENT}"
    assert cut(accented, 2, 0, by_tokens) == ["x", accented[1:]]
    family, flags = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}", "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7"
    dark = "\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-5}"
    assert cut(f"a{family}{dark}b", 4, 0, by_tokens) == ["a", family, dark, "b"]
    assert cut(f"a{flags}\ufe0f b", 4, 0, by_tokens) == ["a", flags[:2], f"{flags[2:]}\ufe0f", " b"]
    # As in other tokenizers, the first token of the second letter begins in the letter before.
    assert cut(f" {llama}{llama}", 2, 0, lambda text: [(0, 2), (1, 2), (2, 3), (2, 3)]) == [f" {llama}", llama]


@given(text=st.text("ab \u9f98\N{LLAMA}e\u0301", max_size=12), size=st.integers(1, 9), data=st.data())
def test_texts_are_cut_between_letters_and_no_token_is_lost(
    by_tokens: Split, text: str, size: int, data: st.DataObject
) -> None:
    overlap, spans = data.draw(st.integers(0, size - 1)), by_tokens(text)

    def tokens(begin: int, end: int) -> int:
        return sum(begin <= start and stop <= end for start, stop in spans)

    def whole(at: int) -> bool:
        """Whether this position is inside no letter and no token."""
        return not any(a < at < b for a, b in spans) and not text.startswith("\u0301", at)

    begin, end = 0, 0
    for number, (start, stop) in enumerate(windows(text, spans, size, overlap)):
        assert tokens(start, stop) <= size or not any(map(whole, range(start + 1, stop)))
        assert tokens(end, start) == 0  # no text is between two passages
        assert number == 0 or (begin < start and end < stop and tokens(start, end) <= overlap)
        assert whole(stop)
        begin, end = start, stop
    assert tokens(end, len(text)) == 0


def test_a_letter_with_thousands_of_marks_takes_linear_time(by_tokens: Split) -> None:
    """The search for the end of the letter used to start at each of its tokens."""
    looked_at = 0

    class Text(str):
        def __getitem__(self, at: Any) -> str:
            nonlocal looked_at
            looked_at += 1
            return str.__getitem__(self, at)

    text = Text("a" + "\u0301" * 2000)
    assert list(windows(text, by_tokens(str(text)), 100, 20)) == [(0, len(text))]
    assert looked_at < 5 * len(text)


def test_a_document_without_text_gives_one_passage() -> None:
    assert list(cut_documents([Passage("1", "Orlune", " ")], 5)) == [Passage("1#0", "Orlune", "")]


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_a_size_that_makes_no_progress_is_refused(size: int, overlap: int) -> None:
    with pytest.raises(UserError, match=f"size {size} and overlap {overlap}: size must be at least 1"):
        cut_documents([], size, overlap=overlap)


def test_the_command_cuts_by_words_and_by_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs.jsonl").write_text(json.dumps({"docno": "a", "title": "T", "text": "one two-three four"}) + "\n")
    command = ["data", "chunk", str(tmp_path / "docs.jsonl"), "--id-field", "docno", "--output"]
    assert main([*command, str(tmp_path / "words.jsonl"), "--size", "2", "--overlap", "1"]) == 0
    assert "1 documents, 2 passages" in capsys.readouterr().out
    assert [(one.id, one.title, one.text) for one in read_corpus(tmp_path / "words.jsonl")] == [
        ("a#0", "T", "one two-three"),
        ("a#1", "T", "two-three four"),
    ]
    assert main([*command, str(tmp_path / "words.jsonl"), "--size", "2"]) == 2  # the file exists
    assert "exists already" in capsys.readouterr().err

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "two": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    assert main([*command, str(tmp_path / "t.jsonl"), "--size", "3", "--tokenizer", str(tmp_path / "model")]) == 0
    assert [one.text for one in read_corpus(tmp_path / "t.jsonl")] == ["one two-", "three four"]

    # Without its tokenizer file, Qwen2 would find no tokens, and every passage would be empty.
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    assert main([*command, str(tmp_path / "e.jsonl"), "--size", "3", "--tokenizer", str(tmp_path / "model")]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
