"""Inspects and filters question sets; downloads, chunks and audits corpora.

    trl-search data list                                            list the named question sets
    trl-search data questions nq_hotpotqa                           count the rows, show lengths and samples
    trl-search data questions train.parquet --dedupe_against nq,hotpotqa --limit 10000 --output small.parquet
    trl-search data filter train.parquet --model runs/sft --retriever indexes/wiki --output useful.parquet
    trl-search data chunk documents.jsonl --size 100 --output corpus.jsonl
    trl-search data audit nq --corpus indexes/wiki                  can this corpus answer these questions?
    trl-search data wiki18 --output data/wiki18                     download the corpus and its e5 index (asks first)

`trl-search data ACTION --help` describes one action. docs/data.md describes the sets.
"""

from __future__ import annotations

import argparse

from trl_search.cli.data_actions import audit, chunk, filter, questions, sets, wiki18

ACTIONS = {"list": sets, "questions": questions, "filter": filter, "chunk": chunk, "audit": audit, "wiki18": wiki18}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    for name, action in ACTIONS.items():
        assert action.__doc__ is not None
        added = commands.add_parser(
            name,
            help=action.__doc__.partition("\n")[0].rstrip("."),
            description=action.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.add_arguments(added)


def run(args: argparse.Namespace) -> int:
    return ACTIONS[args.action].run(args)
