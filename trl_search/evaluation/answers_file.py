"""Writes one line per question as soon as it finishes, so that a killed evaluation can resume.

    search-nq.jsonl            {"index": 12, "id": "test_12", "question": ..., "answer": ..., "em": 1.0, ...}
    search-nq.rank1.jsonl      the questions of the second process

A line that a kill cut off is dropped. A question whose search failed is recorded, and asked again the next time.
"""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.files import whole_lines, write_jsonl
from trl_search.evaluation.outcomes import Outcome


class Records:
    """The outcomes of one mode on one set, by the index of the question in the set. Each rank writes its own file and
    reads all files."""

    def __init__(self, folder: Path, mode: str, name: str, rank: int = 0) -> None:
        self.folder, self.stem = folder, f"{mode}-{name}"
        self.path = folder / (f"{self.stem}.rank{rank}.jsonl" if rank else f"{self.stem}.jsonl")
        self._file: Any = None

    def read(self) -> dict[int, Outcome]:
        """All outcomes of all processes; of a question that was asked again, the outcome that did not fail."""
        found: dict[int, Outcome] = {}
        others = sorted(self.folder.glob(f"{glob.escape(self.stem)}.rank*.jsonl"))
        for path in (self.folder / f"{self.stem}.jsonl", *others):
            for index, outcome in _read(path):
                if index not in found or found[index].failed:
                    found[index] = outcome
        return found

    def append(self, index: int, outcome: Outcome) -> None:
        """Writes one finished question, without a buffer in this process."""
        if self._file is None:
            whole_lines(self.path)  # removes a cut-off last line, or the next line would be appended to it
            self._file = self.path.open("ab", buffering=0)
        line = json.dumps(_row(index, outcome), ensure_ascii=False).encode() + b"\n"
        while line:  # on a disk that is nearly full, a write takes only a part; the next one raises
            line = line[self._file.write(line) :]

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Writes all questions at once, and replaces the content of the file."""
        write_jsonl(self.path, (_row(index, outcome) for index, outcome in enumerate(outcomes)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _row(index: int, outcome: Outcome) -> dict[str, Any]:
    return {"index": index, **dataclasses.asdict(outcome)}


def _read(path: Path) -> list[tuple[int, Outcome]]:
    content = path.read_bytes() if path.exists() else b""
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):  # without a line that is still being written
        try:
            record = json.loads(line)
            index, golden = record.pop("index"), record.pop("golden_answers")
            found.append((index, Outcome(golden_answers=tuple(golden), **record)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is not a record of this version ({error}): remove that line, so that its "
                "question is asked again, or give another --output"
            ) from error
    return found
