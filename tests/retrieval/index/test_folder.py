"""Index folders: complete or absent, and refused if they do not match their manifest."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from trl_search.common.errors import UserError
from trl_search.retrieval import Retriever, load_retriever
from trl_search.retrieval.index.folder import MANIFEST, IndexFolderError, build_index, open_index, read_manifest
from trl_search.types import Passage

WORLD = [Passage("1", "Orlune", "A harbour town."), Passage("2", "Vesk", "A country.")]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "my corpus.jsonl"
    lines = [json.dumps({"id": passage.id, "title": passage.title, "text": passage.text}) for passage in WORLD]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def index(corpus: Path, tmp_path: Path) -> Path:
    build_index(corpus, tmp_path / "indexes" / "one")
    return tmp_path / "indexes" / "one"


def load(index: Path, **options: object) -> Retriever:
    return load_retriever("bm25", index=index, **options)


def refused(index: Path, *words: str) -> None:
    with pytest.raises(IndexFolderError) as raised:
        load(index)
    for word in words:
        assert word in str(raised.value)


def test_the_manifest_describes_the_index(index: Path, corpus: Path) -> None:
    manifest = read_manifest(index)
    assert (manifest.kind, manifest.passages, manifest.options["stemmer"]) == ("bm25", 2, "english")
    assert manifest.source is not None and manifest.source.name == str(corpus)
    assert set(manifest.files) == {str(f.relative_to(index)) for f in index.rglob("*") if f.is_file()} - {MANIFEST}


@pytest.mark.parametrize(("long", "told"), [(2, True), (1, False)])
def test_documents_that_are_not_cut_into_passages_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, long: int, told: bool
) -> None:
    """A folder of articles was indexed without a word, and the policy read only the beginning of each."""
    texts = ["A harbour town. " * 300] * long + ["A country."] * (15 - long)
    build_index([Passage(str(i), "", text) for i, text in enumerate(texts)], tmp_path / "index")
    assert ("13% of the passages are longer than 3000 bytes" in caplog.text) == told
    assert ("trl-search data chunk DOCUMENTS" in caplog.text) == told


def test_the_same_corpus_gives_the_same_bytes(index: Path, corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from trl_search.retrieval.index.folder import build_index; build_index(sys.argv[1], sys.argv[2])"
    )
    again = tmp_path / "again"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(corpus), str(again)], env=environment, check=True)
    for name in read_manifest(index).files:
        assert (index / name).read_bytes() == (again / name).read_bytes(), name


# Half-written


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def breaks() -> Iterator[Passage]:
        yield WORLD[0]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        build_index(breaks(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_index(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from trl_search.retrieval.index.folder import build_index
from trl_search.retrieval.bm25.retriever import BM25Builder
save = BM25Builder.build
def build_and_die(self, corpus, folder):
    save(self, corpus, folder)
    os.kill(os.getpid(), signal.SIGKILL)
BM25Builder.build = build_and_die
from trl_search.types import Passage
build_index([Passage("1", "", "lantern")], sys.argv[1])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "index")], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "index").exists()
    (left,) = tmp_path.iterdir()
    refused(left, "not a finished index", "no manifest.json")
    build_index(WORLD, tmp_path / "index")  # its leftovers do not prevent the next build


def test_a_folder_without_a_manifest_is_refused_with_the_command_to_build_it(index: Path) -> None:
    (index / MANIFEST).unlink()
    refused(index, "not a finished index", f"trl-search index --corpus FILE.jsonl --kind bm25 --output {index}")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is no index folder", "trl-search index --corpus FILE.jsonl")


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 1, "kind": "bm25"}', '{"format": 1, "source": null, "corpus": 3}']
)
def test_a_damaged_manifest_is_refused(index: Path, text: str) -> None:
    (index / MANIFEST).write_text(text)
    refused(index, "damaged", "rebuild with: trl-search index")


@pytest.mark.parametrize("name", ["bm25/data.csc.index.npy", "corpus.offsets.npy", "corpus.jsonl"])
def test_a_truncated_or_missing_file_is_refused(index: Path, name: str) -> None:
    content = (index / name).read_bytes()
    (index / name).write_bytes(content[:-1])
    refused(index, name, f"should have {len(content)} bytes", "--overwrite")
    (index / name).unlink()
    refused(index, name, "but is missing")


@pytest.mark.parametrize("written", [0, 2, None])
def test_another_format_is_refused_with_the_whole_command(index: Path, corpus: Path, written: int | None) -> None:
    manifest = json.loads((index / MANIFEST).read_text())
    manifest["format"] = written
    (index / MANIFEST).write_text(json.dumps(manifest))
    refused(index, f"format {written}", f"--corpus '{corpus}' --kind bm25 --output {index} --overwrite")


def test_another_kind_is_refused(index: Path) -> None:
    with pytest.raises(IndexFolderError, match="of kind 'bm25', not 'dense'"):
        open_index(index, "dense")


# A corpus that changed


def test_passages_edited_in_the_folder_are_refused(index: Path) -> None:
    rows = (index / "corpus.jsonl").read_bytes()
    (index / "corpus.jsonl").write_bytes(rows.replace(b"harbour", b"HARBOUR"))
    refused(index, "was changed after the index was built", "rebuild with")


def test_a_changed_source_is_refused_unless_the_check_is_off(index: Path, corpus: Path) -> None:
    corpus.write_text(corpus.read_text() + '{"id": "3", "text": "new"}\n')
    refused(index, f"{corpus} has changed since", "rebuild with", "check_source=False")
    assert load(index, check_source=False).search(["harbour"], k=1)[0][0].id == "1"


def test_a_source_changed_in_place_is_refused(index: Path, corpus: Path) -> None:
    corpus.write_text(corpus.read_text().replace("town", "TOWN"))
    refused(index, "has changed since")


def test_a_source_that_is_touched_or_deleted_is_not_a_changed_source(index: Path, corpus: Path) -> None:
    corpus.touch()
    load(index)
    corpus.unlink()
    load(index)


def test_a_copied_index_opens(index: Path, tmp_path: Path) -> None:
    shutil.copytree(index, tmp_path / "copy", copy_function=shutil.copyfile)
    assert load(tmp_path / "copy").search(["harbour"], k=1)[0][0].id == "1"


def test_a_corpus_that_changes_while_it_is_read_is_refused(corpus: Path, tmp_path: Path) -> None:
    from trl_search.retrieval.bm25.retriever import BM25Builder

    class Slow(BM25Builder):
        def build(self, *args: object) -> None:
            corpus.write_text(corpus.read_text() + "\n")

    builder = import_module("trl_search.retrieval.bm25.retriever")
    original, builder.BM25Builder = builder.BM25Builder, Slow  # type: ignore[attr-defined]
    try:
        with pytest.raises(IndexFolderError, match="changed while it was indexed"):
            build_index(corpus, tmp_path / "index")
    finally:
        builder.BM25Builder = original  # type: ignore[attr-defined]


# The output folder


def test_an_index_is_replaced_only_on_request_and_never_by_a_failed_build(index: Path, tmp_path: Path) -> None:
    before = read_manifest(index)
    with pytest.raises(IndexFolderError, match="--overwrite"):
        build_index(WORLD[:1], index)
    with pytest.raises(UserError, match="no passages"):
        build_index([], index, overwrite=True)
    assert read_manifest(index) == before
    build_index(WORLD[:1], index, overwrite=True)
    assert load(index).search(["country"], k=1) == [[]]
    assert [path.name for path in index.parent.iterdir()] == ["one"]


def test_other_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("three years of work")
    with pytest.raises(IndexFolderError, match=r"not a finished index: choose another output$"):
        build_index(WORLD, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "three years of work"


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    build_index(WORLD, tmp_path / "index")
    load(tmp_path / "index")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bm52", {}, "unknown kind of index 'bm52': did you mean 'bm25'"),
        ("bm25", {"stemer": None}, "did you mean 'stemmer'"),
        ("bm25", {"stemmer": "klingon"}, "unknown stemmer"),
        ("bm25", {"k1": -1}, "k1=-1 must be a finite number, at least 0"),
        ("bm25", {"k1": float("nan")}, "k1=nan must be"),  # a manifest cannot store it
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    def never() -> Iterator[Passage]:
        raise AssertionError("the corpus was read")
        yield

    with pytest.raises(UserError, match=message):
        build_index(never(), tmp_path / "index", kind, **options)


# The commands


def command(name: str, *arguments: object) -> int:
    module = import_module(f"trl_search.cli.commands.{name}")
    parser = argparse.ArgumentParser(description=module.__doc__)
    module.add_arguments(parser)
    code: int = module.run(parser.parse_args([str(argument) for argument in arguments]))
    return code


def test_index_then_search(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("index", "--corpus", corpus, "--kind", "bm25", "--output", tmp_path / "i", "--stemmer", "none") == 0
    assert "2 passages" in capsys.readouterr().out
    assert read_manifest(tmp_path / "i").options["stemmer"] is None
    assert command("search", tmp_path / "i", "harbour?", "zeppelin", "--passages_per_query", 1) == 0
    first, second = capsys.readouterr().out.split("zeppelin")
    assert "1. Orlune   [id 1, score" in first and "A harbour town." in first
    assert "no match" in second


def test_failing_commands_print_a_message(tmp_path: Path, index: Path) -> None:
    with pytest.raises(UserError, match=r"no corpus file .*nowhere\.jsonl"):
        command("index", "--corpus", tmp_path / "nowhere.jsonl", "--output", tmp_path / "i")
    with pytest.raises(UserError, match="passages_per_query=0 must be at least 1"):
        command("search", index, "harbour", "--passages_per_query", 0)
    with pytest.raises(UserError, match="no index folder"):
        command("search", tmp_path / "nowhere", "harbour")


# Special places for an index


def is_whole(index: Path) -> bool:
    manifest = read_manifest(index)
    there = {str(file.relative_to(index)) for file in index.rglob("*") if file.is_file()}
    return there == {*manifest.files, MANIFEST} and bool(load(index).search(["harbour"], k=1)[0])


def test_a_symbolic_link_is_followed(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("new", "empty", "index"):
        (tmp_path / f"to {name}").symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "empty").mkdir()
    build_index(corpus, tmp_path / "disk" / "index")
    for name in ("new", "empty", "index"):
        build_index(corpus, tmp_path / f"to {name}", overwrite=name == "index")
        assert (tmp_path / f"to {name}").is_symlink() and is_whole(tmp_path / "disk" / name)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["empty", "index", "new"]


def test_the_working_folder_may_become_an_index(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build_index(corpus, ".")
    build_index(corpus, ".", overwrite=True)
    assert is_whole(Path.cwd())


@pytest.mark.parametrize("there", ["nothing", "an index"])
def test_an_index_is_built_inside_a_folder_that_cannot_be_renamed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """For example a mount point: it cannot be renamed or replaced, and its parent may be on a smaller disk."""
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "lost+found").mkdir()
    if there == "an index":
        build_index(WORLD[:1], mount)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == mount)
    move = os.replace

    def dies_at_the_corpus(source: Path, target: Path) -> None:
        if Path(target) == mount / "corpus.jsonl":
            raise KeyboardInterrupt
        move(source, target)

    said: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", dies_at_the_corpus)
        build_index(corpus, mount, overwrite=True, announce=said.append)
    assert said == [f"the index is complete and kept in {mount / '.building'}; the same command puts it in place"]
    refused(mount, "not a finished index")
    with monkeypatch.context() as patch:
        patch.setattr("trl_search.retrieval.index.folder.write_corpus", lambda *_: pytest.fail("read again"))
        build_index(corpus, mount, overwrite=True)
    (mount / "lost+found").rmdir()
    assert is_whole(mount) and read_manifest(mount).passages == 2


def test_a_read_only_place_is_refused_before_the_corpus_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def never_read() -> Iterator[Passage]:
        pytest.fail("the corpus was read")
        yield

    with pytest.raises(UserError, match=r"file/deep/index cannot be written \(.*\); choose another output"):
        build_index(never_read(), tmp_path / "file" / "deep" / "index")


def test_a_finished_index_is_kept_if_it_cannot_be_moved_into_place(
    corpus: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def fails_once(source: Path, target: Path) -> None:
        if Path(target) == index:
            monkeypatch.setattr("os.rename", rename)
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr("os.rename", fails_once)
    said: list[str] = []
    with pytest.raises(PermissionError):
        build_index(corpus, index, overwrite=True, announce=said.append)
    assert is_whole(index) and "the index is complete and kept in" in said[0]
    build_index(corpus, index, overwrite=True)
    assert is_whole(index)


def test_a_full_disk_is_reported_in_one_line_that_names_what_is_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, rows: object, folder: Path) -> None:
        (folder / "scratch").mkdir(exist_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trl_search.retrieval.bm25.retriever.BM25Builder.build", full)
    kept = f"the finished part is kept in {tmp_path / '.index.building'}; the same command resumes it"
    with pytest.raises(UserError, match=f"^the disk of .* is full; {re.escape(kept)}$"):
        build_index(corpus, tmp_path / "index")
    with pytest.raises(UserError, match=r"is full; nothing of the build is kept$"):
        build_index(WORLD, tmp_path / "other")


def test_a_copied_index_is_hashed_once(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(index, tmp_path / "copy", copy_function=shutil.copyfile)  # without the times
    (tmp_path / "copy" / "corpus.jsonl").chmod(0o444)  # as in a read-only folder
    load(tmp_path / "copy")
    monkeypatch.setattr("trl_search.retrieval.corpus.sources._sha256", lambda _: pytest.fail("hashed again"))
    load(tmp_path / "copy")
    (tmp_path / "copy" / "corpus.jsonl").chmod(0o644)
    (tmp_path / "copy" / "corpus.jsonl").write_bytes((index / "corpus.jsonl").read_bytes().replace(b"town", b"tawn"))
    with monkeypatch.context() as patch, pytest.raises(IndexFolderError, match="was changed after"):
        patch.setattr("trl_search.retrieval.corpus.sources._sha256", lambda _: "another")
        load(tmp_path / "copy")


@pytest.mark.parametrize(
    "damaged", ["corpus.offsets.npy", "bm25/data.csc.index.npy", "bm25/vocab.index.json", MANIFEST]
)
def test_a_damaged_file_or_a_manifest_of_another_version_says_how_to_rebuild(tmp_path: Path, damaged: str) -> None:
    build_index([Passage("1", "Orlune", "A harbour town.")], tmp_path / "index", "bm25")
    file = tmp_path / "index" / damaged
    if damaged == MANIFEST:
        manifest = json.loads(file.read_text())
        del manifest["options"]["fold_accents"]  # an option that an older version did not have
        file.write_text(json.dumps(manifest))
    else:
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(IndexFolderError, match=r"cannot be read .*rebuild with: trl-search index"):
        load_retriever("bm25", index=tmp_path / "index")
