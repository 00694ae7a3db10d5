"""Finished questions on disk, a line each as they finish: a killed evaluation goes on where it was.

    search-nq.jsonl            {"index": 12, "id": "test_12", "question": ..., "answer": ..., "em": 1.0, ...}
    search-nq.rank1.jsonl      those of the second process

A line that a kill cut off is as if it had never been written. A question whose search failed is written down, and
asked again the next time.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.files import written_whole
from trl_search.evaluation.outcomes import Outcome


class Records:
    """The outcomes of one mode on one set, by the question's place in it.

    Args:
        folder (`Path`): Of the evaluation.
        mode, name (`str`): The mode, and the set's name.
        rank (`int`, *optional*): Of this process; each writes a file of its own, and reads those of all.
    """

    def __init__(self, folder: Path, mode: str, name: str, rank: int = 0) -> None:
        self.folder, self.stem = folder, f"{mode}-{name}"
        self.path = folder / (f"{self.stem}.rank{rank}.jsonl" if rank else f"{self.stem}.jsonl")
        self._file: Any = None

    def read(self) -> dict[int, Outcome]:
        """All outcomes so far, of all processes; where a question was asked again, the one that did not fail."""
        found: dict[int, Outcome] = {}
        for path in self._files():
            for index, outcome in _read(path):
                if index not in found or found[index].failed:
                    found[index] = outcome
        return found

    def append(self, index: int, outcome: Outcome) -> None:
        """Writes one finished question down; it is with the operating system when this returns."""
        if self._file is None:
            self._file = self._open()
        self._file.write(_line(index, outcome))

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Writes all questions at once, in place of what the file held."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as temporary:
            temporary.write_bytes(b"".join(_line(index, outcome) for index, outcome in enumerate(outcomes)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _files(self) -> list[Path]:
        pattern = f"{glob.escape(self.stem)}.rank*.jsonl"
        return [
            path for path in (self.folder / f"{self.stem}.jsonl", *sorted(self.folder.glob(pattern))) if path.exists()
        ]

    def _open(self) -> Any:
        # Unbuffered: a line is one write. What a kill left of a line is cut off, or the next one would be added to it.
        file = self.path.open("ab", buffering=0)
        if (size := file.tell()) and (whole := _whole_lines(self.path)) < size:
            os.truncate(self.path, whole)
        return file


def _line(index: int, outcome: Outcome) -> bytes:
    return json.dumps({"index": index, **dataclasses.asdict(outcome)}, ensure_ascii=False).encode() + b"\n"


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that is whole."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1


def _read(path: Path) -> list[tuple[int, Outcome]]:
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is a line that was cut off, or nothing
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            index, golden = record.pop("index"), record.pop("golden_answers")
            found.append((index, Outcome(golden_answers=tuple(golden), **record)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is no record of this version ({error}): remove that line, and its question is "
                "asked again, or give another --output"
            ) from error
    return found
