"""The gold passages of a question, by id or title, if its row names them.

These columns are read, at the top level of a row or under `metadata`:

    "gold_ids": ["p07588", "p33989"]                                   ids in the searched corpus
    "supporting_facts": {"title": ["Anne McLaren", …], "sent_id": …}   HotpotQA and 2WikiMultihopQA; or a list of pairs
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

# The columns that may hold evidence, and the columns made from them.
EVIDENCE_COLUMNS = ("metadata", "gold_ids", "supporting_facts", "question_decomposition")
EVIDENCE = ("gold_ids", "gold_titles")
# The number of questions searched to check the corpus, and the fewest that prove anything. The log warns if a gold
# passage is found for a smaller share; BM25 finds one for half of MuSiQue's questions, which are hard.
_JUDGED, _LEAST_JUDGED, _FEW = 50, 5, 0.25


def evidence_of(row: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """The `gold_ids` and `gold_titles` of a row; both are empty if it names no gold passages.

    Raises:
        UserError: if the evidence has an unknown shape.

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
    """Searches some questions and checks that gold passages are found. Warns if few are.

    Raises:
        UserError: if no gold passage is found for any question: the retriever searches a different corpus.
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
            "the retriever finds a gold passage of %.0f %% of %s questions: most gold passages may be from a "
            "different corpus than the one it searches, and the players cannot use them",
            100 * share,
            len(judged),
        )
    if share:
        return
    wanted = (judged[0]["gold_ids"] or judged[0]["gold_titles"])[0]
    example = f"it has ids like {found[0].id!r}" if found else "it found nothing at all"
    raise UserError(
        f"the retriever finds no gold passage of {len(judged)} questions, such as {wanted!r}; {example}: the gold "
        "passages are from a different corpus. Give the index of that corpus, or remove the evidence from the "
        "questions"
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
        raise UserError(f"{name} must be a list of strings, not {value!r}: correct the row")
    return [str(one) for one in value]
