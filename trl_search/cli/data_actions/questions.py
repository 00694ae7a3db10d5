"""Summarizes a question set: rows, sources, answers per question, lengths, repeated questions, sample rows.
Writes nothing without --output.

    trl-search data questions bamboogle                                    a set on the hub, by name
    trl-search data questions data/nq --split test                         data/nq/test.jsonl, .csv, ...
    trl-search data questions train.parquet --limit 1000 --seed 1          a sample; the seed determines the rows
    trl-search data questions nq_hotpotqa --dedupe_against all --output train.parquet
                                                                           without the seven evaluation sets
    trl-search data questions world --split test --output test.jsonl       the embedded world, split train or test

Files are .jsonl, .json, .csv, .tsv (or any of these as .gz, .bz2, .xz, .zst) or .parquet, with the columns of FlashRAG
(id, question, golden_answers), of Search-R1 (the same, or the answers in reward_model.ground_truth.target) or of verl
(the question in extra_info); for other columns, give --question_field and --answers_field. The output file has the
columns id, question, golden_answers and data_source. Every command that takes questions reads it.

--dedupe_against drops the questions that also occur in other sets. It compares whole questions and ignores case,
punctuation, articles and spacing; it does not find paraphrases. It is applied before --limit. `all` means the seven
evaluation sets.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trl_search.cli.options import add_question_fields, add_world_options, question_fields
from trl_search.common.bounds import check_minima
from trl_search.common.errors import UserError
from trl_search.common.files import written_whole

if TYPE_CHECKING:
    import datasets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="NAME_OR_PATH", help="a name from `trl-search data list`, a file, a folder, or world"
    )
    parser.add_argument(
        "--split",
        help="split of a hub set, or name of the file in a folder (default: the split of published numbers)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take a random sample of N rows; keep their order")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument(
        "--dedupe_against",
        default="",
        metavar="SETS",
        help="drop questions that are in these sets: names, or files with the same columns, comma-separated",
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    parser.add_argument("--output", metavar="FILE", help="write the rows to FILE, .parquet or .jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_question_fields(parser)
    add_world_options(parser)


def run(args: argparse.Namespace) -> int:
    from trl_search.config.searched import WORLD
    from trl_search.config.task import set_names
    from trl_search.data import (
        EVALUATION_SETS,
        load_evaluation_questions,
        load_questions,
        sample_questions,
        without_overlap,
    )
    from trl_search.data.summary import summarize_questions

    output = writable(Path(args.output).expanduser(), args.overwrite) if args.output else None
    check_minima(args, limit=1, samples=0)
    if args.source == WORLD:
        questions = _world_questions(args)
    else:
        questions = load_questions(args.source, split=args.split, fields=question_fields(args))
    against = set_names(args.dedupe_against)
    if "all" in against:
        against = [*EVALUATION_SETS, *(name for name in against if name not in ("all", *EVALUATION_SETS))]
    if against:
        others = [load_evaluation_questions(name, fields=question_fields(args)) for name in against]
        kept, dropped = without_overlap(questions, *others)
        print(f"dropped             {len(questions) - len(kept):,} of {len(questions):,}, which also occur in")
        for source, count in dropped.items():
            print(f"  {source:<17} {count:,}")
        if not len(kept):
            raise UserError(
                f"every question of {args.source} also occurs in {', '.join(against)}: give fewer --dedupe_against"
            )
        questions = kept
    if args.limit is not None:
        questions = sample_questions(questions, args.limit, args.seed)
    print(summarize_questions(questions, samples=args.samples, seed=args.seed).describe())
    if output is not None:
        write_questions(questions, output)
        print(f"{output}: {len(questions):,} rows")
    return 0


def _world_questions(args: argparse.Namespace) -> datasets.Dataset:
    from datasets import Dataset

    from trl_search.data.world import generate_world

    asked = generate_world(args.world_passages, args.world_seed).questions(args.split or "train")
    columns = ("id", "question", "golden_answers", "data_source")
    return Dataset.from_list([{name: question.row()[name] for name in columns} for question in asked])


def writable(path: Path, overwrite: bool) -> Path:
    """Returns the path of a question file, or raises `UserError` if it cannot be written."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {path}: give a file that ends in .parquet or .jsonl")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: give --overwrite to replace it, or another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: create it, or give another --output")
    return path


def write_questions(questions: datasets.Dataset, path: Path) -> None:
    """Writes to a temporary file first, because the rows may be read from the file that is replaced."""
    with written_whole(path) as unfinished:
        if path.suffix == ".parquet":
            questions.to_parquet(unfinished)
        else:
            questions.to_json(unfinished, orient="records", lines=True, force_ascii=False)
