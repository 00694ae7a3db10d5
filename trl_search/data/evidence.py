"""Where the answer of a question stands, as far as its row tells: ids or titles of the gold passages.

What is read of a row, at its top or under `metadata`:

    "gold_ids": ["p07588", "p33989"]                                   ids of the corpus that is searched
    "supporting_facts": {"title": ["Anne McLaren", …], "sent_id": …}   HotpotQA and 2WikiMultihopQA; pairs too
    "question_decomposition": [{"support_paragraph": {"title": …}}]    MuSiQue
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where it stands in a row, and the columns that tell it.
EVIDENCE_COLUMNS = ("metadata", "gold_ids", "supporting_facts", "question_decomposition")
EVIDENCE = ("gold_ids", "gold_titles")


def evidence_of(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """`gold_ids` and `gold_titles` of a row, both empty where it tells nothing.

    Example:
        >>> evidence_of({"metadata": {"supporting_facts": {"title": ["Lyon", "Lyon", "Rhône"], "sent_id": [0, 1, 0]}}})
        {'gold_ids': [], 'gold_titles': ['Lyon', 'Rhône']}
    """
    metadata = row.get("metadata")
    told = {**(metadata if isinstance(metadata, Mapping) else {}), **row}
    titles = [*_titles(told.get("supporting_facts")), *_decomposition(told.get("question_decomposition"))]
    return {"gold_ids": _strings(told.get("gold_ids")), "gold_titles": list(dict.fromkeys(titles))}


def _titles(facts: Any) -> list[str]:
    if isinstance(facts, Mapping):
        return _strings(facts.get("title"))
    pairs = facts if isinstance(facts, (list, tuple)) else []
    return [str(pair[0]) for pair in pairs if isinstance(pair, (list, tuple)) and pair]


def _decomposition(steps: Any) -> list[str]:
    paragraphs = [step.get("support_paragraph") for step in steps or () if isinstance(step, Mapping)]
    return [str(one["title"]) for one in paragraphs if isinstance(one, Mapping) and one.get("title")]


def _strings(value: Any) -> list[str]:
    return [str(one) for one in value if one is not None] if isinstance(value, (list, tuple)) else []
