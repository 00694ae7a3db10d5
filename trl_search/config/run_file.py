"""Finds `run.json`, which records how a run was started, from the folder of the run or of one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_search.common.files import read_object

RUN_FILE = "run.json"
REMEDY = "remove the file, and give the agent's settings as options"


def find_run_file(word: str) -> Path | None:
    """The `run.json` of a run, if `word` is its folder or the folder of one of its checkpoints; else `None`.

    Example:
        >>> find_run_file("runs/qwen3b/best")
        PosixPath('runs/qwen3b/run.json')
    """
    folder = Path(word).expanduser()
    if not folder.is_dir():
        return None
    return next((path for path in (folder / RUN_FILE, folder.resolve().parent / RUN_FILE) if path.is_file()), None)


def read_run_file(word: str) -> dict[str, Any] | None:
    """The content of that file; `None` if `word` is not a run."""
    path = find_run_file(word)
    return None if path is None else read_object(path, REMEDY)
