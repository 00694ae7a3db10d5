"""Reads a corpus as a stream of rows, from a file, a folder, a dataset or passages in memory.

    wiki.jsonl   psgs_w100.tsv.gz   wiki.parquet     a file (`common/table_files.py`)
    scifact/                                         a BEIR folder with its corpus.jsonl, or an index folder
    notes/                                           a folder of .txt or .md files (`text_folder.py`)
    org/name   org/name:config:split                 a dataset of the hub, through `datasets`; or a folder of its files

For every source, `fields.py` finds the fields, and every error names its place: "x.jsonl, line 7".
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trl_search.common.blocks import read_sha256
from trl_search.common.errors import UserError, first_line
from trl_search.common.files import cache_folder, home_expanded, written_whole
from trl_search.common.hub import refuse_unreachable_dataset
from trl_search.common.table_files import COMPRESSIONS, FORMATS, Row, read_rows
from trl_search.retrieval.corpus.fields import USUAL_FIELDS, Fields, passage_row
from trl_search.retrieval.corpus.text_folder import COLUMNS, TextFolder
from trl_search.types import Passage

BEIR_CORPUS = [f"corpus.jsonl{packed}" for packed in ("", *COMPRESSIONS)]


@dataclass(frozen=True)
class Fingerprint:
    """The content of a file, by hash. A file is hashed again only if its size or modification time changes."""

    name: str
    bytes: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str) -> Fingerprint:
        stat = path.stat()
        return cls(name, stat.st_size, stat.st_mtime_ns, _sha256(path))

    def matches(self, path: Path) -> bool:
        """Whether the file still has this content. A copy, with its own modification time, is hashed once."""
        stat = path.stat()
        if stat.st_size != self.bytes:
            return False
        return stat.st_mtime_ns == self.mtime_ns or _remembered_sha256(path) == self.sha256

    def changed(self) -> bool:
        """Whether the named file has different content now. A missing file counts as unchanged."""
        return Path(self.name).is_file() and not self.matches(Path(self.name))


@dataclass(frozen=True)
class Source:
    """The source of a corpus."""

    name: str  # the name for messages
    # Iterates from the first row; yields the place ("x.jsonl, line 7") and the fields of each row
    rows: Callable[[], Iterator[Row]]
    # Identifies the content; `None` for passages in memory, which can be read only once
    fingerprint: Callable[[], Fingerprint] | None = None


def open_source(corpus: str | Path | Iterable[Passage], fields: Fields = USUAL_FIELDS) -> Source:
    """Opens the source that `corpus` names. A file is not read yet; a dataset is fetched.

    Raises:
        UserError: if there is no such file.
    """
    if not isinstance(corpus, (str, Path)):
        return Source("the passages given", partial(_passage_rows, corpus))
    path = Path(home_expanded(corpus))
    if path.is_dir():
        path = next((path / name for name in BEIR_CORPUS if (path / name).is_file()), path)
    if path.is_file():
        rows = partial(read_rows, path, fields.choose)
        return Source(str(path), rows, partial(Fingerprint.of, path, str(path.resolve())))
    if path.exists() and not path.is_dir():
        raise UserError(f"{corpus} is a pipe or a device, and a corpus is read several times: write it to a file")
    if path.suffix in (*FORMATS, *COMPRESSIONS) and not path.is_dir():
        raise UserError(f"there is no corpus file {corpus}")
    if "://" in str(corpus):
        raise UserError(f"{corpus} is an address, but a corpus is a file, an index folder, or a dataset of the hub")
    if path.is_dir() and (folder := TextFolder.find(path)) is not None:
        return _text_source(folder, fields)
    return _dataset_source(str(path) if path.is_dir() else str(corpus), fields)


def _text_source(folder: TextFolder, fields: Fields) -> Source:
    fields.choose(COLUMNS, str(folder.path))

    def fingerprint() -> Fingerprint:
        size, sha256 = folder.size_and_sha256()
        return Fingerprint(str(folder.path), size, 0, sha256)

    return Source(str(folder.path), folder.rows, fingerprint)


def _passage_rows(passages: Iterable[Passage]) -> Iterator[Row]:
    return ((f"passage {number}", passage_row(passage)) for number, passage in enumerate(passages, start=1))


def _dataset_source(name: str, fields: Fields) -> Source:
    """Opens `name[:config[:split]]`; the default split is `train`."""
    from datasets import load_dataset

    path, *rest = [name] if Path(name).is_dir() else name.split(":")
    config, split = [*rest, "", ""][:2]
    if path.count("/") < 2:
        refuse_unreachable_dataset(path, config or None, f"a dataset {path}")
    try:
        dataset = load_dataset(path, config or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no corpus file {name}, and no dataset of this name could be loaded: {first_line(error)}"
        ) from None
    dataset = dataset.select_columns(fields.choose(dataset.column_names, name))
    # `datasets` derives it from the files (their hashes on the hub, their times on disk) and from what was selected.
    identity = hashlib.sha256(str(dataset._fingerprint).encode()).hexdigest()

    def rows() -> Iterator[Row]:
        return ((f"{name}, row {number}", row) for number, row in enumerate(dataset, start=1))

    return Source(name, rows, lambda: Fingerprint(name, int(dataset.dataset_size or 0), 0, identity))


def _remembered_sha256(path: Path) -> str:
    """The hash of a file, cached in the cache folder while the file's size and modification time stay the same."""
    stat = path.stat()
    seen = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    note = cache_folder() / "hashes" / hashlib.sha256(seen.encode()).hexdigest()
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = _sha256(path)
    # If the cache cannot be written, the file is hashed again next time.
    with contextlib.suppress(OSError), written_whole(note) as unfinished:
        unfinished.write_text(digest, encoding="ascii")
    return digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return read_sha256(file, f"hashing {path.name}", path.stat().st_size)
