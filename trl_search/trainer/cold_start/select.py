"""Selects the attempts of a collection (`collect.py`) to train on.

An attempt qualifies if its answer is right, it follows the structure of its protocol, and it searched. The first few
qualifying attempts of each question are kept. The others are counted by the first reason against them. Selecting again
is cheap: the attempts stay, and kept.parquet is rewritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.files import written_whole
from trl_search.trainer.cold_start.collect import Attempt

KEPT = "kept.parquet"


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules for keeping attempts."""

    min_f1: float | None = None  # minimum F1 of the answer; by default it must be an exact match
    well_formed: bool = True  # whether to exclude malformed calls, open tags, and text after a call or an answer
    min_searches: int = 1  # minimum number of searches
    keep_per_question: int = 2  # maximum attempts per question; the first samples are kept
    # Maximum tokens of prompt and trajectory. Longer attempts are left out, because a cut one teaches no ending.
    max_tokens: int | None = None

    def objection(self, attempt: Attempt) -> str | None:
        """The reason against keeping this attempt; `None` if there is none."""
        if attempt.answer is None:
            return "no answer"
        if attempt.em < 1.0 if self.min_f1 is None else attempt.f1 < self.min_f1:
            return "wrong answer"
        if self.well_formed and (attempt.malformed or attempt.format < 1.0):
            return "malformed"
        if attempt.searches < self.min_searches:
            return "too few calls"
        if self.max_tokens is not None and len(attempt.prompt_ids) + len(attempt.ids) > self.max_tokens:
            return "too long"
        return None


def select(attempts: Sequence[Attempt], rules: Rules) -> tuple[list[Attempt], Counter[str]]:
    """The attempts to keep, in the order of the questions, and the count of each outcome: `kept`, or a reason.

    Raises:
        UserError: if nothing is kept; the message has the counts, and a remedy for the most frequent reason.
    """
    kept: list[Attempt] = []
    outcomes: Counter[str] = Counter()
    of_question: Counter[int] = Counter()
    seen: set[tuple[int, ...]] = set()
    for attempt in sorted(attempts, key=lambda attempt: (attempt.index, attempt.sample)):
        same = (attempt.index, *attempt.ids)
        outcome = rules.objection(attempt)
        if outcome is None and same in seen:
            outcome = "duplicate"
        if outcome is None and of_question[attempt.index] >= rules.keep_per_question:
            outcome = "enough of its question"
        outcomes[outcome or "kept"] += 1
        if outcome is None:
            seen.add(same)
            of_question[attempt.index] += 1
            kept.append(attempt)
    if not kept:
        raise UserError(_nothing_kept(outcomes, rules))
    return kept, outcomes


_ADVICE = {
    "no answer": "the teacher runs out of tokens, does not know the format, or is a script that gave up: raise "
    "max_turn_length or max_completion_length, explain the format in `instruction`, or use a larger teacher",
    "wrong answer": "sample more (samples_per_question), accept nearly right answers (min_f1: 0.5), use a larger "
    "teacher, or correct the script",
    "malformed": "use a teacher that knows the format, or accept malformed attempts (well_formed: false)",
    "too few calls": "the teacher answers from memory: use another one, or accept such attempts (min_searches: 0)",
    "too long": "raise max_length",
}


def _nothing_kept(outcomes: Mapping[str, int], rules: Rules) -> str:
    if not outcomes:
        return "there are no attempts to select from: every search failed, or there are no questions"
    most = max(outcomes, key=lambda name: outcomes[name])
    counted = ", ".join(f"{name} {count}" for name, count in Counter(outcomes).most_common())
    return f"none of {sum(outcomes.values())} attempts is kept ({counted}). Most frequent, {most}: {_ADVICE[most]}"


def write_kept(folder: Path, kept: Sequence[Attempt]) -> Path:
    """Writes parquet that SFTTrainer reads directly: `input_ids`, `assistant_masks`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    inspected = [f.name for f in fields(Attempt) if f.name not in ("prompt_ids", "ids", "mask", "index")]
    columns: dict[str, list[Any]] = {name: [getattr(attempt, name) for attempt in kept] for name in inspected}
    columns["input_ids"] = [[*attempt.prompt_ids, *attempt.ids] for attempt in kept]
    columns["assistant_masks"] = [[*[0] * len(attempt.prompt_ids), *attempt.mask] for attempt in kept]
    path = folder / KEPT
    with written_whole(path) as file:
        pq.write_table(pa.table(columns), file)
    return path


def describe(
    attempts: Sequence[Attempt], kept: Sequence[Attempt], outcomes: Mapping[str, int], calls: str = "searches"
) -> str:
    """The statistics of a collection, one per line. `calls` is the word for calls of the environment's tools."""
    total = sum(outcomes.values())
    questions = len({attempt.index for attempt in attempts})
    lines = [
        f"{total:,} attempts at {questions:,} questions: EM {_mean(attempts, 'em'):.3f}, "
        f"F1 {_mean(attempts, 'f1'):.3f}, {_mean(attempts, 'searches'):.2f} {calls}",
        *(f"  {name:<24}{count:>8,}  {count / total:6.1%}" for name, count in Counter(outcomes).most_common()),
        *_by_source(attempts, kept),
        f"kept: {len({attempt.index for attempt in kept}):,} questions, {_mean(kept, 'searches'):.2f} {calls}, "
        f"{sum(sum(attempt.mask) for attempt in kept):,} tokens of the policy",
    ]
    return "\n".join(lines)


def _by_source(attempts: Sequence[Attempt], kept: Sequence[Attempt]) -> list[str]:
    """The number of questions of each source with a kept attempt."""
    asked = {attempt.index: attempt.data_source for attempt in attempts}
    solved = Counter(asked[index] for index in {attempt.index for attempt in kept})
    return [
        f"  {source or '(no source)':<24}{solved[source]:>8,} of {count:,} questions kept"
        for source, count in sorted(Counter(asked.values()).items())
    ]


def _mean(attempts: Sequence[Attempt], name: str) -> float:
    return sum(getattr(attempt, name) for attempt in attempts) / max(1, len(attempts))
