"""A folder of text files as a corpus: each file is one document.

notes/alps/Orlune.txt  ->  {"id": "alps/Orlune.txt", "title": "Orlune", "text": what the file holds}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trl_search.common.errors import UserError
from trl_search.common.table_files import Row, table_format

TEXT_FORMATS = (".txt", ".md")
COLUMNS = ("id", "title", "text")


@dataclass(frozen=True)
class TextFolder:
    """The text files of a folder and its subfolders, in the order of their names."""

    path: Path
    files: tuple[Path, ...]

    @classmethod
    def find(cls, path: Path) -> TextFolder | None:
        """The text files of a folder. `None` if it has none, or has a table, such as the parquet files of a dataset.

        Raises:
            UserError: if other files are among them, which would be left out in silence.
        """
        files = sorted(_visible_files(path))
        kinds = {file.suffix for file in files}
        if not kinds & {*TEXT_FORMATS} or any(map(table_format, files)):
            return None
        if len(kinds) > 1:
            text = next(file for file in files if file.suffix in TEXT_FORMATS)
            other = next(file for file in files if file.suffix != text.suffix)
            raise UserError(
                f"{path} holds {text.relative_to(path)}, but also {other.relative_to(path)}: a folder of documents "
                f"may hold files of one kind, {' or '.join(TEXT_FORMATS)}; move the others to another folder"
            )
        return cls(path, tuple(files))

    def rows(self) -> Iterator[Row]:
        """Reads the documents, one at a time."""
        for file in self.files:
            name = file.relative_to(self.path).as_posix()
            yield str(file), dict(zip(COLUMNS, (name, file.stem, _read(file)), strict=True))

    def size_and_sha256(self) -> tuple[int, str]:
        """The bytes of all files, and a hash of their names and contents."""
        size, digest = 0, hashlib.sha256()
        for file in self.files:
            content = file.read_bytes()
            size += len(content)
            digest.update(
                f"{file.relative_to(self.path).as_posix()}\0{hashlib.sha256(content).hexdigest()}\n".encode()
            )
        return size, digest.hexdigest()


def _visible_files(path: Path) -> Iterator[Path]:
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}): convert the file") from None
