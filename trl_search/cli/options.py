"""Options that several commands share, so that one thing has one name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_search.data import QuestionFields
    from trl_search.retrieval.corpus.fields import Fields


def add_question_fields(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the columns of a question file."""
    columns = parser.add_argument_group(
        "columns of a question file", "Those of FlashRAG, Search-R1 and verl are known and need no option."
    )
    columns.add_argument("--question_field", metavar="COLUMN", help="holds the question")
    columns.add_argument(
        "--answers_field", metavar="COLUMN", help="holds the golden answers: a string, a list, TriviaQA's or SQuAD's"
    )
    columns.add_argument("--id_field", metavar="COLUMN", help="holds the id")


def question_fields(args: argparse.Namespace) -> QuestionFields:
    from trl_search.data import QuestionFields

    return QuestionFields(args.question_field, args.answers_field, args.id_field)


def add_passage_fields(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the fields of a corpus."""
    for part in ("id", "title", "text"):
        parser.add_argument(f"--{part}_field", metavar="NAME", help=f"the field or column that holds the {part}")


def passage_fields(args: argparse.Namespace) -> Fields:
    from trl_search.retrieval.corpus.fields import Fields

    return Fields(args.id_field, args.title_field, args.text_field)
