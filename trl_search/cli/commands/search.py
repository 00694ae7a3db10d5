"""Searches with a retriever and prints the passages that a policy would read.

    trl-search search indexes/corpus "where was Mira Talvane born?" --passages_per_query 3
    trl-search search http://localhost:8000 "where was Mira Talvane born?"
    trl-search search web "where was Marie Curie born?"
    trl-search search runs/quickstart "where was Mira Talvane born?"          what that run searched

Several questions are searched in one batch. The passages of each are printed best first, with id and score. BM25 finds
none if no passage shares a word with the question.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import textwrap

from trl_search.cli.options import SEARCHED, add_retriever_options, add_world_options, asked_questions, searched_of
from trl_search.cli.retriever_checks import retriever_checks
from trl_search.cli.start_checks import refuse
from trl_search.common.bounds import check_minima
from trl_search.common.visible import visible
from trl_search.types import Passage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("retriever", metavar="WHAT", help=SEARCHED)
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="what to search for, each in quotes")
    parser.add_argument(
        "--passages_per_query", type=int, default=3, metavar="N", help="passages per query (default: 3)"
    )
    add_retriever_options(parser)
    add_world_options(parser)


def run(args: argparse.Namespace) -> int:
    check_minima(args, passages_per_query=1)
    questions = asked_questions(args.questions)
    searched = searched_of(args, args.retriever)
    refuse(retriever_checks(searched))  # otherwise a server that is not running fails only after its patience
    with contextlib.closing(searched.load()) as retriever:
        found = retriever.search(questions, args.passages_per_query)
    for question, passages in zip(questions, found, strict=True):
        print(f"{visible(question)}\n")
        print("\n\n".join(_shown(rank, passage) for rank, passage in enumerate(passages, start=1)) or "   no match")
        print()
    return 0


def _shown(rank: int, passage: Passage) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    text = textwrap.fill(passage.text, width, initial_indent="   ", subsequent_indent="   ")
    return visible(f"{rank}. {passage.title or '(no title)'}   [id {passage.id}, score {passage.score:.2f}]\n{text}")
