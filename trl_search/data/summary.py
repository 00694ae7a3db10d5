"""What a set of questions holds, in numbers and a few rows: to be looked at before it is trained or judged on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from trl_search.data import question_key


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over questions: its least, median, mean, 95th percentile and greatest value."""

    least: float
    median: float
    mean: float
    p95: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        array = np.asarray(values)
        return cls(
            float(array.min()),
            float(np.median(array)),
            float(array.mean()),
            float(np.percentile(array, 95)),
            float(array.max()),
        )


@dataclass(frozen=True, slots=True)
class QuestionSummary:
    """The statistics of a set. Lengths are in words between spaces; what a tokenizer makes of them is about 1.3 times
    as much.

    Args:
        rows (`int`): Questions.
        sources (`dict[str, int]`): How many of each `data_source`, most first.
        answers (`Spread`): Gold answers a question.
        question_words (`Spread`): Words of a question.
        answer_words (`Spread`): Words of a gold answer.
        yes_no (`int`): Questions with a gold answer "yes" or "no".
        repeated_questions (`int`): Rows whose question stood in an earlier row, normalised.
        repeated_ids (`int`): Rows whose id stood in an earlier row of the same source.
        samples (`list`): A few rows.
    """

    rows: int
    sources: dict[str, int]
    answers: Spread
    question_words: Spread
    answer_words: Spread
    yes_no: int
    repeated_questions: int
    repeated_ids: int
    samples: list[dict[str, Any]]

    def describe(self) -> str:
        """Lines for people."""
        lines = [f"rows                {self.rows:,}"]
        lines += [f"  {source:<17} {count:,}" for source, count in self.sources.items()]
        lines.append(f"{'':<20}{'least':>9}{'median':>9}{'mean':>9}{'95 %':>9}{'most':>9}")
        for name, spread in (
            ("answers a question", self.answers),
            ("words a question", self.question_words),
            ("words an answer", self.answer_words),
        ):
            numbers = (spread.least, spread.median, spread.mean, spread.p95, spread.greatest)
            lines.append(f"{name:<20}" + "".join(f"{number:>9,.4g}" for number in numbers))
        lines += [
            f"yes/no answers      {self.yes_no:,}",
            f"repeated questions  {self.repeated_questions:,}",
            f"repeated ids        {self.repeated_ids:,}",
        ]
        for row in self.samples:
            answers = " | ".join(row["golden_answers"][:4]) + (" | ..." if len(row["golden_answers"]) > 4 else "")
            lines.append(f"  [{row['data_source']}] {row['question']}  ->  {answers}")
        return "\n".join(lines)


def summarize_questions(questions: datasets.Dataset, *, samples: int = 3, seed: int = 0) -> QuestionSummary:
    """Counts what is in a set of questions.

    Args:
        questions (`datasets.Dataset`):
            From `load_questions`.
        samples (`int`, *optional*, defaults to `3`):
            Rows to show.
        seed (`int`, *optional*, defaults to `0`):
            Of their choice.

    Example:
        >>> print(summarize_questions(load_questions("bamboogle")).describe())
        rows                125
          bamboogle         125
        …
    """
    answers = questions["golden_answers"]
    chosen = sorted(random.Random(seed).sample(range(len(questions)), min(samples, len(questions))))
    keys = Counter(question_key(question) for question in questions["question"])
    ids = Counter(zip(questions["data_source"], questions["id"], strict=True))
    return QuestionSummary(
        rows=len(questions),
        sources=dict(Counter(questions["data_source"]).most_common()),
        answers=Spread.of([len(golden) for golden in answers]),
        question_words=Spread.of([len(question.split()) for question in questions["question"]]),
        answer_words=Spread.of([len(answer.split()) for golden in answers for answer in golden]),
        yes_no=sum(any(answer.strip().lower() in ("yes", "no") for answer in golden) for golden in answers),
        repeated_questions=len(questions) - len(keys),
        repeated_ids=len(questions) - len(ids),
        samples=[questions[index] for index in chosen],
    )
