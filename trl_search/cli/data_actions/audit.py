"""Measures how many questions a corpus can answer, and at which step an agent fails on the others.

    trl-search data audit data/mine.jsonl --corpus corpus.jsonl.gz     a corpus: answers that occur in some passage
    trl-search data audit nq --limit 500 --corpus indexes/wiki         an index: also in the first K passages found
    trl-search data audit nq --corpus indexes/wiki --run runs/eval     an evaluation: also read, and answered

"in the corpus" is the share of questions with a golden answer in some passage. "in the first K" is the share with a
golden answer in the first K passages of one search with the question as query. With the folder of
`trl-search eval --modes search`, "read" is the share with a golden answer in a passage that the agent found, and
"answered" is the agent's exact match. All four shares then cover the questions that the agent was asked.

An answer may occur in a passage by chance, so all but the last are upper bounds: short answers ("2", "yes") are found
nearly everywhere. Every passage of the corpus is read once per question set.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from trl_search.cli.options import add_question_fields, question_fields
from trl_search.common.bounds import check_minima
from trl_search.common.errors import UserError
from trl_search.common.files import write_jsonl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="NAME_OR_PATH", help="questions: a name from `trl-search data list`, or a file"
    )
    parser.add_argument(
        "--corpus", required=True, metavar="CORPUS", help="an index folder, or a corpus: a file or a folder"
    )
    parser.add_argument("--run", metavar="DIR", dest="evaluated", help="an evaluation that asked these questions")
    parser.add_argument("--limit", type=int, metavar="N", help="use a random sample of N questions per set")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of that sample (default: 0)")
    parser.add_argument(
        "--passages_per_query", type=int, default=10, metavar="N", help="passages per query (default: 10)"
    )
    parser.add_argument("--missing", metavar="FILE", help="write the questions that no passage answers, as .jsonl")
    add_question_fields(parser)


def run(args: argparse.Namespace) -> int:
    from trl_search.evaluation.corpus_audit import answerable, asked_in, lost_after_reading
    from trl_search.evaluation.retriever_quality import load_judged, measure
    from trl_search.retrieval import open_retriever
    from trl_search.retrieval.corpus.passages import Corpus, read_corpus
    from trl_search.retrieval.corpus.text_folder import TextFolder
    from trl_search.retrieval.index.folder import read_manifest

    check_minima(args, limit=1, passages_per_query=1)
    folder = Path(args.corpus).expanduser()
    is_corpus = (folder / "queries.jsonl").exists() or TextFolder.find(folder) is not None
    if is_index := folder.is_dir() and not is_corpus:
        read_manifest(folder)  # raises if the folder is not a finished index
    sets = load_judged(args.source, split="test", limit=args.limit, seed=args.seed, fields=question_fields(args))
    if any(not one.golden_answers for one in sets):
        raise UserError(f"{args.source} has no golden answers: use `trl-search eval-retriever` for such sets")
    judged = [(one, None) if args.evaluated is None else asked_in(one, Path(args.evaluated)) for one in sets]
    missing: list[dict[str, object]] = []
    for one, outcomes in judged:
        golden = list((one.golden_answers or {}).values())
        found = answerable(Corpus(folder) if is_index else read_corpus(folder), golden)
        print(f"{one.name:<20} {len(golden):,} questions")
        print(f"  in the corpus      {len(found) / len(golden):.3f}")
        if is_index:
            with contextlib.closing(open_retriever(folder)) as retriever:
                measured = measure(retriever, one, args.passages_per_query)
            for name, share in measured.items():
                print(f"  in the first {name.partition('@')[2]:<5} {share:.3f}")
        if outcomes is not None:
            print(lost_after_reading(outcomes))
        missing += [
            {"question": question, "golden_answers": list(golden[index]), "data_source": one.name}
            for index, question in enumerate(one.queries.values())
            if index not in found
        ]
    if args.missing:
        write_jsonl(Path(args.missing), missing)
        print(f"{args.missing}: {len(missing):,} questions that no passage answers")
    return 0
