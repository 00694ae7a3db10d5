"""Reads the rows of table files one at a time, each with its line for error messages.

    .jsonl .ndjson         one JSON object per line
    .json                  an array of objects, or one object per line
    .csv   .tsv            a header, then one row per line; every value is a string
    .parquet

The text formats may be compressed: `questions.jsonl.gz`, `.bz2`, `.xz` or `.zst`. .csv and .tsv use standard quoting,
as DPR's `psgs_w100.tsv` does. Other uses of quotes raise an error, because a quote that is never closed would swallow
the rows after it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trl_search.common.errors import UserError
from trl_search.common.files import NotJSON, parse_json

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# The place, such as "questions.jsonl, line 3", and the row.
Row = tuple[str, Mapping[str, Any]]
# Takes the columns of a file with a header, and the file's name; returns the columns to read, or raises.
Choose = Callable[[Sequence[str], str], Sequence[str]]
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError)
_LONGEST_FIELD = 1 << 30  # characters of a csv field; Python's own limit is 131,072


def table_format(path: Path) -> str | None:
    """Returns the format of a file by its name, without its compression; `None` if the format is not known.

    Example:
        >>> table_format(Path("data/questions.jsonl.gz"))
        '.jsonl'
    """
    inner = Path(path.stem) if path.suffix in COMPRESSIONS else path
    if inner.suffix == ".parquet" and inner != path:  # parquet compresses its columns itself
        return None
    return inner.suffix if inner.suffix in FORMATS else None


def table_name(path: Path) -> str:
    """Returns a file's name without format and compression: `data/my.set.jsonl.gz` is `my.set`."""
    inner = Path(path.stem) if path.suffix in COMPRESSIONS else path
    return inner.stem if inner.suffix in FORMATS else path.stem


def read_rows(path: Path, choose: Choose | None = None) -> Iterator[Row]:
    """The rows of a file, whose name determines the format. `choose` takes the columns of a header and the file's
    name; it returns the columns to read, or raises.

    Raises:
        UserError: for an unknown format, or for content that breaks the format; the message names the line.
    """
    kind = table_format(path)
    if kind == ".parquet":
        return _parquet_rows(path, choose)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if kind == ".tsv" else ",", choose)
    if kind == ".json" and _first_byte(path) == b"[":
        return _array_items(path)
    if kind is not None:
        return _json_lines(path)
    raise UserError(
        f"{path} has an unknown format: give a file that ends in {', '.join(FORMATS)}; "
        f"all but parquet may also end in {', '.join(COMPRESSIONS)}"
    )


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """Parses one JSON object; `where` ("corpus.jsonl, line 7") begins every error message.

    Raises:
        UserError: if the line is not a JSON object; the message names the place of the mistake.
    """
    try:
        return _object(parse_json(line), where)
    except NotJSON as error:
        excerpt = repr(line[:80].decode("utf-8", "replace")) + ("..." if len(line) > 80 else "")
        raise UserError(f"{where}: {error}: {excerpt}") from None


def _open(path: Path) -> IO[bytes]:
    """Opens a file; decompresses it while it is read."""
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)(path, "rb")


def _broken(path: Path, line: int, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:  # missing file, no permission, failing disk
        return error
    return UserError(f"{path}, after line {line}: cut off or damaged ({error}): fetch the file again")


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark
                    if b"\0" in line[:512]:  # a tar archive: its header comes before the first line
                        raise UserError(
                            f"{path}, line 1: holds zero bytes, so it is not text; a tar archive, such as the hub's "
                            "wiki-18.jsonl.gz, must be unpacked first (`trl-search data wiki18` does that)"
                        )
                if line := line.strip():
                    where = f"{path}, line {number}"
                    yield where, parse_row(line, where)
    except _BROKEN as error:
        raise _broken(path, number, error) from error


def _first_byte(path: Path) -> bytes:
    """The first byte that is not white space; empty if the file cannot be read (reading it raises the error later)."""
    try:
        with _open(path) as file:
            return file.read(1024).removeprefix(b"\xef\xbb\xbf").strip()[:1]
    except _BROKEN:
        return b""


def _array_items(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            items = parse_json(file.read())
    except NotJSON as error:
        raise UserError(f"{path}: {error}") from None
    except _BROKEN as error:
        raise _broken(path, 0, error) from error
    for number, item in enumerate(items, start=1):
        where = f"{path}, row {number}"
        yield where, _object(item, where)


def _csv_rows(path: Path, delimiter: str, choose: Choose | None) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    number = 0
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(rows, [])
            _check_separator(header, delimiter, path)
            chosen = _unambiguous(header if choose is None else choose(header, str(path)), header, path)
            for cells in rows:
                number = rows.line_num
                if cells and len(cells) != len(header):
                    raise UserError(
                        f"{path}, line {number}: {len(cells)} fields, but the header has {len(header)} "
                        f"({', '.join(header)[:200]}): put double quotes around a value that holds the separator"
                    )
                if cells:
                    named = dict(zip(header, cells, strict=True))
                    yield f"{path}, line {number}", {name: named[name] for name in chosen}
    except csv.Error as error:
        raise UserError(
            f"{path}, after line {number}: {error}. A field that begins with a quote must end with one, and quotes "
            "inside it must be doubled: correct the file, or write it as .jsonl"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after line {number}: not UTF-8 ({error.reason}): convert the file") from None
    except _BROKEN as error:
        raise _broken(path, number, error) from error


def _check_separator(header: Sequence[str], delimiter: str, path: Path) -> None:
    """Refuses a file with another separator: Excel writes `.csv` files with semicolons in many countries."""
    other = next((mark for mark in ";\t,|" if mark != delimiter and len(header) == 1 and mark in header[0]), None)
    if other is not None:
        names = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}
        raise UserError(
            f"{path}: the header {header[0]!r:.80} is separated by {names[other]}, but a {table_format(path)} file by "
            f"{names[delimiter]}: save it with {names[delimiter]}, or as .jsonl"
        )


def _parquet_rows(path: Path, choose: Choose | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = _unambiguous(names if choose is None else choose(names, str(path)), names, path)
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}, after row {number}: incomplete parquet file ({error}): fetch it again") from error


def _unambiguous(chosen: Sequence[str], header: Sequence[str], path: Path) -> Sequence[str]:
    """The chosen columns, none of which may occur twice in the header: the last one would be read, in silence."""
    twice = next((name for name in chosen if list(header).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: there are several columns {twice!r}: rename all but one")
    return chosen


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
