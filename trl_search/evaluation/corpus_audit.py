"""Measures whether a corpus can answer a question set: the share of questions with a golden answer in some passage.

    in the corpus  ─►  in the first k passages (`retriever_quality.py`)  ─►  read by the agent  ─►  answered

No retriever can find an answer that is in no passage, so the first share is an upper bound for every search. Each
later share shows how many questions one more step loses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from trl_search.common.errors import UserError
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.outcomes import Outcome
from trl_search.evaluation.retriever_quality import JudgedQueries
from trl_search.rewards.answers import answer_words, contains_answer
from trl_search.types import Passage


def answerable(passages: Iterable[Passage], golden_answers: Sequence[Sequence[str]]) -> set[int]:
    """Returns the positions of the questions that have a golden answer in a passage or its title.

    Every passage is read once, and compared only with the questions that have an answer whose first word it contains.
    So a corpus of millions takes minutes, not days.

    Example:
        >>> answerable([Passage("1", "Orlune", "A harbour.")], [["Orlune"], ["Vesk"]])
        {0}
    """
    by_word: dict[str, set[int]] = {}
    for index, golden in enumerate(golden_answers):
        for words in map(answer_words, golden):
            if words:
                by_word.setdefault(words[0], set()).add(index)
    found: set[int] = set()
    for passage in tqdm(passages, desc="reading the corpus", unit=" passages", disable=None):
        text = passage.titled_text
        candidates = {index for word in set(answer_words(text)) for index in by_word.get(word, ())}
        found |= {index for index in candidates - found if contains_answer(text, golden_answers[index])}
    return found


def asked_in(judged: JudgedQueries, folder: Path) -> tuple[JudgedQueries, list[Outcome]]:
    """The questions of a set that an evaluation asked, and their outcomes, in the same order.

    Questions whose search failed are left out.

    Raises:
        UserError: if the evaluation asked none of the questions.
    """
    outcomes = {one.question: one for one in Records(folder, "search", judged.name).read().values() if not one.failed}
    kept = {query: text for query, text in judged.queries.items() if text in outcomes}
    if not kept:
        there = ", ".join(sorted(path.stem for path in folder.glob("search-*.jsonl"))) or "none"
        raise UserError(
            f"{folder} has no answers to the questions of {judged.name}: give the --output of a `trl-search eval "
            f"--modes search` that asked them; the folder has the answer files: {there}"
        )
    golden = judged.golden_answers or {}
    judged = replace(judged, queries=kept, golden_answers={query: golden[query] for query in kept})
    return judged, [outcomes[text] for text in kept.values()]


def lost_after_reading(outcomes: Sequence[Outcome]) -> str:
    """The shares of questions whose answer the agent read, and that it answered, as lines of a report.

    Example:
        >>> print(lost_after_reading(outcomes))
          read               0.650
          answered           0.440, of those read 0.600, of the others 0.143
    """
    read = [one.em for one in outcomes if one.read]
    others = [one.em for one in outcomes if not one.read]
    parts = [f"{sum(one.em for one in outcomes) / len(outcomes):.3f}"]
    parts += [f"of those read {sum(read) / len(read):.3f}"] if read else []
    parts += [f"of the others {sum(others) / len(others):.3f}"] if others else []
    return f"  read               {len(read) / len(outcomes):.3f}\n  answered           {', '.join(parts)}"
