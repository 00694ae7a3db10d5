"""Reads the rows of table files one at a time, each with its place for error messages.

    .jsonl                 one JSON object per line
    .json                  an array of objects, or one object per line
    .csv   .tsv            a header, then one row per line; every value is a string
    .parquet

The text formats may be compressed: `questions.jsonl.gz`, `.bz2`, `.xz` or `.zst`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trl_search.common.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# "questions.jsonl, line 3", and the row.
Row = tuple[str, Mapping[str, Any]]


def table_format(path: Path) -> str | None:
    """Returns the format of a file by its name, without its compression; `None` for any other file.

    Example:
        >>> table_format(Path("data/questions.jsonl.gz"))
        '.jsonl'
    """
    inner = Path(path.stem) if path.suffix in COMPRESSIONS else path
    if inner.suffix == ".parquet" and inner != path:  # it compresses its own columns
        return None
    return inner.suffix if inner.suffix in FORMATS else None


def table_name(path: Path) -> str:
    """Returns a file's name without format and compression: `data/my.set.jsonl.gz` is `my.set`."""
    inner = Path(path.stem) if path.suffix in COMPRESSIONS else path
    return inner.stem if inner.suffix in FORMATS else path.stem


def read_rows(path: Path, choose: Callable[[Sequence[str], str], Sequence[str]] | None = None) -> Iterator[Row]:
    """Reads the rows of a file.

    Args:
        path (`Path`): The file; its name says the format.
        choose (`Callable`, *optional*):
            Gets the columns of a file that has a header, and its name; returns those to read, or refuses them.

    Raises:
        UserError: for a file of no known format, and for content that its format does not allow; names the line.
    """
    kind = table_format(path)
    if kind is None:
        raise UserError(
            f"{path} is in none of the formats that are read: {', '.join(FORMATS)}, "
            f"all but parquet also with {', '.join(COMPRESSIONS)}"
        )
    if kind == ".parquet":
        yield from _parquet_rows(path, choose)
        return
    with _opened(path) as (file, place):
        if kind == ".jsonl":
            yield from _json_lines(file, path, place)
        elif kind == ".json":
            yield from _json_rows(file, path, place)
        else:
            yield from _csv_rows(file, path, place, "\t" if kind == ".tsv" else ",", choose)


class _Place:
    """How far a file was read."""

    line = 0


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[str], _Place]]:
    """The text of a file, unpacked, and where reading it stands; what breaks while it is read names that line."""
    import pyarrow

    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": lambda path: pyarrow.input_stream(path, compression="zstd"),
    }
    place = _Place()
    try:
        with (
            openers.get(path.suffix, lambda path: path.open("rb"))(path) as raw,
            # utf-8-sig: a file saved by a spreadsheet begins with a byte-order mark.
            io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file,
        ):
            yield file, place
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after line {place.line}: not UTF-8 text: convert the file to UTF-8") from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{path}, after line {place.line}: cut off or damaged ({error}): fetch the file again"
        ) from error


def _json_lines(file: IO[str], path: Path, place: _Place) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        place.line = number
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(_loads(line, where), where)


def _json_rows(file: IO[str], path: Path, place: _Place) -> Iterator[Row]:
    """An array of objects; a file that does not begin with one is read line by line, whatever its name says."""
    text = file.read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(io.StringIO(text), path, place)
        return
    for number, row in enumerate(_loads(text, str(path)), start=1):
        where = f"{path}, row {number}"
        yield where, _object(row, where)


def _csv_rows(
    file: IO[str], path: Path, place: _Place, delimiter: str, choose: Callable[[Sequence[str], str], Any] | None
) -> Iterator[Row]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            place.line = reader.line_num
            if header is None:
                header = cells
                if choose is not None:
                    choose(header, str(path))
            elif len(cells) != len(header) and cells:
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} fields, and the header has {len(header)}: put "
                    "double quotes around a value that holds the separator"
                )
            elif cells:
                yield f"{path}, line {reader.line_num}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _parquet_rows(path: Path, choose: Callable[[Sequence[str], str], Sequence[str]] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(columns=names if choose is None else choose(names, str(path))):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a parquet file, or was cut off while it was copied: {error}") from error


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{where}: not valid JSON ({error.msg} at {at})") from error
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, brackets 100,000 deep
        raise UserError(f"{where}: not JSON that can be read ({error})") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON object is needed, not {type(value).__name__}")
    return value
