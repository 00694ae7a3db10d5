"""Looks at questions, and fetches the corpus: what is trained on, judged on and searched.

    trl-search data list                                            the sets that have a name
    trl-search data questions nq_hotpotqa                           how many, how long, a few rows
    trl-search data questions train.parquet --dedupe_against nq,hotpotqa --limit 10000 --output small.parquet
    trl-search data audit nq --corpus indexes/wiki                  can this corpus answer these questions?
    trl-search data wiki18 --output data/wiki18                     the corpus and its e5 index, after asking

`trl-search data questions --help` and `... wiki18 --help` say more; docs/data.md says what the sets are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trl_search.cli.options import add_question_fields, question_fields
from trl_search.common.errors import UserError
from trl_search.common.files import written_whole

if TYPE_CHECKING:
    import datasets

QUESTIONS = """\
Prints what a set of questions holds: rows, sources, answers per question, lengths, repeated questions, a few rows.
Writes nothing without --output.

    trl-search data questions bamboogle                                    a set of the hub, by name
    trl-search data questions data/nq --split test                         data/nq/test.jsonl, .csv, ...
    trl-search data questions train.parquet --limit 1000 --seed 1          a sample; the same seed, the same rows
    trl-search data questions nq_hotpotqa --dedupe_against all --output train.parquet
                                                                           what stands in none of the seven sets

Files are .jsonl, .json, .csv, .tsv (or any of these as .gz, .bz2, .xz, .zst) or .parquet, with the columns of FlashRAG
(id, question, golden_answers), of Search-R1 (the same, or the answers in reward_model.ground_truth.target) or of verl
(the question in extra_info); --question_field and --answers_field name any others. --output has the columns id,
question, golden_answers, data_source, and is read by every command that takes questions.

--dedupe_against compares whole questions without case, punctuation, articles and spacing. The same question in other
words is not found. It comes before --limit, so the sample is full. `all` are the seven evaluation sets.
"""

AUDIT = """\
Says how many questions a corpus can answer: the share with a golden answer in some passage, and, where the corpus is
an index, in the first K passages that the question itself finds. What no passage holds, no agent can read.

    trl-search data audit nq --limit 500 --corpus indexes/wiki         an index: both shares
    trl-search data audit data/mine.jsonl --corpus corpus.jsonl.gz     a corpus: the first

An answer may stand in a passage by chance, so the shares are upper bounds: short answers ("2", "yes") are found nearly
everywhere. Every passage is read once per question set.
"""

WIKI18 = """\
Fetches wiki-18, the 21,015,324 passages that published numbers were searched in, and an e5 index of them.
First it says which files, how large, what disk and memory they take and what is free; then it asks (--yes: it does
not). It refuses where the disk is too small, and overwrites nothing.

    trl-search data wiki18 --output data/wiki18                    corpus and exact index: 69.7 GB; 84.2 GB of disk
    trl-search data wiki18 --what corpus --output data/wiki18      the corpus: 5.1 GB; 19.7 GB of disk
    trl-search data wiki18 --output data/wiki18 --check            looks at what is there, and fetches nothing

  corpus    wiki-18.jsonl, for BM25 and everything else
  e5-flat   e5_Flat.index: exact, 64.6 GB; memory-mapped, or 32.3 GB on a GPU
  e5-hnsw   e5_HNSW64.index: a graph, approximate, about 75 GB, all of it in memory

Killed or cut off, the same command goes on at the byte where it was. Parts that lie in DIR already (part_aa, part_ab,
wiki-18.jsonl.gz) are used. What is fetched is compared with the hub's SHA-256, an index that is there with the hub's
size; the corpus must have the published number of passages, in their order. In the end it says what was checked, and
prints the commands that come next. --check does not ask the hub. The published BM25 index is Lucene's and is not read
here; build one with `trl-search index`, from the corpus.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="what to do", dest="action", required=True, metavar="ACTION")
    style = argparse.RawDescriptionHelpFormatter
    questions = commands.add_parser(
        "questions",
        help="look at a set of questions, sample it, write it",
        description=QUESTIONS,
        formatter_class=style,
    )
    questions.add_argument("source", metavar="NAME_OR_PATH", help="a name of `trl-search data list`, a file, a folder")
    questions.add_argument("--split", help="of a hub set, or the file's name in a folder (default: the published one)")
    questions.add_argument("--limit", type=int, metavar="N", help="a random sample of so many rows, in their order")
    questions.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    questions.add_argument("--dedupe_against", default="", metavar="SETS", help="names and files, with commas between")
    questions.add_argument("--samples", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    questions.add_argument("--output", metavar="FILE", help="write the rows: .parquet or .jsonl")
    questions.add_argument("--force", action="store_true", help="replace FILE where it is there")
    add_question_fields(questions)
    audit = commands.add_parser(
        "audit",
        help="how many questions of a set a corpus can answer",
        description=AUDIT,
        formatter_class=style,
    )
    audit.add_argument("source", metavar="NAME_OR_PATH", help="questions: a name of `trl-search data list`, a file")
    audit.add_argument("--corpus", required=True, metavar="CORPUS", help="an index folder, or a corpus's file")
    audit.add_argument("--limit", type=int, metavar="N", help="a random sample of N questions of each set")
    audit.add_argument("--seed", type=int, default=0, metavar="N", help="of that sample (default: 0)")
    audit.add_argument("--passages_per_query", type=int, default=10, metavar="K", help="(default: 10)")
    audit.add_argument("--missing", metavar="FILE", help="write the questions that no passage answers, as .jsonl")
    add_question_fields(audit)
    commands.add_parser("list", help="the sets that have a name", description="The sets that have a name.")
    wiki18 = commands.add_parser(
        "wiki18", help="fetch the corpus wiki-18 and its e5 indexes", description=WIKI18, formatter_class=style
    )
    wiki18.add_argument(
        "--what", default="corpus,e5-flat", metavar="WHAT", help="of corpus, e5-flat, e5-hnsw (default: %(default)s)"
    )
    wiki18.add_argument("--output", default="data/wiki18", metavar="DIR", help="where to (default: %(default)s)")
    wiki18.add_argument("--yes", action="store_true", help="do not ask")
    wiki18.add_argument("--check", action="store_true", help="fetch nothing; check what is there")


def run(args: argparse.Namespace) -> int:
    actions = {"questions": show_questions, "audit": audit_corpus, "list": list_sets, "wiki18": get_wiki18}
    return actions[args.action](args)


def audit_corpus(args: argparse.Namespace) -> int:
    from trl_search.evaluation.corpus_audit import answerable
    from trl_search.evaluation.retriever_quality import load_judged, measure
    from trl_search.retrieval import open_retriever
    from trl_search.retrieval.corpus.passages import Corpus, read_corpus
    from trl_search.retrieval.index.folder import read_manifest

    folder = Path(args.corpus).expanduser()
    if folder.is_dir():
        read_manifest(folder)  # refuses a folder that is no finished index
    missing: list[dict[str, object]] = []
    for one in load_judged(args.source, split="test", limit=args.limit, seed=args.seed, fields=question_fields(args)):
        golden = list((one.golden_answers or {}).values())
        if not golden:
            raise UserError(f"{args.source} has no golden answers: `trl-search eval-retriever` measures such sets")
        found = answerable(Corpus(folder) if folder.is_dir() else read_corpus(folder), golden)
        print(f"{one.name:<20} {len(golden):,} questions")
        print(f"  in the corpus      {len(found) / len(golden):.3f}")
        if folder.is_dir():
            with contextlib.closing(open_retriever(folder)) as retriever:
                measured = measure(retriever, one, args.passages_per_query)
            for name, share in measured.items():
                print(f"  in the first {name.partition('@')[2]:<5} {share:.3f}")
        missing += [
            {"question": question, "golden_answers": list(golden[index]), "data_source": one.name}
            for index, question in enumerate(one.queries.values())
            if index not in found
        ]
    if args.missing:
        with written_whole(Path(args.missing)) as path:
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in missing), encoding="utf-8")
        print(f"{args.missing}: {len(missing):,} questions that no passage answers")
    return 0


def list_sets(args: argparse.Namespace) -> int:
    from trl_search.data import HUB_SETS

    splits = ("train", "dev", "test")
    print(f"{'name':<17}{'repository':<30}{'config':<17}" + "".join(f"{split:>10} " for split in splits))
    for name, held in HUB_SETS.items():
        rows = [f"{held.splits[split]:,}" if split in held.splits else "" for split in splits]
        marked = [f"{n:>10}{'*' if split == held.split else ' '}" for n, split in zip(rows, splits, strict=True)]
        print(f"{name:<17}{held.repository:<30}{held.config or '':<17}{''.join(marked)}".rstrip())
    print("* what is loaded when no split is named: the one that published numbers are of")
    return 0


def show_questions(args: argparse.Namespace) -> int:
    from trl_search.data import (
        EVALUATION_SETS,
        load_evaluation_questions,
        load_questions,
        sample_questions,
        without_overlap,
    )
    from trl_search.data.summary import summarize_questions

    output = _writable(Path(args.output).expanduser(), args.force) if args.output else None
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is how many rows to draw, at least 1; got {args.limit}")
    questions = load_questions(args.source, split=args.split, fields=question_fields(args))
    against = [name.strip() for name in args.dedupe_against.split(",") if name.strip()]
    if "all" in against:
        against = [*EVALUATION_SETS, *(name for name in against if name not in ("all", *EVALUATION_SETS))]
    if against:
        kept, dropped = without_overlap(questions, *map(load_evaluation_questions, against))
        print(f"left out            {len(questions) - len(kept):,} of {len(questions):,}, as they stand in")
        for source, count in dropped.items():
            print(f"  {source:<17} {count:,}")
        if not len(kept):
            raise UserError(f"every question of {args.source} stands in {', '.join(against)}: none is left")
        questions = kept
    if args.limit is not None:
        questions = sample_questions(questions, args.limit, args.seed)
    print(summarize_questions(questions, samples=args.samples, seed=args.seed).describe())
    if output is not None:
        _write(questions, output)
        print(f"{output}: {len(questions):,} rows")
    return 0


def get_wiki18(args: argparse.Namespace) -> int:
    from trl_search.data.hub_download import free_bytes
    from trl_search.data.wiki18 import PIECES, check_wiki18, fetch_wiki18, next_commands, plan_wiki18
    from trl_search.retrieval.dense.vectors.search import gb

    what = list(dict.fromkeys(word.strip() for word in args.what.split(",") if word.strip()))
    if not what:
        raise UserError(f"--what names nothing: give some of {', '.join(PIECES)}")
    folder = Path(args.output).expanduser()
    if not args.check:
        planned = plan_wiki18(what, folder)
        free = free_bytes(folder)
        print(f"{planned.describe()}\nfree      {gb(free)} of disk", flush=True)
        planned.check_disk(free)
        if planned.files and not (args.yes or _agreed()):
            print("nothing was downloaded")
            return 1
        checked = fetch_wiki18(planned)
    else:
        checked = check_wiki18(what, folder)
    print("\n".join(f"{word:<9} checked: {said}" for word, said in checked.items()))
    print("What comes next:\n")
    print("\n".join(f"    {command}" for command in next_commands(folder)))
    archive = folder / "wiki-18.jsonl.gz"
    if archive.exists():
        print(f"\nThe archive is not needed any more: rm {shlex.quote(str(archive))}")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on: give --yes to download")
    return input("download? [y/N] ").strip().lower() in ("y", "yes")


def _writable(path: Path, force: bool) -> Path:
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {path}: give a file that ends in .parquet or .jsonl")
    if path.exists() and not force:
        raise UserError(f"{path} is there already: give --force to replace it, or another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} into")
    return path


def _write(questions: datasets.Dataset, path: Path) -> None:
    """Whole, and under another name first: the rows may have been read from the very file that is replaced."""
    with written_whole(path) as unfinished:
        if path.suffix == ".parquet":
            questions.to_parquet(unfinished)
        else:
            questions.to_json(unfinished, orient="records", lines=True, force_ascii=False)
