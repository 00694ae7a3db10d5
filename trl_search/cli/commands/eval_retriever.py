"""Evaluates retrievers: nDCG, recall and MRR on BEIR folders, golden answers in the top k on question sets.

    trl-search eval-retriever indexes/bm25 indexes/dense --datasets data/scifact data/nfcorpus
    trl-search eval-retriever http://127.0.0.1:8000 --datasets nq,hotpotqa --limit 500 --passages_per_query 5

Several retrievers (index folders, server addresses, kinds) are compared in one table. A BEIR folder holds
queries.jsonl and qrels/test.tsv; build the index from its corpus. For a question set with golden answers, answer@3 is
the share of questions with a golden answer in the first three passages: an upper bound on what an agent can read after
one search.

Measured nDCG@10 (docs/evaluation.md has the commands):

                bm25    all-MiniLM-L6-v2    hybrid of both
    NFCorpus    .327    .317                .354
    SciFact     .688    .646                .713
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from pathlib import Path

from trl_search.cli.options import (
    SEARCHED,
    add_question_fields,
    add_retriever_options,
    add_world_options,
    question_fields,
    searched_of,
)
from trl_search.cli.retriever_checks import retriever_checks
from trl_search.cli.start_checks import refuse
from trl_search.common.bounds import check_minima
from trl_search.common.errors import UserError
from trl_search.common.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("retrievers", nargs="+", metavar="RETRIEVER", help=f"each {SEARCHED}")
    parser.add_argument("--datasets", required=True, nargs="+", metavar="SET", help="BEIR folders and question sets")
    parser.add_argument(
        "--passages_per_query", type=int, default=10, metavar="N", help="passages per query (default: 10)"
    )
    parser.add_argument("--split", default="test", help="split of the qrels in BEIR folders (default: test)")
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N queries per set")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of that sample (default: 0)")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers as JSON")
    add_retriever_options(parser)
    add_world_options(parser)
    add_question_fields(parser)


def run(args: argparse.Namespace) -> int:
    from trl_search.config.task import set_names
    from trl_search.evaluation.retriever_quality import load_judged, measure, quality_table

    check_minima(args, limit=1, passages_per_query=1)
    sets = [
        one
        for name in set_names(args.datasets)
        for one in load_judged(name, split=args.split, limit=args.limit, seed=args.seed, fields=question_fields(args))
    ]
    repeated = next((name for name, count in Counter(one.name for one in sets).items() if count > 1), None)
    if repeated is not None:
        raise UserError(
            f"several of --datasets are called {repeated!r}, so their numbers could not be told apart: give each to a "
            "command of its own"
        )
    measured: dict[str, dict[str, dict[str, float]]] = {one.name: {} for one in sets}
    searched = {word: searched_of(args, word) for word in args.retrievers}
    refuse(check for one in searched.values() for check in retriever_checks(one))
    for word, one_searched in searched.items():
        with contextlib.closing(one_searched.load()) as retriever:
            for one in sets:
                measured[one.name][word] = measure(retriever, one, args.passages_per_query)
    for one in sets:
        print(f"{one.name}: {len(one.queries):,} queries\n\n{quality_table(measured[one.name])}\n")
    if args.output:
        write_json(Path(args.output), measured)
    return 0
