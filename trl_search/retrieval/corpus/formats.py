"""Files that hold a corpus, each read as a stream of numbered rows, a row being the bytes of a JSON object.

    .jsonl      one JSON object per line                                   numbered by line
    .json       an array of objects; or one object per line, as .jsonl     by item, by line
    .csv .tsv   a header, then one passage per row                         by line
    .parquet    one passage per row                                        by row

All but parquet may be compressed: .gz, .bz2, .xz, .zst. Quotes in .csv and .tsv are those of the standard: DPR's
`psgs_w100.tsv` is written so. A file whose quotes mean something else is refused, since a quote that is never closed
would swallow the rows that follow it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from trl_search.retrieval.corpus.fields import CorpusError, Fields

Lines = Iterator[tuple[int, bytes]]
TABLES = {".csv": ",", ".tsv": "\t"}
COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
FILES = (".jsonl", ".ndjson", ".json", ".parquet", *TABLES, *COMPRESSED)
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
_LONGEST_FIELD = 1 << 30  # characters of a csv field; Python's own limit is 131,072


def file_rows(path: Path, fields: Fields) -> tuple[str, Callable[[], Lines]]:
    """How the rows of a file are counted ("line", "row" or "item"), and what reads them from the first."""
    kind = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if kind == ".parquet":
        if path.suffix in COMPRESSED:
            raise CorpusError(f"{path}: parquet is compressed in itself; unpack the file first")
        return "row", partial(_parquet_rows, path, fields)
    if kind in TABLES:
        return "line", partial(_table_rows, path, TABLES[kind], fields)
    if kind == ".json" and _first_byte(path) == b"[":
        return "item", partial(_array_items, path)
    return "line", partial(_lines, path)


def row_bytes(row: dict[str, Any], where: str) -> bytes:
    """A table's row as a JSON object. A table has every column in every row: what is null there is left out."""
    there = {name: value for name, value in row.items() if value is not None}
    try:
        there = {name: value.decode() if isinstance(value, bytes) else value for name, value in there.items()}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: bytes that are not UTF-8 ({error.reason} at byte {error.start})") from None
    return json.dumps(there, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _open(path: Path) -> IO[bytes]:
    """The file, unpacked while it is read."""
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")


def _broken(path: Path, number: int, error: Exception) -> CorpusError:
    kind = COMPRESSED.get(path.suffix)
    if kind is None:
        return CorpusError(f"{path}, after line {number}: cannot be read ({error})")
    return CorpusError(f"{path}, after line {number}: not a whole {kind} file ({error}); fetch it again")


def _lines(path: Path) -> Lines:
    """The lines that hold something."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    if b"\0" in line[:512]:  # the header of a tar, in front of its first line
                        raise CorpusError(
                            f"{path}, line 1: holds zero bytes, so it is no text; the hub's wiki-18.jsonl.gz is a tar "
                            "inside, which `trl-search data wiki18` unpacks"
                        )
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line := line.strip():
                    yield number, line
    except (*_BROKEN, OSError) as error:
        raise _broken(path, number, error) from None


def _first_byte(path: Path) -> bytes:
    """The first that is no white space; none where the file cannot be read, which reading it will say."""
    try:
        with _open(path) as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").strip()[:1]
    except (*_BROKEN, OSError):
        return b""


def _array_items(path: Path) -> Lines:
    try:
        with _open(path) as file:
            items = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: not JSON ({error})") from None
    except (*_BROKEN, OSError) as error:
        raise _broken(path, 0, error) from None
    for number, item in enumerate(items, start=1):
        yield number, json.dumps(item, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _table_rows(path: Path, delimiter: str, fields: Fields) -> Lines:
    csv.field_size_limit(_LONGEST_FIELD)
    number = 0
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(rows, [])
            chosen = fields.choose(header, str(path))
            for row in rows:
                number = rows.line_num
                if row:
                    yield number, _table_row(row, header, chosen, f"{path}, line {number}")
    except csv.Error as error:
        raise CorpusError(
            f"{path}, after line {number}: {error}. A field that begins with a quote must end with one, and quotes "
            "inside it must be doubled; write the file so, or as .jsonl"
        ) from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, after line {number}: not UTF-8 ({error.reason}); convert the file") from None
    except (*_BROKEN, OSError) as error:
        raise _broken(path, number, error) from None


def _table_row(row: Sequence[str], header: Sequence[str], chosen: Sequence[str], where: str) -> bytes:
    if len(row) != len(header):
        raise CorpusError(
            f"{where}: {len(row)} fields, and the header has {len(header)} ({', '.join(header)[:200]}); does a field "
            "without quotes hold a delimiter?"
        )
    named = dict(zip(header, row, strict=True))
    return row_bytes({name: named[name] for name in chosen}, where)


def _parquet_rows(path: Path, fields: Fields) -> Lines:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = fields.choose(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row_bytes(row, f"{path}, row {number}")
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{path}, after row {number}: not a whole parquet file ({error}); fetch it again") from None
