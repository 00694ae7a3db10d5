"""The gold passages of a question, by id or title, where its row names them.

Columns that are read, at the top level of a row or under `metadata`:

    "gold_ids": ["p07588", "p33989"]                                   ids of the corpus that is searched
    "supporting_facts": {"title": ["Anne McLaren", …], "sent_id": …}   HotpotQA and 2WikiMultihopQA; pairs too
    "question_decomposition": [{"support_paragraph": {"title": …}}]    MuSiQue
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_search.common.errors import UserError
from trl_search.rewards.answers import normalize_answer
from trl_search.types import Passage

logger = logging.getLogger(__name__)

# The columns that may hold it, and the columns made of them.
EVIDENCE_COLUMNS = ("metadata", "gold_ids", "supporting_facts", "question_decomposition")
EVIDENCE = ("gold_ids", "gold_titles")
# How many questions are searched to check the corpus; fewer than the least prove nothing. The log warns where a gold
# passage is found for a smaller share of them; of MuSiQue's questions, which are hard to search for, BM25 finds half.
_JUDGED, _LEAST_JUDGED, _FEW = 50, 5, 0.25


def evidence_of(row: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """`gold_ids` and `gold_titles` of a row; both are empty if it names no gold passages.

    Args:
        where (`str`): The row's place in its source, for errors.

    Raises:
        UserError: for evidence in a shape that cannot be read.

    Example:
        >>> evidence_of({"metadata": {"supporting_facts": {"title": ["Lyon", "Lyon"], "sent_id": [0, 1]}}}, "row 1")
        {'gold_ids': [], 'gold_titles': ['Lyon']}
    """
    metadata = row.get("metadata")
    told = {**(metadata if isinstance(metadata, Mapping) else {}), **row}
    try:
        titles = [*_titles(told.get("supporting_facts")), *_decomposition(told.get("question_decomposition"))]
        return {"gold_ids": _strings(told.get("gold_ids"), "gold_ids"), "gold_titles": list(dict.fromkeys(titles))}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def check_corpus(
    rows: Sequence[Mapping[str, Any]], search: Callable[[Sequence[str]], Sequence[Sequence[Passage]]]
) -> None:
    """Searches some questions, and checks that any of their gold passages is found. Warns where few are.

    Args:
        search (`Callable`): The passages of each query.

    Raises:
        UserError: if none is found for any of them: the retriever searches another corpus.
    """
    judged = [row for row in rows if row.get("gold_ids") or row.get("gold_titles")][:_JUDGED]
    if len(judged) < _LEAST_JUDGED:
        return
    titles = [title for row in judged for title in row["gold_titles"]]
    found = [
        passage for passages in search([*(str(row["question"]) for row in judged), *titles]) for passage in passages
    ]
    ids = {passage.id for passage in found}
    names = {normalize_answer(passage.title) for passage in found}
    known = [ids & set(row["gold_ids"]) or names & set(map(normalize_answer, row["gold_titles"])) for row in judged]
    share = sum(map(bool, known)) / len(judged)
    if 0 < share < _FEW:
        logger.warning(
            "the retriever finds a gold passage of %.0f %% of %s questions: most gold passages may be from another "
            "corpus than the one it searches, and the players cannot use them",
            100 * share,
            len(judged),
        )
    if share:
        return
    wanted = (judged[0]["gold_ids"] or judged[0]["gold_titles"])[0]
    example = f"it has ids like {found[0].id!r}" if found else "it found nothing at all"
    raise UserError(
        f"the retriever finds no gold passage of {len(judged)} questions, such as {wanted!r}; {example}: the gold "
        "passages are from another corpus than the one it searches. Give the index of that corpus, or remove the "
        "evidence from the questions"
    )


def _titles(facts: Any) -> list[str]:
    if isinstance(facts, Mapping):
        return _strings(facts.get("title"), "supporting_facts.title")
    if facts is None:
        return []
    if not isinstance(facts, (list, tuple)) or not all(isinstance(one, (list, tuple)) and one for one in facts):
        raise UserError("supporting_facts must be pairs of title and sentence, or lists of them: correct the row")
    return [str(one[0]) for one in facts]


def _decomposition(steps: Any) -> list[str]:
    paragraphs = [step.get("support_paragraph") for step in steps or () if isinstance(step, Mapping)]
    return [str(one["title"]) for one in paragraphs if isinstance(one, Mapping) and one.get("title")]


def _strings(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, (str, int)) for one in value):
        raise UserError(f"{name} must be a list of strings, and is {value!r}: correct the row")
    return [str(one) for one in value]
