"""What a corpus is read from: jsonl, parquet, a dataset, or passages in memory; each a stream of numbered lines.

    corpus.jsonl   corpus.jsonl.gz          one JSON object a line
    corpus.parquet                          one passage a row
    org/name   org/name:config:split        a dataset of the hub, through `datasets`; also a folder of such files

Wherever they come from, the fields are those of `corpus.py`, and every complaint says where it was: "x.jsonl, line 7".
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.types import Passage

FIELDS = ("id", "contents", "title", "text", "url")
FILES = (".jsonl", ".gz", ".json", ".parquet")


class CorpusError(UserError):
    """A corpus cannot be read. The message names the file and the line."""


@dataclass(frozen=True)
class Fingerprint:
    """A file's content, by hash. Size and time only spare the hashing when they have not moved."""

    name: str
    bytes: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str) -> Fingerprint:
        stat = path.stat()
        return cls(name, stat.st_size, stat.st_mtime_ns, _sha256(path))

    def matches(self, path: Path) -> bool:
        stat = path.stat()
        if stat.st_size != self.bytes:
            return False
        return stat.st_mtime_ns == self.mtime_ns or _sha256(path) == self.sha256

    def changed(self) -> bool:
        """Whether the file of this name is another now. One that is gone, or is no file, has not changed."""
        return Path(self.name).is_file() and not self.matches(Path(self.name))


@dataclass(frozen=True)
class Source:
    """Where passages come from. `lines()` gives each as the bytes of a JSON object, numbered from 1 as an editor does.

    Args:
        name (`str`): As it is called in messages.
        unit (`str`): What the numbers count: `"line"`, `"row"` or `"passage"`.
        lines (`Callable`): Starts reading, from the first.
        fingerprint (`Callable`): Tells the content from any other; `None` for passages in memory, which are read once.
    """

    name: str
    unit: str
    lines: Callable[[], Iterator[tuple[int, bytes]]]
    fingerprint: Callable[[], Fingerprint] | None = None

    def where(self, *numbers: int) -> str:
        """`"x.jsonl, line 7"`, `"x.jsonl, lines 7 and 9"`, and for passages in memory `"passage 7"`."""
        place = f"{self.unit}{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"
        return place if self.fingerprint is None else f"{self.name}, {place}"


def open_source(corpus: str | Path | Iterable[Passage]) -> Source:
    """Finds out what `corpus` names. Reads nothing yet of a file; a dataset is fetched."""
    if not isinstance(corpus, (str, Path)):
        return Source("the passages given", "passage", partial(_passage_lines, corpus))
    path = Path(corpus)
    if path.suffix not in FILES and not path.is_file():
        return _dataset_source(str(corpus))
    if not path.is_file():
        raise CorpusError(f"there is no corpus file {corpus}")
    fingerprint = partial(Fingerprint.of, path, str(path.resolve()))
    if path.suffix == ".parquet":
        return Source(str(corpus), "row", partial(_parquet_lines, path), fingerprint)
    return Source(str(corpus), "line", partial(_jsonl_lines, path), fingerprint)


def _jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
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
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path}, after line {number}: not a whole gzip file ({error}); fetch it again") from None


def _parquet_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in FIELDS if name in file.schema_arrow.names]
            if not columns:
                raise CorpusError(
                    f"{path}: no column of {', '.join(FIELDS)}; has {', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _line(row)
    except pyarrow.ArrowInvalid as error:
        raise CorpusError(f"{path}, after row {number}: not a whole parquet file ({error}); fetch it again") from None


def _passage_lines(passages: Iterable[Passage]) -> Iterator[tuple[int, bytes]]:
    for number, passage in enumerate(passages, start=1):
        row = {"id": passage.id, "title": passage.title, "text": passage.text, "url": passage.url}
        yield number, _line(row)


def _dataset_source(name: str) -> Source:
    """`name[:config[:split]]`, the split `train` where none is named."""
    from datasets import load_dataset

    path, *rest = [name] if Path(name).is_dir() else name.split(":")
    config, split = [*rest, "", ""][:2]
    try:
        dataset = load_dataset(path, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"there is no corpus file {name}, and no dataset of this name could be loaded: "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    columns = [column for column in FIELDS if column in dataset.column_names]
    if not columns:
        raise CorpusError(f"{name}: no column of {', '.join(FIELDS)}; has {', '.join(dataset.column_names)}")
    dataset = dataset.select_columns(columns)
    # `datasets` derives it from the files (their hashes on the hub, their times on disk) and from what was selected.
    identity = hashlib.sha256(str(dataset._fingerprint).encode()).hexdigest()

    def lines() -> Iterator[tuple[int, bytes]]:
        return ((number, _line(row)) for number, row in enumerate(dataset, start=1))

    return Source(name, "row", lines, lambda: Fingerprint(name, int(dataset.dataset_size or 0), 0, identity))


def _line(row: dict[str, Any]) -> bytes:
    """A table's row as a line of jsonl. A table has every column in every row: what is null there is left out."""
    there = {name: value for name, value in row.items() if value is not None}
    return json.dumps(there, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(desc=f"hashing {path.name}", total=path.stat().st_size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
