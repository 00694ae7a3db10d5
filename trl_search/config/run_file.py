"""`run.json` in the folder of a run, which says how the run was started: found from its folder or a checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_search.common.files import read_object

RUN_FILE = "run.json"
REMEDY = "remove it, and say how to ask by options"


def find_run_file(word: str) -> Path | None:
    """The `run.json` of the run whose folder, or the folder of whose checkpoint, the word names; else `None`.

    Example:
        >>> find_run_file("runs/qwen3b/best")
        PosixPath('runs/qwen3b/run.json')
    """
    folder = Path(word).expanduser()
    if not folder.is_dir():
        return None
    return next((path for path in (folder / RUN_FILE, folder.resolve().parent / RUN_FILE) if path.is_file()), None)


def read_run_file(word: str) -> dict[str, Any] | None:
    """What that file holds; `None` where the word names no run."""
    path = find_run_file(word)
    return None if path is None else read_object(path, REMEDY)
