"""Writes the trajectories of a step as parquet: tokens as text, and the mask of the loss.

    from datasets import load_dataset
    load_dataset("parquet", data_files="runs/qwen3b/trajectories/*.parquet")

`folder.py` lists the columns. The mask is that of the batch which TRL trains on, not of the trajectory, so it includes
all changes by TRL or a setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from accelerate import Accelerator
from accelerate.utils import gather_object
from pyarrow import parquet

from trl_search.common.errors import UserError
from trl_search.common.files import written_whole
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.records.folder import REWARD_PREFIX, TRAJECTORY_SCHEMA, trajectory_file
from trl_search.records.token_text import TokenTexts
from trl_search.rewards.golden_answers import golden_list
from trl_search.rewards.weighted import weighted_rewards
from trl_search.types import Answer, Trajectory

if TYPE_CHECKING:
    import torch


# Columns that are attributes of `Trajectory` with the same name.
_AS_THEY_ARE = (
    "searches", "calls", "malformed", "model_tokens", "observation_tokens", "error", "generation_s", "search_s",
)  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """TRL's tensors for a rollout batch. B: trajectories of this rank; R: of all ranks; C: tokens; F: rewards."""

    loss_mask_BC: torch.Tensor
    advantages_B: torch.Tensor  # (B, C) if there is one per token
    rewards_RF: torch.Tensor  # NaN: not rewarded
    weights_F: torch.Tensor
    names: Sequence[str]


@dataclass(frozen=True)
class Replaced:
    """A trajectory of this rank that was replaced at `index`, because its group gave no gradient. No loss uses it."""

    index: int
    row: Mapping[str, Any]
    trajectory: Trajectory
    rewards_F: torch.Tensor


class TrajectoryLog:
    """Writes the first groups of each step: up to `args.log_trajectories` trajectories, and at least one group."""

    def __init__(self, args: SearchGRPOConfig, tokenizer: Any, accelerator: Accelerator) -> None:
        self.folder, self.group_size = Path(args.output_dir or "."), args.num_generations or 1
        groups = max(1, args.log_trajectories // self.group_size) if args.log_trajectories else 0
        self.kept = groups * self.group_size
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.step = 0  # the last one that was written
        self.table: pyarrow.Table | None = None  # the trajectories of that step; on rank 0
        self._seen = 0  # trajectories of this step so far; a step may have several rollout batches
        self._texts = TokenTexts(tokenizer)

    def begin(self) -> None:
        """Resets the step when training begins or rolls back, because later steps may have been written before."""
        self.step, self.table, self._seen = 0, None, 0

    def add(
        self,
        step: int,
        rows: Sequence[Mapping[str, Any]],
        trajectories: Sequence[Trajectory],
        scored: Scored,
        replaced: Sequence[Replaced] = (),
    ) -> None:
        """Adds a rollout batch to the step and writes the step. Every rank must call it.

        Replaced trajectories come after the others, with the index of their replacement and `replaced` true.
        """
        if step != self.step:
            self.step, self.table, self._seen = step, None, 0
        first, self._seen = self._seen, self._seen + self.ranks * len(trajectories)
        if first >= self.kept:
            return
        own = first + self.rank * len(trajectories)  # TRL's order: rank by rank
        taken = range(max(0, min(len(trajectories), self.kept - own)))
        local = [
            self._record(own + i, rows[i], trajectories[i], scored, scored.rewards_RF[own - first + i], i)
            for i in taken
        ]
        local += [
            self._record(own + one.index, one.row, one.trajectory, scored, one.rewards_F, None)
            for one in replaced
            if one.index in taken
        ]
        records = gather_object(local)
        if self.rank == 0:
            new = _table(step, records, scored.names, self._texts)
            self.table = new if self.table is None else pyarrow.concat_tables([self.table, new])
            with written_whole(trajectory_file(self.folder, step)) as path:
                parquet.write_table(self.table, path, compression="zstd")

    def _record(
        self,
        index: int,
        row: Mapping[str, Any],
        trajectory: Trajectory,
        scored: Scored,
        rewards_F: torch.Tensor,
        local: int | None,
    ) -> dict[str, Any]:
        """One row of the table, still with token ids instead of texts. `local` is its row in `scored`, if any."""
        mask = [0] * len(trajectory.ids)
        if local is not None:
            mask = scored.loss_mask_BC[local, : len(mask)].tolist()
        reward = weighted_rewards(rewards_F, scored.weights_F).item()
        return {
            "group": index // self.group_size,
            "index": index,
            "id": str(row.get("id", "")),
            "data_source": str(row.get("data_source", "")),
            "question": question_text(row),
            "golden_answers": _golden_answers(row.get("golden_answers")),
            "prompt_ids": trajectory.prompt_ids,
            "ids": trajectory.ids,
            "mask": mask,
            "logprobs": [None if math.isnan(value) else value for value in trajectory.logprobs],
            "turns": [{"role": turn.role, "start": turn.start, "end": turn.end} for turn in trajectory.turns],
            "answer": next((act.text for act in reversed(trajectory.actions) if isinstance(act, Answer)), None),
            "reward": None if math.isnan(reward) else reward,
            "rewards": [None if math.isnan(value) else value for value in rewards_F.tolist()],
            "advantage": 0.0 if local is None else scored.advantages_B[local].mean().item(),
            "replaced": local is None,
            "stop_reason": trajectory.stop_reason.value if trajectory.stop_reason else "",
            **{name: getattr(trajectory, name) for name in _AS_THEY_ARE},
        }


def _golden_answers(value: Any) -> list[str]:
    try:
        return golden_list(value)
    except UserError:  # a format that only the user's own rewards read
        return [str(value)]


def _table(step: int, records: Sequence[Mapping[str, Any]], names: Sequence[str], texts: TokenTexts) -> pyarrow.Table:
    prompts = {ids: texts.decode(ids) for ids in {record["prompt_ids"] for record in records}}
    rewards = [REWARD_PREFIX + name for name in names]
    rows = [
        {
            **record,
            "step": step,
            "prompt": prompts[record["prompt_ids"]],
            "tokens": texts(record["ids"]),
            **dict(zip(rewards, record["rewards"], strict=True)),
        }
        for record in records
    ]
    fields = list(TRAJECTORY_SCHEMA)
    after = TRAJECTORY_SCHEMA.get_field_index("reward") + 1
    fields[after:after] = [pyarrow.field(name, pyarrow.float64()) for name in dict.fromkeys(rewards)]
    return pyarrow.Table.from_pylist(rows, pyarrow.schema(fields))


def question_text(row: Mapping[str, Any]) -> str:
    """The question of a dataset's row: its column, or the last user message of its prompt."""
    if row.get("question") is not None:
        return str(row["question"])
    messages = row.get("prompt") or []  # a dataset of conversations
    return next((str(message["content"]) for message in reversed(messages) if message["role"] == "user"), "")
