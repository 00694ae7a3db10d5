"""Writes `run.json` and `metrics.jsonl` of a run's folder (see `run_folder.py`), on rank 0, through resumes.

A resumed run goes on in the same files: what was logged after its checkpoint is dropped, as those steps are run again.
A run that starts from step 0 in a folder with the records of another puts these into `earlier/1`, `earlier/2`, ...
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.common.files import written_whole
from trl_search.common.provenance import command_without_secrets, git_state, hardware, versions, without_secrets
from trl_search.evaluation.outcomes import RESULTS_FILE
from trl_search.records.folder import FORMAT, INFO_FILE, METRICS_FILE, TRAJECTORY_FOLDER, step_of

logger = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """
    The callback that records a run.

    Args:
        model (`str`): What is trained, as it was named.
        protocol (`str`, *optional*): How it searches.

    Attributes:
        task (`dict`): What `run.json` says about questions, retriever and rewards. Set it before training starts.
        info (`dict`): `run.json`, once training has started; on rank 0.
    """

    def __init__(self, *, model: str, protocol: str | None) -> None:
        self.model, self.protocol = model, protocol
        self.task: dict[str, Any] = {}
        self.info: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or ".")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        before: dict[str, Any] = {}
        if state.global_step:
            before = _object(folder / INFO_FILE)
            cut_back(folder, state.global_step, state.log_history)
        else:
            put_aside(folder)
        resumed = before.get("resumed_from_step", [])
        self.info = {
            "format": FORMAT,
            "started_at": before.get("started_at", now),
            "command": command_without_secrets(sys.argv),
            "versions": versions(),
            "git": git_state(),
            "hardware": hardware(args.world_size),
            "config": _config(args),
            "task": without_secrets(self.task),
            "model": self.model,
            "protocol": self.protocol,
            "resumed_from_step": [*resumed, state.global_step] if state.global_step else resumed,
        }
        with written_whole(folder / INFO_FILE) as path:
            path.write_text(json.dumps(self.info, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Without `info` no run was begun: somebody evaluates, and what lies in the folder is another run's.
        if not (logs and self.info and state.is_world_process_zero):
            return
        with (Path(args.output_dir or ".") / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, **logs}))


def cut_back(folder: Path, step: int, logged: Iterable[Mapping[str, Any]] = ()) -> None:
    """Drops what a run recorded after `step`. A missing metrics file is made of what the checkpoint has logged."""
    metrics = folder / METRICS_FILE
    rows: Iterable[Mapping[str, Any]] = logged
    if metrics.is_file():
        rows = [row for line in metrics.read_bytes().split(b"\n") if (row := _parsed(line))]
    with written_whole(metrics) as path:
        kept = [row for row in rows if type(row.get("step")) is int and row["step"] <= step]
        path.write_text("".join(map(_line, kept)), encoding="utf-8")
    for file in (folder / TRAJECTORY_FOLDER).glob("step_*.parquet"):
        if step_of(file) > step:
            file.unlink()


def put_aside(folder: Path) -> None:
    """Moves the records of an earlier run in this folder to `earlier/<n>`; nothing of it is overwritten."""
    if not any((folder / name).exists() for name in (INFO_FILE, METRICS_FILE)):
        return
    number = 1
    while (target := folder / "earlier" / str(number)).exists():
        number += 1
    target.mkdir(parents=True)
    for name in (INFO_FILE, METRICS_FILE, RESULTS_FILE, TRAJECTORY_FOLDER):
        if (folder / name).exists():
            (folder / name).rename(target / name)
    logger.warning("%s held the records of another run, which are in %s now", folder, target)


def _config(args: TrainingArguments) -> dict[str, Any]:
    # `to_dict` puts a placeholder for tokens, given or not.
    values = {name: None if getattr(args, name, 0) is None else value for name, value in args.to_dict().items()}
    return {name: without_secrets(value, name) for name, value in values.items()}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)  # of numpy and torch, too
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def _parsed(line: bytes) -> dict[str, Any]:
    """A line's object; empty where the line is blank, cut off or no object."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _object(path: Path) -> dict[str, Any]:
    return _parsed(path.read_bytes()) if path.is_file() else {}
