"""The folder of a run (`output_dir`), and `run.json` in it, which records how the run was started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trl_search.common.files import read_object

RUN_FILE = "run.json"
REMEDY = "remove the file, and give the agent's settings as options"
OUTPUT_DIR = "trainer_output"  # transformers' default


def absolute_folder(output_dir: str | None) -> str:
    """The folder of a run, which stays the same if the user's code changes the working directory."""
    return os.path.abspath(OUTPUT_DIR if output_dir is None else output_dir)


def shown_path(path: Path) -> str:
    """A path as a user would write it: relative to the working directory if it is in there."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


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
