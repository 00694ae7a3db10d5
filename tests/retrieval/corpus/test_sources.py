"""Corpora from tables: parquet files and datasets give the same passages as jsonl, and errors with their place."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from trl_search.common.errors import UserError
from trl_search.retrieval.corpus.fields import Fields
from trl_search.retrieval.corpus.passages import Corpus, read_corpus, write_corpus
from trl_search.retrieval.corpus.sources import open_source
from trl_search.retrieval.index.folder import IndexFolderError, build_index, open_index, read_manifest
from trl_search.types import Passage

ROWS = [
    {"id": "1", "title": "Orlune", "text": "A harbour town.", "url": None, "size": 3},
    {"id": "2", "title": None, "text": "A country.", "url": "https://example.org", "size": None},
]
PASSAGES = [Passage("1", "Orlune", "A harbour town."), Passage("2", "", "A country.", url="https://example.org")]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "corpus.parquet")
    return tmp_path / "corpus.parquet"


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout of the hub, which `datasets` loads with the same code."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "wiki").mkdir()
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "wiki" / "train.parquet")
    return tmp_path / "wiki"


def test_a_parquet_file_and_a_dataset_give_the_same_passages(table: Path, dataset: Path) -> None:
    assert list(read_corpus(table)) == list(read_corpus(dataset)) == PASSAGES


def test_they_are_indexed_and_recorded(table: Path, dataset: Path, tmp_path: Path) -> None:
    for number, source in enumerate((table, dataset)):
        build_index(source, tmp_path / str(number))
        recorded = read_manifest(tmp_path / str(number)).source
        assert recorded is not None and recorded.name == str(source)
        assert list(open_index(tmp_path / str(number), "bm25").corpus) == PASSAGES
    parquet.write_table(pa.Table.from_pylist(ROWS[:1]), table)
    with pytest.raises(IndexFolderError, match=r"corpus\.parquet has changed since"):
        open_index(tmp_path / "0", "bm25")


def test_a_changed_dataset_is_detected(dataset: Path) -> None:
    first, same = (open_source(dataset).fingerprint for _ in range(2))
    assert first is not None and same is not None and first() == same()
    parquet.write_table(pa.Table.from_pylist(ROWS[:1]), dataset / "train.parquet")
    changed = open_source(dataset).fingerprint
    assert changed is not None and changed() != first()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, {"id": None, "text": "x"}], "row 3: 'id' is missing"),
        ([{"id": 1.5, "text": "x"}], "row 1: 'id' is 1.5"),
        ([{"name": "x"}], "'id' is missing .*the fields are: name; name yours with --id_field"),
        ([*ROWS, ROWS[0]], "row 1 and .*, row 3: the same id '1';"),
    ],
)
def test_an_invalid_row_is_named(tmp_path: Path, dataset: Path, rows: list[dict[str, object]], message: str) -> None:
    for path in (tmp_path / "bad.parquet", dataset / "train.parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
    for source in (tmp_path / "bad.parquet", dataset):
        with pytest.raises(UserError, match=message):
            build_index(source, tmp_path / "index")
    assert not (tmp_path / "index").exists() and not (tmp_path / ".index.building").exists()


def test_an_invalid_parquet_file_and_a_missing_dataset_are_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"x\.parquet, after row 0: incomplete parquet file"):
        list(read_corpus(tmp_path / "x.parquet"))
    with pytest.raises(
        UserError, match=r"a dataset nobody/nothing is not on this machine, [^\n]*: give a path, or [^\n]*$"
    ):
        list(read_corpus("nobody/nothing"))
    with pytest.raises(UserError, match="http://localhost:8000 is an address, but a corpus is a file"):
        list(read_corpus("http://localhost:8000"))


def test_a_build_is_resumed_for_the_same_source_and_restarted_for_another(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl_search.retrieval.bm25.retriever import BM25Builder
    from trl_search.retrieval.index import folder as index

    class Dies(BM25Builder):
        def build(self, *args: object) -> None:
            (tmp_path / ".index.building" / "scratch").mkdir()
            raise KeyboardInterrupt

    said: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trl_search.retrieval.bm25.retriever.BM25Builder", Dies)
        build_index(table, tmp_path / "index", announce=said.append)
    assert said == [f"the finished part is kept in {tmp_path / '.index.building'}; the same command resumes it"]
    table = Path(shutil.copyfile(table, tmp_path / "elsewhere.parquet"))  # with another modification time
    with monkeypatch.context() as patch:
        patch.setattr(index, "write_corpus", lambda *_, **__: pytest.fail("the corpus was read again"))
        build_index(table, tmp_path / "index", announce=said.append)
    assert said[1].startswith("resuming the build in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.parquet", "elsewhere.parquet", "index"]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trl_search.retrieval.bm25.retriever.BM25Builder", Dies)
        build_index(table, tmp_path / "index", overwrite=True)
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": "9", "text": "x"}) + "\n")
    said.clear()
    build_index(tmp_path / "c.jsonl", tmp_path / "index", overwrite=True, announce=said.append)
    assert "of other passages or options: starting again" in said[0]
    assert read_manifest(tmp_path / "index").passages == 1


def test_a_second_build_of_the_same_output_is_refused(tmp_path: Path, table: Path) -> None:
    def builds_the_same() -> object:
        yield PASSAGES[0]
        build_index(table, tmp_path / "index")

    with pytest.raises(ValueError, match=r"another process is building .*index;"):
        build_index(builds_the_same(), tmp_path / "index")  # type: ignore[arg-type]


def test_a_tar_named_jsonl_is_recognized(tmp_path: Path) -> None:
    line = json.dumps(ROWS[0]).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("deep/wiki_dump.jsonl")
        member.size = len(line)
        tar.addfile(member, io.BytesIO(line))
    (tmp_path / "wiki-18.jsonl.gz").write_bytes(gzip.compress(archive.getvalue()))
    with pytest.raises(UserError, match=r"line 1: holds zero bytes.*trl-search data wiki18"):
        list(read_corpus(tmp_path / "wiki-18.jsonl.gz"))


# Files in other formats


def written(folder: Path, name: str, content: bytes) -> Path:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pa.Codec("zstd").compress}
    path = folder / name
    path.write_bytes(pack.get(path.suffix, bytes)(content))
    return path


JSONL = b'{"_id": "1", "title": "Orlune", "text": "A harbour town."}\n{"_id": "2", "text": "A \\"country\\"."}\n'
ARRAY = b'[{"id": 1, "title": "Orlune", "text": "A harbour town."},\n {"id": 2, "text": "A \\"country\\"."}]'
TSV = b'id\ttext\ttitle\n1\tA harbour town.\tOrlune\n2\t"A ""country""."\t\n'
CSV = b'\xef\xbb\xbfid,extra,text,title\r\n1,x,A harbour town.,Orlune\r\n2,,"A ""country"".",\r\n'


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize(("kind", "content"), [("jsonl", JSONL), ("json", ARRAY), ("tsv", TSV), ("csv", CSV)])
def test_other_file_formats_are_read(tmp_path: Path, kind: str, content: bytes, packed: str) -> None:
    file = written(tmp_path, f"corpus.{kind}{packed}", content)
    expected = [Passage("1", "Orlune", "A harbour town."), Passage("2", "", 'A "country".')]
    assert list(read_corpus(file)) == expected
    (tmp_path / "out").mkdir()
    write_corpus(file, tmp_path / "out").close()
    assert list(Corpus(tmp_path / "out")) == expected


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_a_truncated_compressed_file_is_named(tmp_path: Path, packed: str) -> None:
    content = b"".join(b'{"id": "%d", "text": "%s"}\n' % (n, os.urandom(40).hex().encode()) for n in range(3000))
    file = written(tmp_path, f"corpus.jsonl.{packed}", content)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"corpus\.jsonl\.{packed}, after line \d+: cut off or damaged"):
        list(read_corpus(file))


def test_a_folder_of_text_files_is_a_corpus(tmp_path: Path) -> None:
    """It was read as one row per line, and refused for an id that no option could name."""
    notes = tmp_path / "notes"
    (notes / "alps" / ".git").mkdir(parents=True)
    (notes / "Orlune.txt").write_bytes(b"\xef\xbb\xbfA harbour town.\r\nIt is old.\r\n")
    (notes / "alps" / "Orlune.txt").write_text("A peak.")
    (notes / "alps" / ".git" / "config").write_text("left out")
    found = [
        Passage("Orlune.txt", "Orlune", "A harbour town.\nIt is old.\n"),
        Passage("alps/Orlune.txt", "Orlune", "A peak."),
    ]
    assert list(read_corpus(notes)) == found
    build_index(notes, tmp_path / "index")
    assert list(open_index(tmp_path / "index", "bm25").corpus) == found

    with pytest.raises(IndexFolderError, match="lies in the folder of the corpus"):  # it would be read as documents
        build_index(notes, notes / "index")

    before = open_source(notes).fingerprint
    assert before is not None
    recorded = before()
    (notes / "alps" / "Orlune.txt").write_text("A pass.")
    assert before() != recorded

    with pytest.raises(UserError, match="'docno' is missing; the fields are: id, title, text"):
        open_source(notes, Fields(id_field="docno"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", b"Z\xfcrich", r"b\.txt: not UTF-8 .* at byte 1.*convert the file"),
        ("b.pdf", b"%PDF", r"holds a\.txt, but also b\.pdf: .*files of one kind, \.txt or \.md; move the others"),
    ],
)
def test_a_folder_of_text_files_with_others_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_text("A town.")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_corpus(tmp_path))


def test_a_beir_folder_gives_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(JSONL)
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "who?"}\n')
    (tmp_path / "qrels").mkdir()
    assert [passage.id for passage in read_corpus(tmp_path)] == ["1", "2"]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    assert [passage.id for passage in read_corpus(written(tmp_path, "corpus.json", JSONL))] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'id\ttext\n1\t"Never closed\n2\tx\n', r"corpus\.tsv, after line 0: .*quote"),
        (b'id\ttext\n1\t"Heroes" is a song\n', r"corpus\.tsv, after line 0: .*quotes inside it must be doubled"),
        (b"id\ttext\n1\tone\n2\ta\tb\n", "line 3: 3 fields, but the header has 2"),
        (b"1\tA town.\n2\tx\n", "'id' is missing .*the fields are: 1, A town"),
        (b"id\tbody\n1\tx\n", "neither 'contents' nor 'text'.*id, body; name yours with --text_field"),
        (b"id\ttext\n1\t\xff\n", "after line 0: not UTF-8"),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        list(read_corpus(written(tmp_path, "corpus.tsv", content)))


def test_fields_can_be_named_and_are_stored_under_the_usual_names(tmp_path: Path) -> None:
    fields = Fields(id_field="docno", title_field="heading", text_field="body")
    row = {"docno": "7", "id": "other", "heading": "Orlune", "body": "A town.", "text": "not this"}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "corpus.parquet")
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("corpus.parquet", "corpus.jsonl"):
        build_index(tmp_path / name, tmp_path / f"of {name}", fields=fields)
        assert list(open_index(tmp_path / f"of {name}", "bm25").corpus) == [Passage("7", "Orlune", "A town.")]
        with pytest.raises(UserError, match="'name' is missing; the fields are: docno, id, heading"):
            list(read_corpus(tmp_path / name, Fields(id_field="name")))


def test_bytes_in_a_table_are_decoded_or_refused(tmp_path: Path) -> None:
    for name, text in (("good", "Zürich".encode()), ("bad", b"\xff\xfe")):
        table = pa.table({"id": ["1"], "text": pa.array([text], pa.binary())})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert [passage.text for passage in read_corpus(tmp_path / "good.parquet")] == ["Zürich"]
    with pytest.raises(UserError, match="row 1: bytes that are not UTF-8"):
        list(read_corpus(tmp_path / "bad.parquet"))


def test_repeated_ids_are_dropped_on_request(tmp_path: Path) -> None:
    rows = [("1", "first"), ("2", "x"), ("1", "again"), ("3", "y"), ("1", "again"), ("3", "z")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in rows))
    build_index(tmp_path / "in.jsonl", tmp_path / "index", skip_duplicates=True)
    corpus = open_index(tmp_path / "index", "bm25").corpus
    assert [(passage.id, passage.text) for passage in corpus] == [("1", "first"), ("2", "x"), ("3", "y")]


def test_a_pipe_is_refused_because_a_corpus_is_read_several_times(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "corpus.jsonl")
    with pytest.raises(UserError, match="is a pipe or a device"):  # it was looked up on the hub
        open_source(tmp_path / "corpus.jsonl")
