"""Leaves out training questions that are also in an evaluation set.

Questions are compared after the normalisation that EM uses (case, punctuation, articles, spaces). Paraphrases are not
detected.
"""

from __future__ import annotations

import datasets

from trl_search.rewards.answers import normalize_answer


def without_overlap(
    questions: datasets.Dataset, *evaluation: datasets.Dataset
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Leaves out the questions that are also in an evaluation set.

    Returns:
        `tuple`: the remaining rows, and the number of dropped rows per `data_source` of the evaluation sets (a row in
        two sets counts for both).

    Example:
        >>> train, dropped = without_overlap(load_questions("train.parquet"), load_questions("nq"))
        >>> dropped
        {'nq': 3}
    """
    dropped = {source: 0 for held_out in evaluation for source in held_out.unique("data_source")}
    sources: dict[str, set[str]] = {}
    for held_out in evaluation:
        for question, source in zip(held_out["question"], held_out["data_source"], strict=True):
            sources.setdefault(question_key(question), set()).add(source)
    kept = []
    for index, question in enumerate(questions["question"]):
        found = sources.get(question_key(question))
        if found is None:
            kept.append(index)
            continue
        for source in found:
            dropped[source] += 1
    return questions.select(kept), dropped


def question_key(question: str) -> str:
    """The form in which questions are compared.

    Example:
        >>> question_key("Who wrote  The Amber Mill?")
        'who wrote amber mill'
    """
    # "???" and "The A" have no words left after normalisation, so they are compared unchanged.
    return normalize_answer(question) or question.strip()
