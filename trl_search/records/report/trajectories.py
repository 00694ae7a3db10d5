"""The trajectories in the form that the page embeds: columns for the list, and blocks of tokens that the page unpacks
when a reader opens a trajectory.

    rows     {"step": [1, 1, ...], "question": [...], "reward": [...], "text": ["<think> ...", ...], ...}
    blocks   [[{"lengths": [7, 1, 5], "mask": [0, 2, 1], "logprobs": [-12, -310, 0], "turns": [...]}, ...], ...]

A token is stored as its length in the trajectory's text, in UTF-16 units, as browsers count. A mask is a run-length
encoding that begins with masked tokens: [0, 2, 1] is two trained tokens and then a masked one. Log-probs are in
thousandths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyarrow import parquet

from trl_search.records.folder import REWARD_PREFIX, Run, read_trajectories, step_of
from trl_search.rewards.answers import contains_answer, exact_match

BLOCK_TRAJECTORIES = 64
NUMBERS = ("step", "group", "index", "reward", "advantage", "calls", "malformed", "generation_s", "search_s")
TEXTS = ("id", "data_source", "question", "stop_reason", "error")


@dataclass
class PageTrajectories:
    """The trajectories of all runs on the page."""

    # Columns of the same length. `correct` and `gold` are 1, 0 or `None`: whether the answer is an exact match, and
    # whether a tool result contains a golden answer.
    rows: dict[str, list[Any]]
    prompts: list[str]  # each distinct prompt; `rows["prompt"]` holds its index
    rewards: list[str]  # names of the single rewards; `rows["rewards"]` holds a list of numbers per row
    blocks: list[list[dict[str, Any]]]  # the tokens of `BLOCK_TRAJECTORIES` rows each, in the order of the rows
    notes: list[str] = field(default_factory=list)  # per run: what was left out, or ""

    def __len__(self) -> int:
        return len(self.rows["step"])


def page_trajectories(runs: Sequence[Run], max_trajectories: int) -> PageTrajectories:
    """
    Reads at most `max_trajectories` trajectories of all runs together.

    If a run has more than its share, only some steps are read, evenly spaced from the oldest to the newest.
    """
    others = ("golden", "answer", "correct", "gold", "trained", "masked", "prompt", "rewards", "text")
    rows: dict[str, list[Any]] = {name: [] for name in ("run", *NUMBERS, *TEXTS, *others)}
    prompts: dict[str, int] = {}
    tokens: list[dict[str, Any]] = []
    notes = []
    tables = []
    for run in runs:
        counts = {step_of(path): parquet.read_metadata(path).num_rows for path in run.trajectory_files}
        share = max_trajectories // len(runs)
        steps = choose_steps(counts, share)
        table = read_trajectories(run, steps)
        kept = table.slice(0, share) if table.num_rows > share else table
        tables.append(kept)
        notes.append(_left_out(kept.num_rows, sum(counts.values()), len(steps), len(counts)))
    names = {name for table in tables for name in table.column_names if name.startswith(REWARD_PREFIX)}
    rewards = sorted(name.removeprefix(REWARD_PREFIX) for name in names)
    for number, (run, table) in enumerate(zip(runs, tables, strict=True)):
        broken = 0
        for batch in table.to_batches(max_chunksize=256):
            for row in batch.to_pylist():
                if _is_whole(row):
                    _add(rows, row, number, prompts, rewards)
                    tokens.append(encode_tokens(row))
                else:
                    broken += 1
        if broken:
            run.problems.append(
                f"{broken} trajectories are left out: their tokens, mask and turns do not fit together"
            )
    blocks = [tokens[i : i + BLOCK_TRAJECTORIES] for i in range(0, len(tokens), BLOCK_TRAJECTORIES)]
    return PageTrajectories(rows, list(prompts), rewards, blocks, notes)


def choose_steps(counts: Mapping[int, int], limit: int) -> list[int]:
    """
    Chooses as many steps as hold at most `limit` trajectories: the oldest, the newest, and evenly spaced ones between.
    Only the newest if two steps hold too many.

    Example:
        >>> choose_steps({step: 64 for step in range(1, 101)}, 320)
        [1, 26, 51, 75, 100]
    """
    steps = sorted(step for step, count in counts.items() if count)
    if sum(counts.values()) <= limit:
        return steps
    for n in range(min(len(steps), limit // min(counts[step] for step in steps)), 1, -1):
        chosen = [steps[round(i * (len(steps) - 1) / (n - 1))] for i in range(n)]
        if sum(counts[step] for step in chosen) <= limit:
            return chosen
    return steps[-1:]


def encode_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    The tokens of one trajectory without their text.

    Example:
        >>> row = {"tokens": ["Hi", "!"], "mask": [1, 0], "logprobs": [-0.5, 0.0], "turns": []}
        >>> encode_tokens(row)
        {'lengths': [2, 1], 'mask': [0, 1, 1], 'logprobs': [-500, 0], 'turns': []}
    """
    runs = [(value, sum(1 for _ in same)) for value, same in itertools.groupby(row["mask"])]
    lengths = [length for _, length in runs]
    return {
        "lengths": [len(token) if token.isascii() else utf16_length(token) for token in row["tokens"]],
        "mask": lengths if not runs or runs[0][0] == 0 else [0, *lengths],
        "logprobs": [
            round(1000 * value) if value is not None and math.isfinite(value) else None for value in row["logprobs"]
        ],
        "turns": [[turn["role"], turn["start"], turn["end"]] for turn in row["turns"]],
    }


def utf16_length(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _add(
    rows: dict[str, list[Any]], row: Mapping[str, Any], run: int, prompts: dict[str, int], rewards: Sequence[str]
) -> None:
    rows["run"].append(run)
    for name in NUMBERS:
        rows[name].append(short_number(row[name]))
    for name in TEXTS:
        rows[name].append(row[name] or "")
    golden = [answer for answer in row["golden_answers"] or [] if answer is not None]
    # After a failed retrieval, the answer says nothing about the policy.
    failed = bool(row["error"]) and row["reward"] is None
    rows["golden"].append(golden)
    rows["answer"].append(row["answer"])
    rows["correct"].append(None if failed else int(row["answer"] is not None and exact_match(row["answer"], golden)))
    found = "\n".join(
        "".join(row["tokens"][turn["start"] : turn["end"]]) for turn in row["turns"] if turn["role"] == "tool"
    )
    rows["gold"].append(int(contains_answer(found, golden)) if golden else None)
    rows["trained"].append(sum(row["mask"]))
    rows["masked"].append(len(row["mask"]) - sum(row["mask"]))
    rows["prompt"].append(prompts.setdefault(row["prompt"] or "", len(prompts)))
    rows["rewards"].append([short_number(row.get(REWARD_PREFIX + name)) for name in rewards])
    rows["text"].append("".join(row["tokens"]))


def _is_whole(row: Mapping[str, Any]) -> bool:
    if any(row[name] is None or None in row[name] for name in ("tokens", "mask", "turns")) or row["logprobs"] is None:
        return False
    n = len(row["tokens"])
    return (
        n == len(row["mask"]) == len(row["logprobs"])
        and set(row["mask"]) <= {0, 1}
        and all(0 <= turn["start"] <= turn["end"] <= n for turn in row["turns"])
    )


def _left_out(kept: int, total: int, kept_steps: int, steps: int) -> str:
    if kept == total:
        return ""
    return f"{kept:,} of {total:,} trajectories are here: {kept_steps:,} of {steps:,} steps, from oldest to newest"


def short_number(value: Any) -> float | int | None:
    """The value with six digits; `None` for a number that is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
