"""Summarises a set of questions in numbers and sample rows, to inspect before training or evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np

from trl_search.data import question_key
from trl_search.data.questions import sampled_rows


class Spread(NamedTuple):
    """The minimum, median, mean, 95th percentile and maximum of a quantity over questions."""

    least: float
    median: float
    mean: float
    p95: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        least, median, p95, greatest = map(float, np.percentile(values, [0, 50, 95, 100]))
        return cls(least, median, float(np.mean(values)), p95, greatest)


@dataclass(frozen=True, slots=True)
class QuestionSummary:
    """The statistics of a set. Lengths count words separated by spaces; there are about 1.3 tokens per word."""

    rows: int
    sources: dict[str, int]  # the number of questions of each `data_source`, the largest first
    answers: Spread  # gold answers per question
    question_words: Spread
    answer_words: Spread
    yes_no: int  # questions with a gold answer "yes" or "no"
    repeated_questions: int  # rows whose normalised question equals that of an earlier row
    repeated_ids: int  # rows whose id equals that of an earlier row of the same source
    samples: list[dict[str, Any]]

    def describe(self) -> str:
        """The summary as text."""
        lines = [f"rows                {self.rows:,}"]
        lines += [f"  {source:<17} {count:,}" for source, count in self.sources.items()]
        lines.append(f"{'':<20}{'least':>9}{'median':>9}{'mean':>9}{'95 %':>9}{'most':>9}")
        spreads = {
            "answers per question": self.answers,
            "words per question": self.question_words,
            "words per answer": self.answer_words,
        }
        for name, spread in spreads.items():
            lines.append(f"{name:<20}" + "".join(f"{number:>9,.4g}" for number in spread))
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
    """Computes the statistics of a set of questions."""
    answers = questions["golden_answers"]
    chosen = sampled_rows(len(questions), samples, seed)
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
