"""One word for a retriever: a folder, an address or a kind, distinguished in the same way everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_search.common.errors import UserError
from trl_search.retrieval import load_retriever, open_retriever, resolve_retriever
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    build_index([Passage("1", "Orlune", "A harbour town.")], "~/wiki")
    return tmp_path


@pytest.mark.parametrize("word", ["wiki", "./wiki", "~/wiki", Path("wiki")])
def test_a_folder_is_opened_by_its_manifest(home: Path, word: str | Path) -> None:
    assert [passage.id for passage in open_retriever(word).search(["harbour"], k=1)[0]] == ["1"]


def test_an_address_and_a_kind_are_opened(home: Path) -> None:
    assert resolve_retriever("https://host:1", {"timeout_s": 1}) == ("http", {"url": "https://host:1", "timeout_s": 1})
    Path("bm25").mkdir()
    assert resolve_retriever("bm25", {"index": "wiki"}) == ("bm25", {"index": "wiki"})
    with pytest.raises(UserError, match="not a finished index"):
        resolve_retriever("./bm25")


@pytest.mark.parametrize(
    ("word", "message"), [("nowhere/at/all", "no index folder nowhere/at/all"), ("bm52", "bm52.*kinds bm25, dense")]
)
def test_an_unknown_word_lists_what_is_possible(home: Path, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_retriever(word)


def test_a_corpus_instead_of_its_index_is_refused_with_the_command_that_builds_one(home: Path) -> None:
    """The command that the message gave would have written into the folder of the documents."""
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("A town.")
    for corpus in ("./notes", "notes/a.txt"):
        with pytest.raises(UserError, match=rf"index.*--corpus {corpus.removeprefix('./')} --output NEW"):
            resolve_retriever(corpus)


def test_a_misspelt_option_is_named_before_the_missing_one(home: Path) -> None:
    with pytest.raises(UserError, match="unknown option of bm25 'indx': did you mean 'index'"):
        load_retriever("bm25", indx="wiki")


def test_two_places_are_refused(home: Path) -> None:
    for word, options in (("wiki", {"index": "indexes/other"}), ("http://host:1", {"url": "http://host:2"})):
        with pytest.raises(UserError, match=r"two places to search.*--retriever_options '{}'"):
            resolve_retriever(word, options)
    assert resolve_retriever("wiki", {"index": "wiki"}) == ("bm25", {"index": "wiki"})


def test_paths_may_begin_with_a_tilde(home: Path) -> None:
    (home / "corpus.jsonl").write_text('{"id": "7", "text": "A lantern."}\n')
    for options in ({"index": "~/wiki"}, {"corpus": "~/corpus.jsonl"}):
        load_retriever("bm25", **options).close()  # type: ignore[arg-type]
    build_index("~/corpus.jsonl", "~/other")
    assert (home / "other" / "manifest.json").is_file()


def test_the_fields_of_a_corpus_can_be_named(home: Path) -> None:
    (home / "c.jsonl").write_text('{"docno": 7, "body": "A harbour town."}\n')
    found = open_retriever("bm25", {"corpus": "~/c.jsonl", "id_field": "docno", "text_field": "body"})
    assert [passage.id for passage in found.search(["harbour"], 1)[0]] == ["7"]
    with pytest.raises(UserError, match="id_field, title_field and text_field apply only when a corpus is read"):
        load_retriever("bm25", index=home / "wiki", id_field="docno")
