"""Searches an index by hand: what would the policy read?

    trl-search search indexes/corpus "where was Mira Talvane born?" --top_k 3

Several questions are searched together. Each is answered with its passages, best first, with id and score; none
where no passage shares a word with the question.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap

from trl_search.common.errors import UserError
from trl_search.retrieval import load_retriever
from trl_search.retrieval.index.folder import read_manifest
from trl_search.types import Passage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="DIR", help="a folder made by `trl-search index`")
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="what to search for, each in quotes")
    parser.add_argument("--top_k", type=int, default=3, metavar="K", help="passages a question (default: 3)")


def run(args: argparse.Namespace) -> int:
    if args.top_k < 1:
        raise UserError(f"--top_k is how many passages a question gets, at least 1; got {args.top_k}")
    retriever = load_retriever(read_manifest(args.index).kind, index=args.index)
    found = retriever.search(args.questions, args.top_k)
    for question, passages in zip(args.questions, found, strict=True):
        print(f"{question}\n")
        print("\n\n".join(_shown(rank, passage) for rank, passage in enumerate(passages, start=1)) or "   no match")
        print()
    retriever.close()
    return 0


def _shown(rank: int, passage: Passage) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    text = textwrap.fill(passage.text, width, initial_indent="   ", subsequent_indent="   ")
    return f"{rank}. {passage.title or '(no title)'}   [id {passage.id}, score {passage.score:.2f}]\n{text}"
