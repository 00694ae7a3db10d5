"""A corpus: one passage a line of a jsonl file, read as a stream, and on disk with random access by row.

Two shapes of line are read, `.jsonl` or `.jsonl.gz`:

    {"id": "17", "contents": "\\"Mira Talvane\\"\\nMira Talvane was born in Orlune ..."}      (wiki-18 and its kin)
    {"id": "17", "title": "Mira Talvane", "text": "Mira Talvane was born in Orlune ...", "url": "https://..."}

`write_corpus` keeps the lines as they are beside one 8-byte offset each, both memory-mapped by `Corpus`: 21 million
passages cost no Python strings and open at once.
"""

from __future__ import annotations

import gzip
import json
import mmap
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.errors import UserError
from trl_search.types import Passage

ROWS, OFFSETS = "corpus.jsonl", "corpus.offsets.npy"


class CorpusError(UserError):
    """A corpus cannot be read. The message names the file and the line."""


def parse_passage(line: bytes, where: str) -> Passage:
    """Reads one line of a corpus; `where` ("corpus.jsonl, line 7") opens every complaint."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON ({error.msg} at column {error.colno}): {_excerpt(line)}") from None
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, brackets 100,000 deep
        raise CorpusError(f"{where}: not a passage ({error}): {_excerpt(line)}") from None
    if not isinstance(row, dict):
        raise CorpusError(f"{where}: expected a JSON object, got {type(row).__name__}: {_excerpt(line)}")
    identity = row.get("id")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        raise CorpusError(f"{where}: {_problem(row, 'id')}: every passage needs an 'id', a string or an integer")
    if "contents" in row:
        title, text = _split_contents(_string(row, "contents", where))
    elif "text" in row:
        title = "" if row.get("title") is None else _string(row, "title", where)
        text = _string(row, "text", where)
    else:
        raise CorpusError(f"{where}: neither 'contents' nor 'text' is there; the fields are: {', '.join(row)}")
    url = None if row.get("url") is None else _string(row, "url", where)
    passage = Passage(id=str(identity), title=title, text=text, url=url)
    try:
        f"{passage.id}{title}{text}{url}".encode()
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: half of a surrogate pair (a \\ud8xx escape), which no tokenizer reads") from None
    return passage


def read_corpus(path: str | Path) -> Iterator[Passage]:
    """Reads the passages of a jsonl file one at a time. Blank lines are skipped; ids are not compared here."""
    path = Path(path)
    for number, line in _lines(path):
        yield parse_passage(line, f"{path}, line {number}")


def refuse_duplicates(passages: Iterable[Passage]) -> Iterator[Passage]:
    """Passes passages through and fails on an id seen before. For worlds that fit in memory."""
    rows: dict[str, int] = {}
    for row, passage in enumerate(passages, start=1):
        first = rows.setdefault(passage.id, row)
        if first != row:
            raise CorpusError(f"passages {first} and {row} have the same id {passage.id!r}; ids must be unique")
        yield passage


class Corpus:
    """Passages on disk, by row: `corpus[17]`. Safe to read from several threads."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self._name = str(folder / ROWS)
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        with open(folder / ROWS, "rb") as file:
            self._rows = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        return parse_passage(self._rows[start:end], f"{self._name}, line {row + 1}")

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(len(self)))

    def close(self) -> None:
        self._rows.close()


def write_corpus(source: str | Path | Iterable[Passage], folder: Path) -> Corpus:
    """Writes a corpus file or passages into `folder`, every line checked, and opens the result.

    An error names the line of the source. Duplicate ids are found from 8 bytes an id, not from a set of strings.
    """
    offsets, hashes = array("q", [0]), array("q")
    with open(folder / ROWS, "wb") as rows:
        for line, passage in tqdm(_checked(source), desc="reading the corpus", unit=" passages", disable=None):
            offsets.append(offsets[-1] + rows.write(line + b"\n"))
            hashes.append(hash(passage.id))
    if not hashes:
        raise CorpusError(f"{_name(source)}: no passages; a corpus needs one at least")
    np.save(folder / OFFSETS, np.frombuffer(offsets, dtype=np.int64))
    corpus = Corpus(folder)
    _check_ids(corpus, np.frombuffer(hashes, dtype=np.int64), source)
    return corpus


def _checked(source: str | Path | Iterable[Passage]) -> Iterator[tuple[bytes, Passage]]:
    """Each line of the new corpus with the passage it holds."""
    if isinstance(source, (str, Path)):
        for number, line in _lines(Path(source)):
            yield line, parse_passage(line, f"{source}, line {number}")
        return
    for number, passage in enumerate(source, start=1):
        row = {"id": passage.id, "title": passage.title, "text": passage.text}
        if passage.url is not None:
            row["url"] = passage.url
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
        yield line, parse_passage(line, f"passage {number}")


def _check_ids(corpus: Corpus, hashes: np.ndarray, source: str | Path | Iterable[Passage]) -> None:
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    for at in np.flatnonzero(ordered[1:] == ordered[:-1]):
        first, second = int(order[at]), int(order[at + 1])
        identity = corpus[second].id
        if corpus[first].id != identity:
            continue  # two ids, one hash
        places = f"passages {first + 1} and {second + 1}"
        if isinstance(source, (str, Path)):  # rows are not lines where blank lines were skipped
            numbers = [number for row, (number, _) in enumerate(_lines(Path(source))) if row in (first, second)]
            places = f"{source}, lines {numbers[0]} and {numbers[1]}"
        corpus.close()
        raise CorpusError(f"{places}: the same id {identity!r} twice; ids must be unique")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, numbered as an editor numbers them."""
    if not path.is_file():
        raise CorpusError(f"there is no corpus file {path}")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line := line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path}, after line {number}: not a whole gzip file ({error}); fetch it again") from None


def _split_contents(contents: str) -> tuple[str, str]:
    """`'"Title"\\ntext'` -> `("Title", "text")`. Contents of one unquoted line are text without a title."""
    title, newline, text = contents.partition("\n")
    if len(title) >= 2 and title[0] == title[-1] == '"':
        return title[1:-1], text
    return (title, text) if newline else ("", contents)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise CorpusError(f"{where}: {_problem(row, key)}; it must be a string")
    value: str = row[key]
    return value


def _problem(row: dict[str, Any], key: str) -> str:
    return f"{key!r} is {json.dumps(row[key])[:80]}" if key in row else f"{key!r} is missing"


def _excerpt(line: bytes) -> str:
    return repr(line[:80].decode("utf-8", "replace")) + ("..." if len(line) > 80 else "")


def _name(source: str | Path | Iterable[Passage]) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the passages given"
