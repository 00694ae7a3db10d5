"""Evaluates a policy on question sets: exact match with intervals, beside published numbers.

    trl-search eval tiny --datasets world --modes search,direct,rag --limit 200 --output runs/eval-tiny      offline
    trl-search eval runs/qwen3b --datasets nq,hotpotqa,bamboogle --retriever http://127.0.0.1:8000 --output runs/eval
    trl-search eval runs/qwen3b --datasets data/mine.jsonl --retriever indexes/mine --output runs/eval-mine
    accelerate launch --num_processes 8 -m trl_search eval runs/qwen3b ...           8 processes share the questions

Modes: `search` runs the agent; `direct` answers without a search; `cot` reasons before it answers; `rag` reads the
passages of one search. Datasets: nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle (in the splits of
published numbers), `world` (embedded; needs no network), and files and folders (docs/data.md). A file with several
values of `data_source` counts as several sets. So does nq_hotpotqa, whose test split is used.

DIR then holds results.md, results.json (with every setting that affects the numbers) and one line per question. The
same command resumes an interrupted evaluation and does not repeat finished questions. Other settings are an error, but
datasets and modes may be added or left out. A run's folder records the agent settings of its training (protocol,
instruction, budgets). Options override them. docs/evaluation.md explains how each number is computed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trl_search.cli.options import (
    SEARCHED,
    add_question_fields,
    add_retriever_options,
    add_sampling_options,
    add_world_options,
    explained_interrupt,
    question_fields,
    sampling_of,
    tell_of_imports,
)
from trl_search.common.bounds import check_minima, check_share
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import parse_object
from trl_search.common.launched import launched_processes, launched_rank

_SIZES = ("auto", "3B", "7B", "all", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model on the hub, a folder (model or adapter), or 'tiny'")
    parser.add_argument(
        "--datasets", required=True, nargs="+", metavar="SET", help="names and files, separated by commas or spaces"
    )
    parser.add_argument(
        "--modes",
        default=["search"],
        nargs="+",
        metavar="MODE",
        help="some of search, direct, cot, rag (default: search)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder, or an evaluation to resume")
    parser.add_argument("--limit", type=int, metavar="N", help="ask a random sample of N questions per set")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of that sample and of generation (default: 0)"
    )
    parser.add_argument(
        "--published",
        default="auto",
        choices=_SIZES,
        help="published results to show: auto (of the model's size), 3B, 7B, all or none (default: auto)",
    )
    add_policy_options(parser)
    add_sampling_options(parser.add_argument_group("sampling"), temperature=0.0)


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of retriever, agent and backend, which `trl-search data filter` shares."""
    from trl_search.config.agent import add_agent_options

    add_question_fields(parser)
    searched = parser.add_argument_group("retriever")
    searched.add_argument(
        "--retriever",
        metavar="WHAT",
        help=f"{SEARCHED} (default: what the run searched; with --datasets world: world)",
    )
    add_retriever_options(searched)
    searched.add_argument(
        "--max_failed_share",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="stop with an error if searches fail in more than this share of the questions; failed questions are left "
        "out of the means, listed, and asked again by the same command (default: 0.05)",
    )
    add_world_options(searched)
    add_agent_options(parser)
    run = parser.add_argument_group("backend")
    run.add_argument(
        "--backend",
        default="transformers",
        metavar="NAME",
        help="transformers, vllm (an engine in this process) or vllm_server (default: transformers)",
    )
    run.add_argument(
        "--server",
        metavar="URL",
        help="address of the `vllm serve` for --backend vllm_server; MODEL then names the tokenizer",
    )
    run.add_argument(
        "--served_model", metavar="NAME", help="name of the policy on the server (default: the first model it lists)"
    )
    run.add_argument(
        "--engine_options", default="{}", metavar="JSON", help="""for --backend vllm: '{"max_model_len": 8192}'"""
    )
    run.add_argument("--dtype", help="float32, bfloat16, float16 or auto (default: bfloat16 on a GPU, else float32)")
    run.add_argument("--device", help="for --backend transformers: cpu, cuda or cuda:1 (default: cuda, if available)")
    run.add_argument(
        "--concurrency", type=int, default=64, metavar="N", help="questions in flight at once (default: 64)"
    )


def run(args: argparse.Namespace) -> int:
    table = evaluate(args)
    if launched_rank() == 0:
        from trl_search.evaluation.outcomes import RESULTS_FILE
        from trl_search.evaluation.run import RESULTS_MD

        print(f"\n{table}\nWrote {Path(args.output, RESULTS_MD)} and {Path(args.output, RESULTS_FILE)}.")
    return 0


def evaluate(args: argparse.Namespace) -> str:
    """Runs an evaluation, also for `trl-search data filter`. Returns the table of its results, in Markdown."""
    from trl_search.common.provenance import command_without_secrets
    from trl_search.config.agent import asked, trained_settings
    from trl_search.config.task import set_names
    from trl_search.evaluation.backends import BACKENDS, Backend
    from trl_search.evaluation.evaluate import MODES

    modes = set_names(args.modes)
    for mode in modes:
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES)
    if not modes:
        raise UserError(f"--modes is empty: give some of {','.join(MODES)}")
    datasets = set_names(args.datasets)
    if not datasets:
        raise UserError("--datasets is empty: give names or files")
    if args.backend not in BACKENDS:
        raise unknown_name("backend", args.backend, BACKENDS)
    sampling = sampling_of(args, seed=args.seed)
    check_share(max_failed_share=args.max_failed_share)
    check_minima(args, limit=1, concurrency=1)
    tell_of_imports()
    from trl_search.cli.evaluation_checks import refuse_evaluation
    from trl_search.evaluation.plan import Plan
    from trl_search.evaluation.run import run_evaluation

    plan = Plan(
        model=args.model,
        modes=modes,
        datasets=datasets,
        output=Path(args.output),
        agent=asked(trained_settings(args.model), vars(args)),
        backend=Backend(
            args.backend,
            dtype=args.dtype,
            device=args.device,
            server=args.server,
            served_model=args.served_model,
            engine_options=parse_object(args.engine_options, "--engine_options", '{"max_model_len": 8192}'),
            concurrency=args.concurrency,
        ),
        sampling=sampling,
        retriever=args.retriever,
        retriever_options=parse_object(args.retriever_options, "--retriever_options", '{"index": "indexes/wiki"}'),
        world_passages=args.world_passages,
        world_seed=args.world_seed,
        limit=args.limit,
        seed=args.seed,
        max_failed_share=args.max_failed_share,
        fields=question_fields(args),
        published=args.published,
        command=command_without_secrets(["trl-search", *sys.argv[1:]]),
    )
    plan.backend.check(launched_processes())
    refuse_evaluation(plan)
    with explained_interrupt(lambda: "the same command resumes it and does not repeat finished questions"):
        return run_evaluation(plan)
