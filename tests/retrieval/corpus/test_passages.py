"""Corpora: both formats of a line, errors that name the line, and passages by row from disk."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_search.common.errors import UserError
from trl_search.retrieval.corpus.passages import Corpus, parse_passage, read_corpus, write_corpus
from trl_search.types import Passage

GOOD = b'{"id": "1", "text": "Orlune is a town."}\n'
texts = st.text(st.characters(exclude_categories=["Cs"]))
passages_of_any_text = st.builds(Passage, id=texts.filter(bool), title=texts, text=texts, url=st.none() | texts)


@pytest.mark.parametrize(
    ("line", "passage"),
    [
        ({"id": "7", "contents": '"Orlune"\nA town.\nIn Vesk.'}, Passage("7", "Orlune", "A town.\nIn Vesk.")),
        ({"id": 7, "contents": "Orlune\nA town."}, Passage("7", "Orlune", "A town.")),
        ({"id": "7", "contents": '"Or "lune""\n'}, Passage("7", 'Or "lune"', "")),
        # A single line is a text, quoted or not: without a second line it is not a title.
        ({"id": "7", "contents": '"Orlune"'}, Passage("7", "", '"Orlune"')),
        ({"id": "7", "contents": "A town.\n"}, Passage("7", "", "A town.\n")),
        ({"id": "7", "contents": '""Orlune""\nA town.'}, Passage("7", "Orlune", "A town.")),
        ({"id": "7", "title": "Orlune", "contents": "A town.\nIn Vesk."}, Passage("7", "Orlune", "A town.\nIn Vesk.")),
        ({"id": "7", "title": "Orlune", "contents": '"Orlune"\nA town.'}, Passage("7", "Orlune", "A town.")),
        ({"id": "7", "title": "", "contents": '"Orlune"\nA town.'}, Passage("7", "Orlune", "A town.")),
        ({"_id": "7", "title": "Orlune", "text": "A town."}, Passage("7", "Orlune", "A town.")),
        ({"doc_id": 7, "text": "A town."}, Passage("7", "", "A town.")),
        ({"docid": "7", "text": "A town."}, Passage("7", "", "A town.")),
        ({"id": "7", "contents": '"'}, Passage("7", "", '"')),
        ({"id": "7", "contents": "A town."}, Passage("7", "", "A town.")),
        ({"id": "7", "title": "Orlune", "text": "A town.", "url": "u"}, Passage("7", "Orlune", "A town.", url="u")),
        ({"id": "7", "title": None, "text": "", "url": None, "more": [1]}, Passage("7", "", "")),
    ],
)
def test_both_formats_of_a_line(line: dict[str, object], passage: Passage) -> None:
    assert parse_passage(line, "x") == passage


@given(title=texts.filter(lambda title: "\n" not in title and title[:1] != '"'), text=texts)
def test_contents_give_title_and_text(title: str, text: str) -> None:
    row = {"id": "1", "contents": f'"{title}"\n{text}'}
    assert parse_passage(row, "x") == Passage("1", title, text)


@settings(max_examples=50)
@given(corpus=st.lists(passages_of_any_text, min_size=1, max_size=8, unique_by=lambda passage: passage.id))
def test_written_passages_are_read_by_row(tmp_path_factory: pytest.TempPathFactory, corpus: list[Passage]) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    written = write_corpus(corpus, folder)
    assert [written[row] for row in range(len(written))] == list(written) == corpus
    assert list(read_corpus(folder / "corpus.jsonl")) == corpus
    written.close()
    written.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops", "not JSON .*oops"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"text": "x"}', "'id' is missing"),
        (b'{"id": "", "text": "x"}', "'id' is \"\""),
        (b'{"id": true, "text": "x"}', "'id' is true"),
        (b'{"id": "2", "title": "x"}', "neither 'contents' nor 'text'.*id, title"),
        (b'{"id": "2", "text": ["x"]}', r"'text' is \[\"x\"\]; it must be a string"),
        (b'{"id": "2", "contents": null}', "neither 'contents' nor 'text'.*id, contents"),
        (b'{"id": "2", "title": 3, "text": "x"}', "'title' is 3"),
        (b'{"id": "2", "text": "\\ud800"}', "surrogate"),
        (b"[" * 200_000, "not JSON"),
        (b'{"id": ' + b"1" * 5000 + b', "text": ""}', "not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(GOOD + b"\n" + line + b"\n")
    for read in (lambda: list(read_corpus(file)), lambda: write_corpus(file, tmp_path)):
        with pytest.raises(UserError, match=rf"(?s)bad\.jsonl, line 3: .*{message}") as raised:
            read()
        assert len(str(raised.value)) < 400


def test_a_repeated_id_is_named_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "twice.jsonl"
    other = GOOD.replace(b'"1"', b'"2"')
    file.write_bytes(other + b"\n" + GOOD + b"\n\n" + GOOD.replace(b'"1"', b"1"))
    with pytest.raises(UserError, match=r"twice\.jsonl, line 3 and .*, line 6: the same id '1';"):
        write_corpus(file, tmp_path)
    with pytest.raises(UserError, match="passage 1 and passage 3: the same id '1';"):
        write_corpus([Passage("1", "", ""), Passage("2", "", ""), Passage("1", "", "")], tmp_path)


def test_ids_with_the_same_hash_are_different_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.hash", lambda value: 0)
    corpus = [Passage(str(row), "", "") for row in range(3)]
    assert list(write_corpus(corpus, tmp_path)) == corpus


def test_blank_lines_a_byte_order_mark_and_a_missing_last_newline_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "corpus_in.jsonl"
    file.write_bytes(b"\xef\xbb\xbf\n" + GOOD + b"  \r\n" + GOOD.replace(b'"1"', b'"2"').strip())
    assert [passage.id for passage in write_corpus(file, tmp_path)] == ["1", "2"]


def test_a_compressed_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl.gz"
    file.write_bytes(gzip.compress(GOOD))
    assert [passage.id for passage in read_corpus(file)] == ["1"]
    file.write_bytes(gzip.compress(GOOD * 1000)[:-10])
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz, after line .*: cut off or damaged"):
        list(read_corpus(file))


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_corpus_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"empty\.jsonl: no passages"):
        write_corpus(file, tmp_path)


def test_a_row_beyond_the_corpus_is_an_index_error(tmp_path: Path) -> None:
    corpus = write_corpus([Passage("1", "", "")], tmp_path)
    for row in (1, -1):
        with pytest.raises(IndexError):
            corpus[row]


def test_a_score_is_not_part_of_a_corpus(tmp_path: Path) -> None:
    passage = Passage("1", "Orlune", "A town.", score=3.5)
    write_corpus([passage], tmp_path)
    assert Corpus(tmp_path)[0] == replace(passage, score=0.0)
