"""Rows from every file format, each with its place; any damage is reported in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trl_search.common.errors import UserError
from trl_search.common.table_files import read_rows, table_format, table_name

ROWS = [{"question": 'who wrote "The\tMill", and when?', "answer": "Mira"}, {"question": "où ?\nici", "answer": "NA"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = 'question,answer\n"who wrote ""The\tMill"", and when?",Mira\n"où ?\nici",NA\n'.encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.jsonl", LINES),
        ("q.json", LINES),
        ("q.json", json.dumps(ROWS, indent=2).encode()),
        ("q.csv", CSV),
        ("q.csv", b"\xef\xbb\xbf" + CSV.replace(b"Mira\n", b"Mira\r\n")),
        ("q.tsv", re.sub(rb'(question|"),(?=answer|Mira|NA)', rb"\1\t", CSV)),
        ("q.jsonl.gz", gzip.compress(LINES)),
        ("q.csv.bz2", bz2.compress(CSV)),
        ("q.json.xz", lzma.compress(LINES)),
        ("q.jsonl.zst", zstd(LINES)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    rows = list(read_rows(path))
    assert [row for _, row in rows] == ROWS
    assert all(where.startswith(f"{path}, ") for where, _ in rows)
    assert table_name(path) == "q"


def test_only_the_chosen_columns_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert [row for _, row in read_rows(path)] == ROWS
    assert [row for _, row in read_rows(path, lambda columns, where: columns[1:])] == [
        {"answer": "Mira"},
        {"answer": "NA"},
    ]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"not packed at all"]
)
def test_a_damaged_archive_is_reported_in_one_line(
    tmp_path: Path, compress: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]
) -> None:
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz", zstd: "zst"}[compress]
    path = tmp_path / f"q.jsonl.{suffix}"
    path.write_bytes(damage(compress(b"".join(b'{"a": "%d"}\n' % number for number in range(20_000)))))
    with pytest.raises(UserError, match=r"q\.jsonl\.\w+, after line \d+: cut off or damaged"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", b"a,b\n1,2\n3\n", r"q\.csv, line 3: 1 fields, but the header has 2"),
        (
            "q.csv",
            b"a;b\n1;2\n",
            r"q\.csv: the header 'a;b' is separated by semicolons, but a \.csv file by commas: save",
        ),
        (
            "q.tsv",
            b"a,b\n1,2\n",
            r"q\.tsv: the header 'a,b' is separated by commas, but a \.tsv file by tabs: save it",
        ),
        ("q.csv", b"a,b\n1,2,3\n", r"q\.csv, line 2: 3 fields, but the header has 2"),
        ("q.tsv", b'a\tb\n"open\t2\n3\t4\n', r"q\.tsv, after line 0: unexpected end of data"),
        ("q.tsv", b'a\tb\n"x" y\t2\n', r"q\.tsv, after line 0: .* expected after"),
        ("q.json", b'[{"a": 1},\n{"a"}]', r"q\.json: not JSON \(.* at line 2, column"),
        ("q.json", b'[{"a": 1}, 2]', r"q\.json, row 2: expected a JSON object, got int"),
        ("q.jsonl", b'{"a": 1}\n{"a": \xff}\n', r"q\.jsonl, line 2: not UTF-8"),
        ("q.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", r"q\.jsonl, line 1: not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(path))


def test_the_format_follows_from_the_file_name() -> None:
    assert table_format(Path("a/my.set.jsonl.gz")) == ".jsonl" and table_name(Path("a/my.set.jsonl.gz")) == "my.set"
    assert table_format(Path("a.parquet")) == ".parquet" and table_format(Path("a.parquet.gz")) is None
    assert table_format(Path("a.gz")) is None and table_format(Path("a.txt")) is None


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_occurs_twice_is_refused_if_it_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"q.{kind}"
    if kind == "csv":
        path.write_text("id,question,question,answer\n1,who?,where?,Mira\n", "utf-8")
    else:
        columns = [pyarrow.array([value]) for value in ("1", "who?", "where?", "Mira")]
        pyarrow.parquet.write_table(pyarrow.table(columns, ["id", "question", "question", "answer"]), path)
    with pytest.raises(UserError, match="several columns 'question'"):
        list(read_rows(path))
    ((_, row),) = read_rows(path, lambda columns, where: ["id", "answer"])
    assert row == {"id": "1", "answer": "Mira"}
