"""A corpus: one passage a line, read as a stream, and on disk with random access by row.

Two shapes of line are read, from jsonl, parquet and datasets alike (`sources.py`):

    {"id": "17", "contents": "\\"Mira Talvane\\"\\nMira Talvane was born in Orlune ..."}      (wiki-18 and its kin)
    {"id": "17", "title": "Mira Talvane", "text": "Mira Talvane was born in Orlune ...", "url": "https://..."}

`write_corpus` keeps the lines as they are beside one 8-byte offset each, both memory-mapped by `Corpus`: 21 million
passages cost no Python strings and open at once.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from trl_search.retrieval.corpus.sources import CorpusError, Source, open_source
from trl_search.types import Passage

ROWS, OFFSETS = "corpus.jsonl", "corpus.offsets.npy"


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
        title, text = split_contents(_string(row, "contents", where))
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
    """Reads the passages of a file or dataset one at a time. Blank lines are skipped; ids are not compared here."""
    source = open_source(path)
    for number, line in source.lines():
        yield parse_passage(line, source.where(number))


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

    def __init__(self, folder: str | Path, *, rows: Path | None = None, offsets: Path | None = None) -> None:
        rows, offsets = rows or Path(folder, ROWS), offsets or Path(folder, OFFSETS)
        self._name = str(rows)
        self._offsets = np.load(offsets, mmap_mode="r")
        with open(rows, "rb") as file:
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


def write_corpus(source: Source | str | Path | Iterable[Passage], folder: Path) -> Corpus:
    """Writes a corpus into `folder`, every line checked, and opens the result.

    An error names the line of the source. Duplicate ids are found from 8 bytes an id, not from a set of strings.
    """
    source = source if isinstance(source, Source) else open_source(source)
    offsets, hashes = array("q", [0]), array("q")
    with open(folder / ROWS, "wb") as rows:
        for number, line in tqdm(source.lines(), desc="reading the corpus", unit=" passages", disable=None):
            passage = parse_passage(line, source.where(number))
            offsets.append(offsets[-1] + rows.write(line + b"\n"))
            hashes.append(hash(passage.id))
    if not hashes:
        raise CorpusError(f"{source.name}: no passages; a corpus needs one at least")
    np.save(folder / OFFSETS, np.frombuffer(offsets, dtype=np.int64))
    corpus = Corpus(folder)
    try:
        _check_ids(corpus, np.frombuffer(hashes, dtype=np.int64), source)
    except CorpusError:
        corpus.close()
        raise
    return corpus


def _check_ids(corpus: Corpus, hashes: np.ndarray, source: Source) -> None:
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    for at in np.flatnonzero(ordered[1:] == ordered[:-1]):
        first, second = int(order[at]), int(order[at + 1])
        identity = corpus[second].id
        if corpus[first].id != identity:
            continue  # two ids, one hash
        numbers = [first + 1, second + 1]
        if source.fingerprint is not None:  # can be read again; rows are not lines where blank lines were skipped
            numbers = [number for row, (number, _) in enumerate(source.lines()) if row in (first, second)]
        raise CorpusError(f"{source.where(*numbers)}: the same id {identity!r} twice; ids must be unique")


def join_contents(passage: Passage) -> str:
    """The reverse, and what encoders read: `'"Title"\\ntext'`, or the text alone where there is no title."""
    return f'"{passage.title}"\n{passage.text}' if passage.title else passage.text


def split_contents(contents: str) -> tuple[str, str]:
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
