"""Writes `run.json` and `metrics.jsonl` into the folder of a run (see `folder.py`), on rank 0.

A resumed run appends to the same files. Logs after its checkpoint are dropped, because those steps run again. A run
that starts from step 0 in the folder of another run moves the older records to `earlier/1`, `earlier/2`, ...
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_search.common.errors import UserError
from trl_search.common.files import write_json, written_whole
from trl_search.common.provenance import command_without_secrets, git_state, hardware, versions, without_secrets
from trl_search.config.run_file import RUN_FILE
from trl_search.evaluation.outcomes import RESULTS_FILE
from trl_search.records.folder import FORMAT, GRPO, METRICS_FILE, ROLLBACKS_FILE, TRAJECTORY_FOLDER, step_of

logger = logging.getLogger(__name__)

PROJECT = "trl-search"


class RunLog(TrainerCallback):
    """The callback that records a run. Set its attributes before training starts."""

    def __init__(self, *, model: str, protocol: str | None, method: str = GRPO) -> None:
        self.model, self.protocol, self.method = model, protocol, method
        self.prompt = ""  # the first training prompt, up to the policy's first token
        self.task: dict[str, Any] = {}  # questions, retriever and rewards
        self.environment: dict[str, Any] = {}  # its tools and its own budgets
        self.agent: dict[str, Any] = {}  # the agent settings, if the trainer's configuration lacks them
        self.info: dict[str, Any] = {}  # `run.json`, once training has started; on rank 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or ".")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        before: dict[str, Any] = {}
        if state.global_step:
            before = _parsed((folder / RUN_FILE).read_bytes()) if (folder / RUN_FILE).is_file() else {}
            cut_back(folder, state.global_step, state.log_history)
        else:
            put_aside(folder)
        resumed, started = before.get("resumed_from_step", []), before.get("started_at", now)
        name_for_trackers(args, folder, started)
        self.info = {
            "format": FORMAT,
            "started_at": started,
            "command": command_without_secrets(sys.argv),
            "versions": versions(),
            "git": git_state(),
            "hardware": hardware(args.world_size),
            "method": self.method,
            "config": {**_config(args), **without_secrets(self.agent)},
            "task": without_secrets(self.task),
            "environment": without_secrets(self.environment),
            "model": self.model,
            "protocol": self.protocol,
            "prompt": self.prompt,
            "resumed_from_step": [*resumed, state.global_step] if state.global_step else resumed,
        }
        write_json(folder / RUN_FILE, self.info)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **of: Any) -> None:
        logs: Mapping[str, Any] = of["logs"]
        # Without `info`, this is an evaluation before any training, and the folder may belong to another run.
        if not (logs and self.info and state.is_world_process_zero):
            return
        with (Path(args.output_dir or ".") / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, **logs}))


def name_for_trackers(args: TrainingArguments, folder: Path, started_at: str) -> None:
    """Names the project and run of W&B and trackio, unless the configuration does.

    transformers' defaults are the project `huggingface` and no name. The start time distinguishes runs in the same
    folder. A resumed run keeps its name, so that trackio continues it.

    Raises:
        UserError: if W&B cannot be used as it is configured.

    Example:
        >>> name_for_trackers(args, Path("runs/qwen3b"), "2026-11-26T15:31:14+00:00")
        >>> args.project, args.run_name
        ('trl-search', 'qwen3b 2026-11-26 15:31:14')
    """
    if args.project == "huggingface":
        args.project = PROJECT
    if args.run_name is None:
        args.run_name = f"{folder.resolve().name} {started_at[:19].replace('T', ' ')}"
    if "wandb" in (args.report_to or []):
        import wandb

        if wandb.run is None:  # otherwise transformers would start one in the project huggingface
            try:
                wandb.init(project=os.environ.get("WANDB_PROJECT", args.project), name=args.run_name)
            except wandb.errors.Error as error:
                raise UserError(f"report_to: wandb: {error} Or set WANDB_MODE=offline, or --report_to none") from error


def cut_back(folder: Path, step: int, logged: Iterable[Mapping[str, Any]] = ()) -> None:
    """Drops the records after `step`. If the metrics file is missing, writes it from `logged`."""
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
    """Moves the records of an earlier run in this folder to a new folder `earlier/<n>`."""
    if not any((folder / name).exists() for name in (RUN_FILE, METRICS_FILE)):
        return
    number = 1
    while (target := folder / "earlier" / str(number)).exists():
        number += 1
    target.mkdir(parents=True)
    for name in (RUN_FILE, METRICS_FILE, RESULTS_FILE, ROLLBACKS_FILE, TRAJECTORY_FOLDER):
        if (folder / name).exists():
            (folder / name).rename(target / name)
    kept = "; its checkpoints are still here, and save_total_limit deletes them first"
    more = kept if any(folder.glob("checkpoint-*")) else ""
    logger.warning("%s held the records of another run: they were moved to %s%s", folder, target, more)


def _config(args: TrainingArguments) -> dict[str, Any]:
    # `to_dict` writes a placeholder for every secret token, even if it is unset.
    values = {name: None if getattr(args, name, 0) is None else value for name, value in args.to_dict().items()}
    return {name: without_secrets(value, name) for name, value in values.items()}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)  # also numbers of numpy and torch
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def _parsed(line: bytes) -> dict[str, Any]:
    """The object on a line; empty if the line is blank, cut off or not an object."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
