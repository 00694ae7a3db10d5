"""Reads the folder of a run. Other modules write it.

    runs/qwen3b/
        run.json                          when and how the run was started, its settings (`run_log.py` writes it)
        metrics.jsonl                     {"step": 12, "reward": 0.41, ...}, one log per line
        trajectories/step_000012.parquet  one row per trajectory, with its mask (`trajectory_log.py` writes it)
        results.json                      the evaluations of `trl-search train`, before and after training

A run may have been killed at any point. A half-written file is left out and named in `Run.problems`. It is never
repaired, because the run may still be in progress.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from trl_search.common.errors import UserError, first_line
from trl_search.common.files import finite_or_none
from trl_search.config.run_file import RUN_FILE
from trl_search.evaluation.outcomes import RESULTS_FILE

FORMAT = 1
METRICS_FILE, TRAJECTORY_FOLDER = "metrics.jsonl", "trajectories"
ROLLBACKS_FILE = "rollbacks.json"  # `on_collapse: rollback` (`records/rollbacks.py` writes it)
GRPO, SFT = "GRPO", "SFT"  # how a run trained: `trl-search train`, or a cold start of `trl-search sft`
# The rows of results.json about the agent before and after GRPO. The other rows are baselines.
BEFORE_ROWS = ("search, warm-started", "search, before GRPO")
AFTER_ROW, BEST_ROW = "search, after GRPO", "search, best checkpoint"
REWARD_PREFIX = "rewards/"  # prefix of the columns with single rewards, which differ between runs

_TEXT, _COUNT, _SECONDS, _SCORE = pyarrow.string(), pyarrow.int32(), pyarrow.float32(), pyarrow.float64()
_TURN = pyarrow.struct([("role", _TEXT), ("start", _COUNT), ("end", _COUNT)])
TRAJECTORY_SCHEMA = pyarrow.schema(
    [
        ("step", _COUNT), ("group", _COUNT), ("index", _COUNT), ("id", _TEXT), ("data_source", _TEXT),
        ("question", _TEXT), ("golden_answers", pyarrow.list_(_TEXT)), ("prompt", _TEXT),
        ("tokens", pyarrow.list_(_TEXT)), ("mask", pyarrow.list_(pyarrow.int8())),
        ("logprobs", pyarrow.list_(pyarrow.float32())), ("turns", pyarrow.list_(_TURN)), ("answer", _TEXT),
        ("reward", _SCORE), ("advantage", _SCORE), ("replaced", pyarrow.bool_()), ("searches", _COUNT),
        ("calls", _COUNT), ("malformed", _COUNT),
        ("model_tokens", _COUNT), ("observation_tokens", _COUNT), ("stop_reason", _TEXT), ("error", _TEXT),
        ("generation_s", _SECONDS), ("search_s", _SECONDS),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """
    The records of a run.

    Args:
        folder (`Path`): The folder.
        info (`dict`): `run.json`; empty if there is none.
        history (`list[dict]`): The logged rows, oldest first, each with its `step`. A number that was not finite is
            `None`.
        trajectory_files (`list[Path]`): The readable trajectory files, by step.
        problems (`list[str]`): What is left out, and why. `read_trajectories` adds the files that it cannot read.
        results (`dict[str, dict]`): The evaluations of `results.json` by the name of their row, such as
            `{"search, after GRPO": {"em": 0.935, ...}}`.
        seconds (`float`, *optional*): The duration of the whole training, once it has ended.
        rollbacks (`list[dict]`): `{"step": 60, "to": 40}` per rollback after a collapse.
    """

    folder: Path
    info: dict[str, Any]
    history: list[dict[str, Any]]
    trajectory_files: list[Path]
    problems: list[str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float | None = None
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def task(self) -> dict[str, Any]:
        """The part of `run.json` about questions, retriever and rewards."""
        return section(self.info, "task")

    @property
    def method(self) -> str:
        """How it was trained: `GRPO` or `SFT`; `GRPO` if `run.json` is missing."""
        return str(self.info.get("method", GRPO))

    @property
    def before(self) -> dict[str, Any]:
        """The evaluation of the agent before GRPO; empty if there was none."""
        return next((self.results[name] for name in BEFORE_ROWS if name in self.results), {})

    @property
    def after(self) -> dict[str, Any]:
        """The evaluation of the agent after GRPO; empty if there was none."""
        return self.results.get(AFTER_ROW, {})

    @property
    def baselines(self) -> dict[str, dict[str, Any]]:
        """The evaluations in other modes before training, such as `direct answer, no search`."""
        others = {name: row for name, row in self.results.items() if name not in (*BEFORE_ROWS, AFTER_ROW)}
        return {name: row for name, row in others.items() if not name.startswith(BEST_ROW)}


def section(info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside `run.json`, such as `task` or `config`; empty if it is missing."""
    value = info.get(name)
    return value if isinstance(value, dict) else {}


def trajectory_file(folder: Path, step: int) -> Path:
    return folder / TRAJECTORY_FOLDER / f"step_{step:06d}.parquet"


def step_of(path: Path) -> int:
    """The step of a trajectory file; -1 for any other file."""
    match = re.fullmatch(r"step_(\d+)\.parquet", path.name)
    return int(match[1]) if match else -1


def read_run(folder: str | Path) -> Run:
    """
    Reads the records of a run, which may still be in progress or may have been killed.

    Raises:
        UserError: if the folder does not belong to a run.

    Example:
        >>> run = read_run("runs/qwen3b")
        >>> [row["reward"] for row in run.history if row.get("reward") is not None]
        [0.12, 0.19, ...]
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the output_dir of a run")
    steps = {step_of(path): path for path in (folder / TRAJECTORY_FOLDER).glob("step_*.parquet")}
    names = (RUN_FILE, METRICS_FILE, RESULTS_FILE)
    if not steps and not any((folder / name).is_file() for name in names):
        raise UserError(
            f"{folder} is not the folder of a run: it has none of {', '.join(names)} and {TRAJECTORY_FOLDER}/; give "
            f"the output_dir of a run"
        )
    problems: list[str] = []
    info = _read_info(folder / RUN_FILE, problems)
    recorded = _read_object(folder / RESULTS_FILE, problems) if (folder / RESULTS_FILE).is_file() else {}
    history = _read_history(folder, recorded, problems)
    files = [path for step, path in sorted(steps.items()) if step >= 0 and _readable(path, problems)]
    results = {name: row for name, row in section(recorded, "rows").items() if isinstance(row, dict)}
    seconds = recorded.get("seconds")
    # Before training ends, `seconds` in the file is not the duration of the whole run.
    ended = AFTER_ROW in results or bool(recorded.get("history"))
    seconds = seconds if ended and isinstance(seconds, int | float) else None
    path = folder / ROLLBACKS_FILE
    rollbacks = _read_object(path, problems).get("rollbacks", []) if path.is_file() else []
    return Run(folder, info, history, files, problems, results, seconds, rollbacks)


def read_trajectories(run: Run | str | Path, steps: Collection[int] | None = None) -> pyarrow.Table:
    """
    Reads the trajectories of some or all steps as one table; see `TRAJECTORY_SCHEMA` for its columns.

    A reward that only some of the files have is null in the rows of the others.

    Args:
        run ([`Run`] or `str` or `Path`): The result of [`read_run`], or the folder.
        steps (`Collection[int]`, *optional*): The steps to read. By default all.

    Raises:
        UserError: if the folder does not belong to a run.
    """
    run = run if isinstance(run, Run) else read_run(run)
    tables = []
    for path in run.trajectory_files:
        if steps is None or step_of(path) in steps:
            try:
                tables.append(parquet.ParquetFile(path).read())
            except (OSError, pyarrow.ArrowException) as error:
                run.problems.append(f"{TRAJECTORY_FOLDER}/{path.name} cannot be read ({first_line(error)})")
    if not tables:
        return TRAJECTORY_SCHEMA.empty_table()
    return pyarrow.concat_tables(tables, promote_options="permissive")


def _read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        problems.append(f"there is no {path.name}: how the run was started is unknown")
        return {}
    info = _read_object(path, problems)
    if info.get("format", FORMAT) != FORMAT:
        problems.append(f"{path.name} has format {info['format']}, but this version reads format {FORMAT}")
    return info


def _read_history(folder: Path, recorded: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    path = folder / METRICS_FILE
    source = path if path.is_file() else folder / RESULTS_FILE
    rows: list[tuple[str, Any]] = []  # where, what
    if source == path:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    cut = " and was cut off" if number == len(lines) else ""
                    problems.append(f"{path.name} line {number} is not JSON{cut} ({first_line(error)})")
    else:
        # The results of a finished run hold its history, too.
        history = recorded.get("history")
        rows = [(f"history[{i}]", row) for i, row in enumerate(history if isinstance(history, list) else [])]
        if not rows:
            problems.append(
                f"there is no {path.name}: nothing was logged yet, or the run was killed before its first log"
            )
    kept, broken = [], dict[str, list[int]]()
    for where, row in rows:
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            problems.append(f"{source.name} {where} has no step")
            continue
        kept.append(finite_or_none(row))
        for name, value in kept[-1].items():
            if value is None:
                broken.setdefault(name, []).append(row["step"])
    for name, at in broken.items():
        more = f" and {len(at) - 3} more" if len(at) > 3 else ""
        problems.append(f"{source.name}: {name} is not a finite number at step {', '.join(map(str, at[:3]))}{more}")
    return kept


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        problems.append(f"{path.name} is not JSON, perhaps half-written ({first_line(error)})")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no JSON object")
        return {}
    return value


def _readable(path: Path, problems: list[str]) -> bool:
    name = f"{path.parent.name}/{path.name}"
    try:
        columns = parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        problems.append(f"{name} cannot be read, perhaps half-written ({first_line(error)})")
        return False
    wrong = [name for name in TRAJECTORY_SCHEMA.names if columns.get_field_index(name) < 0]
    if wrong:
        problems.append(f"{name} holds no trajectories: it has no {', '.join(wrong)}")
    return not wrong
