"""A corpus: passages are read as a stream, and stored on disk with random access by row.

Rows of two shapes are read, from any file format (`common/table_files.py`):

    {"id": "17", "contents": "\\"Mira Talvane\\"\\nMira Talvane was born in Orlune ..."}      (as in wiki-18)
    {"id": "17", "title": "Mira Talvane", "text": "Mira Talvane was born in Orlune ...", "url": "https://..."}

If a row has both `title` and `contents`, the first line of `contents` counts as its title only if it equals `title`.

`write_corpus` stores the passages as lines of JSON, in the second shape, with an 8-byte offset for each. `Corpus` maps
both files into memory, so that 21 million passages need no Python strings and open at once.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.common.table_files import parse_row
from trl_search.retrieval.corpus.fields import TITLE, URL, USUAL_FIELDS, Fields, passage_row
from trl_search.retrieval.corpus.sources import Source, open_source
from trl_search.types import Passage

ROWS, OFFSETS = "corpus.jsonl", "corpus.offsets.npy"
CONTENTS = "contents"
logger = logging.getLogger(__name__)


def parse_passage(row: Mapping[str, Any], where: str, fields: Fields = USUAL_FIELDS) -> Passage:
    """Reads one row of a corpus; `where` ("corpus.jsonl, line 7") begins every error message.

    Raises:
        UserError: if a field is missing or is not text.
    """
    name = fields.id_name(row, where)
    identity = _value(row, name, where)
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        raise UserError(f"{where}: {_shown(row, name)}: every passage needs an id, a string or an integer")
    title, text = _title_and_text(row, where, fields)
    url = None if row.get(URL) is None else _string(row, URL, where)
    passage = Passage(id=str(identity), title=title, text=text, url=url)
    try:
        f"{passage.id}{title}{text}{url}".encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair (a \\ud8xx escape), which no tokenizer reads") from None
    return passage


def _title_and_text(row: Mapping[str, Any], where: str, fields: Fields) -> tuple[str, str]:
    name, title_name = fields.text_name(row, where), fields.title_field or TITLE
    text = _string(row, name, where)
    title = "" if row.get(title_name) is None else _without_doubled_quotes(_string(row, title_name, where))
    if name != CONTENTS:
        return title, text
    line, newline, rest = text.partition("\n")
    plain = _without_doubled_quotes(line)
    first, rest = split_contents(text if plain == line else f'"{plain}"{newline}{rest}')
    return (first, rest) if title in ("", first) else (title, text)


def _without_doubled_quotes(title: str) -> str:
    """`""Orlune""`, from a CSV field that was not parsed as CSV -> `Orlune`."""
    return title[2:-2] if len(title) > 4 and title.startswith('""') and title.endswith('""') else title


def read_corpus(path: str | Path, fields: Fields = USUAL_FIELDS) -> Iterator[Passage]:
    """Reads the passages of a file or dataset one at a time. Blank lines are skipped; ids are not compared here."""
    for where, row in open_source(path, fields).rows():
        yield parse_passage(row, where, fields)


def refuse_duplicates(passages: Iterable[Passage]) -> Iterator[Passage]:
    """Yields the passages, and raises for a repeated id. For corpora that fit in memory.

    Raises:
        UserError: for a repeated id, or an item that is not a `Passage`.
    """
    if not isinstance(passages, Iterable) or isinstance(passages, str | bytes):
        raise UserError(f"passages must be a list of Passage, not {passages!r:.60}")
    rows: dict[str, int] = {}
    for row, passage in enumerate(passages, start=1):
        if not isinstance(passage, Passage):
            raise UserError(
                f"passage {row} is {passage!r:.60}: write it as Passage(id={str(row)!r}, title='...', text='...')"
            )
        first = rows.setdefault(passage.id, row)
        if first != row:
            raise UserError(f"passages {first} and {row} have the same id {passage.id!r}; ids must be unique")
        yield passage


class Passages(Protocol):
    """Passages by row: a `Corpus` on disk, or a tuple."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Passage: ...


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

    def share_above(self, size_bytes: int) -> float:
        """The share of the rows that are longer than this, without reading them."""
        return float((np.diff(self._offsets) > size_bytes).mean()) if len(self) else 0.0

    def __getitem__(self, row: int) -> Passage:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a corpus of {len(self)} passages")
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        where = f"{self._name}, line {row + 1}"
        return parse_passage(parse_row(self._rows[start:end], where), where)

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(len(self)))

    def close(self) -> None:
        self._rows.close()


def write_corpus(
    source: Source | str | Path | Iterable[Passage],
    folder: Path,
    fields: Fields = USUAL_FIELDS,
    *,
    skip_duplicates: bool = False,
) -> Corpus:
    """Writes a corpus into `folder`, checks every row, and opens the result.

    Duplicate ids are found with 8 bytes per id; a set of strings would take ten times that.

    Raises:
        UserError: if a row is not a passage, or repeats an id; the message names the line of the source.
            With `skip_duplicates`, the first passage of each id is kept and the others are dropped.
    """
    source = source if isinstance(source, Source) else open_source(source, fields)
    offsets, hashes = array("q", [0]), array("q")
    with open(folder / ROWS, "wb") as rows:
        for where, row in tqdm(source.rows(), desc="reading the corpus", unit=" passages", disable=None):
            passage = parse_passage(row, where, fields)
            offsets.append(offsets[-1] + rows.write(passage_line(passage) + b"\n"))
            hashes.append(hash(passage.id))
    if not hashes:
        raise UserError(f"{source.name}: no passages; a corpus needs one at least")
    np.save(folder / OFFSETS, np.frombuffer(offsets, dtype=np.int64))
    corpus = Corpus(folder)
    repeated = _repeated(corpus, np.frombuffer(hashes, dtype=np.int64))
    if not repeated:
        return corpus
    if not skip_duplicates:
        first, second = min(repeated, key=lambda pair: pair[1])
        identity = corpus[second].id
        corpus.close()
        places = [f"passage {first + 1}", f"passage {second + 1}"]
        if source.fingerprint is not None:  # can be read again; row and line numbers differ after blank lines
            places = [where for row, (where, _) in enumerate(source.rows()) if row in (first, second)]
        raise UserError(
            f"{' and '.join(places)}: the same id {identity!r}; ids must be unique (--skip_duplicates keeps the "
            "first passage of each)"
        )
    corpus.close()
    _drop_rows(folder, np.array([second for _, second in repeated]))
    logger.warning("%s: %s passages repeat an id and are dropped", source.name, f"{len(repeated):,}")
    return Corpus(folder)


def _repeated(corpus: Corpus, hashes: np.ndarray) -> list[tuple[int, int]]:
    """Rows that repeat the id of an earlier row: `[(earlier, row), ...]`."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    pairs = []
    seen: dict[str, int] = {}  # the ids with one hash, each with its first row; two ids may share a hash
    for at in np.flatnonzero(ordered[1:] == ordered[:-1]):
        earlier, row = int(order[at]), int(order[at + 1])
        if at == 0 or ordered[at - 1] != ordered[at]:
            seen = {corpus[earlier].id: earlier}
        identity = corpus[row].id
        if identity in seen:
            pairs.append((seen[identity], row))
        else:
            seen[identity] = row
    return pairs


def _drop_rows(folder: Path, dropped: np.ndarray) -> None:
    """Rewrites the corpus without some rows."""
    starts = np.load(folder / OFFSETS)
    kept = np.ones(len(starts) - 1, dtype=bool)
    kept[dropped] = False
    new = folder / f"{ROWS}.new"
    with open(folder / ROWS, "rb") as old, open(new, "wb") as rows:
        for keep, line in zip(kept, old, strict=True):
            if keep:
                rows.write(line)
    os.replace(new, folder / ROWS)
    np.save(folder / OFFSETS, np.concatenate([[0], np.cumsum(np.diff(starts)[kept])]))


def passage_line(passage: Passage) -> bytes:
    """A passage as a line of a corpus, without the newline."""
    return json.dumps(passage_row(passage), ensure_ascii=False).encode()


def join_contents(passage: Passage) -> str:
    """`'"Title"\\ntext'`, which encoders read; only the text if there is no title."""
    return f'"{passage.title}"\n{passage.text}' if passage.title else passage.text


def split_contents(contents: str) -> tuple[str, str]:
    """`'"Title"\\ntext'` -> `("Title", "text")`. Contents of a single line are text without a title."""
    title, newline, text = contents.partition("\n")
    if newline and len(title) >= 2 and title[0] == title[-1] == '"':
        return title[1:-1], text
    return (title, text) if text.strip() else ("", contents)


def _string(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _value(row, key, where)
    if isinstance(value, bytes):  # a binary column of parquet
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: bytes that are not UTF-8 ({error.reason} at byte {error.start})") from None
    if not isinstance(value, str):
        raise UserError(f"{where}: {_shown(row, key)}; it must be a string")
    return value


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    if row.get(key) is None:
        raise UserError(f"{where}: {key!r} is missing; the fields are: {', '.join(row)[:300]}")
    return row[key]


def _shown(row: Mapping[str, Any], key: str) -> str:
    return f"{key!r} is {json.dumps(row[key], default=str)[:80]}"
