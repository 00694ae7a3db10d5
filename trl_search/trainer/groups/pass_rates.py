"""Tracks how often each question was solved, and stores it with the checkpoints (`curriculum: pass_rate`).

    checkpoint-40/pass_rates.jsonl
        {"question": "Who wrote Quiet Raven?", "solved": 8, "tried": 8, "silent": 2}

`solved` and `tried` count the trajectories of the last visit: those whose answer exactly matches a golden one, and
those that did not fail. `silent` counts consecutive visits in which all or none were solved. Each such visit halves
the question's weight, down to 1/16; a visit with some solved resets it to 1. A question that was never visited has
weight 1, or 1/2 if its `pass_rate` column is 0 or 1 (`trl-search data filter` writes this column).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset

from trl_search.common.errors import UserError
from trl_search.common.files import write_jsonl
from trl_search.records.trajectory_log import question_text
from trl_search.rewards.answers import exact_match, last_answer
from trl_search.rewards.golden_answers import golden_list
from trl_search.types import Trajectory

logger = logging.getLogger(__name__)

FILE = "pass_rates.jsonl"
LEAST_WEIGHT = 1 / 16


@dataclass(frozen=True)
class Visit:
    """The outcome of the last group of a question."""

    solved: int
    tried: int
    silent: int = 0

    @property
    def weight(self) -> float:
        return max(LEAST_WEIGHT, 0.5**self.silent)


class PassRates:
    """The last visit of every question that a run has asked, identical on all ranks. `weights_N` is the relative
    frequency with which each question is drawn.

    Raises:
        UserError: if the dataset has no golden answers.
    """

    def __init__(self, dataset: Dataset) -> None:
        if "golden_answers" not in dataset.column_names:
            raise UserError(
                "curriculum=pass_rate needs the column 'golden_answers', which train_dataset lacks: add it, or leave "
                "curriculum out"
            )
        columns = [name for name in ("question", "prompt", "pass_rate") if name in dataset.column_names]
        self._numbers: dict[str, list[int]] = {}  # by question: its rows
        self._before: dict[str, Visit] = {}
        for number, row in enumerate(dataset.select_columns(columns)):
            question = question_text(row)
            self._numbers.setdefault(question, []).append(number)
            if (rate := row.get("pass_rate")) in (0, 1):
                self._before[question] = Visit(int(rate), 1, silent=1)
        self._size = len(dataset)
        self._start(self._before)

    def weight_of(self, row: Mapping[str, Any]) -> float:
        """The weight of a row of the dataset."""
        visit = self.visits.get(question_text(row))
        return 1.0 if visit is None else visit.weight

    def learn(self, groups: Iterable[tuple[Mapping[str, Any], Sequence[Trajectory]]]) -> dict[str, float]:
        """Updates the pass rates with the finished groups of all ranks. Every rank must call it. Returns metrics to
        log."""
        mine = [(question_text(row), *_counted(row, trajectories)) for row, trajectories in groups]
        for question, solved, tried in gather_object(mine):
            if tried:
                before = self.visits.get(question, Visit(0, 0)).silent
                self._set(question, Visit(solved, tried, silent=before + 1 if solved in (0, tried) else 0))
        known = len(self.visits)
        return {
            "curriculum/known": known / len(self._numbers),
            "curriculum/never_solved": sum(v.solved == 0 for v in self.visits.values()) / max(1, known),
            "curriculum/always_solved": sum(v.solved == v.tried for v in self.visits.values()) / max(1, known),
        }

    def save(self, folder: Path) -> None:
        write_jsonl(folder / FILE, ({"question": question, **asdict(one)} for question, one in self.visits.items()))

    def load(self, folder: Path) -> None:
        """Loads the pass rates of a checkpoint. One that was saved without the curriculum has no file.

        Raises:
            UserError: if the file has no pass rates.
        """
        path = folder / FILE
        if not path.is_file():
            logger.warning("%s has no %s, so the pass rates of the questions are unknown", folder, FILE)
            self._start(self._before)
            return
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self._start({row["question"]: Visit(row["solved"], row["tried"], row["silent"]) for row in rows})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} has no valid pass rates ({error!r}): resume from another checkpoint") from error

    def _start(self, visits: Mapping[str, Visit]) -> None:
        self.visits: dict[str, Visit] = {}
        self.weights_N = np.ones(self._size)
        for question, visit in visits.items():
            self._set(question, visit)

    def _set(self, question: str, visit: Visit) -> None:
        self.visits[question] = visit
        self.weights_N[self._numbers.get(question, [])] = visit.weight


def _counted(row: Mapping[str, Any], trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    """The number of trajectories that solved the question, and of those that did not fail."""
    golden = golden_list(row["golden_answers"])
    answers = [last_answer(trajectory.spoken) for trajectory in trajectories if not trajectory.failed]
    return sum(answer is not None and exact_match(answer, golden) for answer in answers), len(answers)
