"""Converts a row of a question set, in any known schema, to these columns:

    {"id": "test_0", "question": "who got the first nobel prize in physics",
     "golden_answers": ["Wilhelm Conrad Röntgen"], "data_source": "nq"}

The known schemas are FlashRAG (`id, question, golden_answers, metadata`), Search-R1 (the same and `data_source`, or
the answers in `reward_model.ground_truth.target`), and verl (`data_source` prefixed with `searchR1_`, the question in
`extra_info`). For any other schema, `QuestionFields` names the columns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_search.common.errors import UserError
from trl_search.rewards.golden_answers import golden_list, read_text

# The share of trajectories that solved a question, written by `trl-search data filter`.
PASS_RATE = "pass_rate"
# The id of a row is the first of these columns that it has.
_IDS = ("id", "_id", "qid", "query_id", "question_id")


@dataclass(frozen=True, slots=True)
class QuestionFields:
    """The columns of the question, its golden answers and its id; `None` means the columns of the known schemas."""

    question: str | None = None
    answers: str | None = None
    id: str | None = None

    def choose(self, columns: Sequence[str], where: str) -> list[str]:
        """Returns only the needed columns: metadata and prompts can be a hundred times larger.

        Raises:
            UserError: if no column holds the question or the answers.
        """
        _find("question_field", self.question, ("question", "extra_info"), columns, where)
        _find("answers_field", self.answers, ("golden_answers", "reward_model"), columns, where)
        if self.id is not None:
            _find("id_field", self.id, (), columns, where)
        needed = {"question", "golden_answers", "data_source", "reward_model", "extra_info", PASS_RATE, *_IDS}
        return [column for column in columns if column in needed | {self.question, self.answers, self.id}]


def _find(option: str, named: str | None, known: Sequence[str], columns: Sequence[str], where: str) -> None:
    """Raises if the named column (or, without a name, every known one) is missing."""
    if any(column in columns for column in (known if named is None else [named])):
        return
    there = ", ".join(column or "''" for column in columns) or "none"  # pandas writes its index under an empty name
    argument = f"QuestionFields({option.removesuffix('_field')}=COLUMN)"
    if named is not None:
        raise UserError(
            f"{where}: there is no column {named!r}, which {option} names in every file of questions; the "
            f"columns are: {there}. Name the one that holds it: --{option} COLUMN ({argument}). If your files "
            f"differ, `trl-search data questions FILE --{option} COLUMN --output NEW.jsonl` writes one that "
            f"needs no {option}"
        )
    raise UserError(
        f"{where}: there is no column {known[0]!r} (nor {known[1]!r}, where verl keeps it); the columns are: {there}. "
        f"Name the one that holds it: --{option} COLUMN ({argument})"
    )


def question_row(
    row: Mapping[str, Any], index: int, where: str, source: str, fields: QuestionFields
) -> dict[str, Any]:
    """The row in the columns above; `index` and `source` replace a missing id and `data_source`.

    Raises:
        UserError: if the question or the answers are missing or have an unknown shape.
    """
    fields.choose(list(row), where)
    try:
        question = (_question(row, fields) or "").strip()
        golden = [answer for answer in _golden(row, fields) if answer.strip()]
        names = [row.get(name) for name in ([fields.id] if fields.id else _IDS)]
        identifier = next((text for text in (read_text(name, "the id") for name in names) if text), str(index))
        named = read_text(row.get("data_source"), "data_source")
        metadata = row.get("metadata")  # present if the format has no columns to choose from, or evidence is requested
        if named is None and isinstance(metadata, Mapping):
            named = read_text(metadata.get("dataset"), "metadata.dataset")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not question:
        raise UserError(f"{where}: the question is empty: write one, or remove the row")
    if not golden:
        raise UserError(f"{where}: the question {question!r} has no golden answer: add one, or remove the row")
    for text in (identifier, question, *golden):
        try:
            text.encode()
        except UnicodeEncodeError:
            said = f"{where}: {text!r:.80} holds half of a surrogate pair, which is no text: correct it"
            raise UserError(said) from None
    return {
        "id": identifier,
        "question": question,
        "golden_answers": golden,
        "data_source": (named or source).removeprefix("searchR1_"),
        **({PASS_RATE: _pass_rate(row[PASS_RATE], where)} if PASS_RATE in row else {}),
    }


def _pass_rate(value: Any, where: str) -> float | None:
    """A number from 0 to 1; None if it is unknown."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{where}: {PASS_RATE} must be a number from 0 to 1, not {value!r}: correct it, or remove it")
    return float(value)


def _question(row: Mapping[str, Any], fields: QuestionFields) -> str | None:
    held = row.get(fields.question or "question")
    if isinstance(held, Mapping) and "text" in held:  # Natural Questions
        held = held["text"]
    text = read_text(held, "the question")
    return text if text or fields.question else read_text(_dig(row, "extra_info", "question"), "the question")


def _golden(row: Mapping[str, Any], fields: QuestionFields) -> list[str]:
    golden = golden_list(row.get(fields.answers or "golden_answers"))
    return golden if golden or fields.answers else golden_list(_dig(row, "reward_model", "ground_truth"))


def joined_answers(row: Mapping[str, Any], fields: QuestionFields) -> str | None:
    """The cell of the golden answers, if it may hold several in one string: "Lyon|Lugdunum". `None` otherwise."""
    cell = row.get(fields.answers or "golden_answers")
    held = isinstance(cell, str) and ("|" in cell or ";" in cell) and golden_list(cell) == [cell]
    return cell if held else None


def rounded_answer(row: Mapping[str, Any], fields: QuestionFields) -> str | None:
    """The cell of the golden answers, if it is a whole number as pandas writes it into a column with missing values:
    "1998.0". The answer 1998 would count as wrong. `None` otherwise."""
    cell = row.get(fields.answers or "golden_answers")
    return cell if isinstance(cell, str) and re.fullmatch(r"-?\d+\.0", cell.strip()) else None


def _dig(row: Mapping[str, Any], column: str, key: str) -> Any:
    """`row[column][key]`, or `None` if it is missing; the column may hold its struct as JSON."""
    struct = row.get(column)
    if isinstance(struct, str) and struct.strip():
        try:
            struct = json.loads(struct)
        except ValueError as error:
            raise UserError(f"{column} is a string that is not JSON ({error})") from error
    if struct is None or isinstance(struct, str):
        return None
    if not isinstance(struct, Mapping):
        raise UserError(f"{column} is of type {type(struct).__name__}, and should be a struct")
    return struct.get(key)
