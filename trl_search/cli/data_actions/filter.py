"""Asks a policy every question several times and writes the questions that it sometimes solves, with pass rates.

    trl-search data filter nq_hotpotqa --model runs/sft --retriever indexes/wiki --pass_at 8 --output train.parquet
    trl-search data filter train.jsonl --model Qwen/Qwen2.5-3B-Instruct --retriever http://127.0.0.1:8000 \\
        --backend vllm --limit 20000 --output filtered.parquet
    trl-search data filter train.jsonl --model runs/sft --retriever indexes/wiki --keep all --output rated.parquet

A question that the policy always or never solves gives GRPO no gradient. `pass_rate` is the share of the N samples
whose answer is an exact match; questions with a rate strictly between 0 and 1 are kept. --keep all keeps every
question, for training with `curriculum: pass_rate`, which starts from this column. A question is left out if the
searches failed in all of its samples.

The answers are kept in FILE.asked/answers, in the format of `trl-search eval`. The same command resumes an interrupted
filtering. Several processes (`accelerate launch -m trl_search data filter ...`) share the questions.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_search.cli.commands import eval as evaluation
from trl_search.cli.data_actions.questions import writable, write_questions
from trl_search.cli.options import add_sampling_options, question_fields
from trl_search.common.bounds import check_minima
from trl_search.common.errors import UserError
from trl_search.common.files import write_jsonl
from trl_search.common.launched import launched_rank

_SET = "asked"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="NAME_OR_PATH", help="a name from `trl-search data list`, a file, a folder")
    parser.add_argument("--model", required=True, metavar="MODEL", help="a model on the hub, a folder, or 'tiny'")
    parser.add_argument("--pass_at", type=int, default=8, metavar="N", help="samples per question (default: 8)")
    parser.add_argument(
        "--keep",
        default="useful",
        choices=("useful", "all"),
        help="useful: only questions that are sometimes solved (default: useful)",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write, .parquet or .jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--split", help="split of a hub set, or name of the file in a folder (default: train)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask a random sample of N questions")
    parser.add_argument("--seed", type=int, default=0, help="seed of that sample and of generation (default: 0)")
    evaluation.add_policy_options(parser)
    add_sampling_options(
        parser.add_argument_group("sampling"), temperature=1.0, note="0 is greedy; 1 is the default in training"
    )


def run(args: argparse.Namespace) -> int:
    from trl_search.data import load_questions
    from trl_search.data.question_rows import PASS_RATE
    from trl_search.evaluation.answers_file import Records
    from trl_search.evaluation.settings import OtherSettings

    check_minima(args, pass_at=2, limit=1)
    if args.temperature <= 0:
        raise UserError("--temperature 0 gives the same answer each time: use the temperature of the training")
    output = writable(Path(args.output).expanduser(), args.overwrite)
    questions = load_questions(
        args.source, split=args.split, limit=args.limit, seed=args.seed, fields=question_fields(args)
    )

    # 1. Repeat every question `pass_at` times, in a file for `trl-search eval`.
    folder = output.with_name(f"{output.name}.asked")
    asked, answers = folder / f"{_SET}.jsonl", folder / "answers"
    write_jsonl(asked, _repeated(questions, args.pass_at))  # every process writes the same rows, so none waits
    asking = {"datasets": [str(asked)], "modes": ["search"], "limit": None}
    writing = {"output": str(answers), "published": "none"}
    fields = {"question_field": None, "answers_field": None, "id_field": None}
    try:
        evaluation.evaluate(argparse.Namespace(**{**vars(args), **asking, **writing, **fields}))
    except OtherSettings as error:
        raise UserError(
            f"{folder} holds answers from other settings ({error.differences}): remove that folder, or give "
            "another --output"
        ) from error
    if launched_rank():
        return 0

    # 2. Compute the pass rate of each question.
    outcomes = Records(answers, "search", _SET).read()
    solved: dict[int, list[bool]] = defaultdict(list)
    for place, outcome in outcomes.items():
        if not outcome.failed:
            solved[place // args.pass_at].append(outcome.em == 1)
    rates = {number: sum(answers) / len(answers) for number, answers in sorted(solved.items())}
    kept = [number for number, rate in rates.items() if args.keep == "all" or 0 < rate < 1]

    # 3. Write the questions with their pass rates.
    never, always = (sum(rate == bound for rate in rates.values()) for bound in (0, 1))
    print(f"asked               {len(questions):,} questions, {args.pass_at} times each")
    print(f"  never solved      {never:,}")
    print(f"  always solved     {always:,}")
    print(f"  sometimes         {len(rates) - never - always:,}")
    print(f"  searches failed   {len(questions) - len(rates):,}")
    if not kept:
        raise UserError("the policy solves no question sometimes: use a better policy, or --keep all")
    if PASS_RATE in questions.column_names:
        questions = questions.remove_columns(PASS_RATE)
    write_questions(questions.select(kept).add_column(PASS_RATE, [rates[number] for number in kept]), output)
    print(f"{output}: {len(kept):,} rows")
    return 0


def _repeated(questions: Iterable[Mapping[str, Any]], times: int) -> Iterator[dict[str, Any]]:
    """Yields each question several times in a row, each time with another id, because the seed depends on the id."""
    for number, row in enumerate(questions):
        for sample in range(times):
            asked = {"id": f"{number}-{sample}", "question": row["question"], "golden_answers": row["golden_answers"]}
            yield {**asked, "data_source": _SET}
