"""A real language model learns to search Wikipedia: one chain per GPU, then one table of all chains.

    python benchmarks/real_model.py run base_1.5b --model MODEL --kit KIT --output runs/real        the untrained model
    python benchmarks/real_model.py run em_0 --model MODEL --kit KIT --output runs/real --seed 0 --steps 50
    python benchmarks/real_model.py run nomask_0 ... -- --mask_observations false      changes to the recipe
    python benchmarks/real_model.py run ddp_0 ... --processes 4 -- --gradient_accumulation_steps 8 …    on four GPUs
    python benchmarks/real_model.py report runs/real --json docs/data/real_model.json  the table, and its raw numbers

A chain runs `trl-search sft` on the collection of the kit, then `trl-search train` from the result, which asks all
held-out questions before its first step and every ten steps. A chain whose name begins with `base` evaluates the
untrained model in all four modes. Finished steps are not run again. Chains share only the kit, so they can run in
parallel, one per GPU.

KIT is a folder with `train.jsonl`, `eval/*.jsonl` (FlashRAG rows), `index/` (`trl-search index`) and `collection/`
(`trl-search sft --collect_only true`). A chain writes OUTPUT/NAME/{sft,grpo} or OUTPUT/NAME/eval_base. A name ends in
the seed (`em_0`, `em_1`): the report averages over chains that differ only in the seed.

Every interval is a 95 % bootstrap over questions within each set, of the mean over seeds if there are several. Two
policies are compared question by question.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.outcomes import RESAMPLES, Outcome, by_dataset, macro, summarize
from trl_search.records.report.reflection import (
    EM,
    RATIO,
    ReflectionPoint,
    correlate,
    words,
)

MULTI_HOP = ("hotpotqa", "2wikimultihopqa", "musique")
ONE_HOP = ("nq", "popqa")
SETS = (*MULTI_HOP, *ONE_HOP)
AVERAGES = {"multi_hop": MULTI_HOP, "all": SETS}
# The metrics of a step that are recorded with the numbers.
LOGGED = (
    "step", "reward", "rewards/", "eval/", "search/", "reflection/", "tokens/", "alarm/", "grad_norm", "entropy",
    "frac_reward_zero_std", "completions/mean_length", "time/", "loss/without_gradient",
)  # fmt: skip
MODES = ("search", "direct", "cot", "rag")
LINES = ("solid", "dashed", "dotted")  # one per seed


def run_chain(args: argparse.Namespace) -> None:
    """Runs the unfinished steps of one chain, each as a separate command."""
    folder, kit = Path(args.output) / args.name, Path(args.kit)
    folder.mkdir(parents=True, exist_ok=True)
    sets = [str(kit / "eval" / f"{name}.jsonl") for name in SETS]
    if args.name.startswith("base"):
        options = ["--datasets", *sets, "--modes", ",".join(MODES), "--retriever", str(kit / "index")]
        options += ["--protocol", args.protocol, "--backend", args.backend, "--concurrency", "512"]
        options += ["--published", "none", "--output", str(folder / "eval_base")]
        if args.backend == "vllm":
            options += ["--engine_options", json.dumps({"gpu_memory_utilization": 0.6, "max_model_len": 4096})]
        step(folder / "eval_base.log", folder / "eval_base" / "results.json", ["eval", args.model, *options])
        return
    index = ["--retriever_options", json.dumps({"index": str(kit / "index")})]
    model = args.sft_model or str(folder / "sft")
    if not args.sft_model:
        collection = ["--collection", str(kit / "collection"), "--questions", str(kit / "train.jsonl"), *index]
        # The recipe's seed belongs to the collection; the chain's seed determines the order of the rows.
        options = ["--model_name_or_path", args.model, "--data_seed", str(args.seed), "--output_dir", model]
        sft_options = [part for option in args.sft_options for part in f"--{option}".split("=", 1)]
        command = ["sft", args.sft_recipe, *options, *collection, *sft_options]
        step(folder / "sft.log", Path(model) / "config.json", command)
    options = ["--model_name_or_path", model, "--seed", str(args.seed), "--output_dir", str(folder / "grpo"), *index]
    options += ["--questions", str(kit / "train.jsonl"), "--max_steps", str(args.steps), "--max_eval_questions", "200"]
    options += ["--eval_questions", ",".join(sets)]
    command = ["train", args.recipe, *options, *args.options]
    step(folder / "grpo.log", folder / "grpo" / "curves.png", command, processes=args.processes)


def step(log: Path, result: Path, command: Sequence[str], *, processes: int = 1) -> None:
    """Runs one command unless its result exists, and prints its duration."""
    if result.exists():
        return
    started = time.perf_counter()
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--main_process_port", "0"]
    with open(log, "a") as file:
        process = subprocess.run(
            [sys.executable, *(launch if processes > 1 else []), "-m", "trl_search", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
    outcome = "FAILED" if process.returncode else "done"
    print(f"{log}: {outcome} in {time.perf_counter() - started:.0f} s", flush=True)
    if process.returncode:
        print("\n".join(log.read_text().splitlines()[-25:]), flush=True)
        raise SystemExit(process.returncode)


def outcomes_of(folder: Path, mode: str) -> dict[str, list[Outcome]]:
    """The outcomes of `trl-search eval`, by set and in the order of the questions; empty if there are none."""
    read = {name: Records(folder, mode, name).read() for name in SETS}
    return {name: [found[index] for index in sorted(found)] for name, found in read.items() if found}


def held_out_at(chain: Path, step: int) -> dict[str, list[Outcome]]:
    """The outcomes of the evaluation at one step of a chain's GRPO, by set."""
    (file,) = (chain / "grpo" / "held_out").glob(f"*-step_{step}.jsonl")
    mode = file.name.partition("-")[0]  # `direct` for a chain without searches
    return by_dataset(Records(file.parent, mode, f"step_{step}").read().values())


def compare(
    first: Sequence[Path], second: Sequence[Path]
) -> tuple[dict[str, int], list[dict[str, list[Outcome]]], list[dict[str, list[Outcome]]]]:
    """The answers of two kinds of chains to the same questions, per common seed, at their last common step."""
    seeds = {chain.name.rpartition("_")[2]: chain for chain in second}
    steps, ones, others = {}, [], []
    for chain in first:
        seed = chain.name.rpartition("_")[2]
        if seed in seeds:
            both = set(evaluated_steps(chain)) & set(evaluated_steps(seeds[seed]))
            if not both:
                raise SystemExit(f"{chain} and {seeds[seed]} were evaluated at no common step: leave --compare out")
            steps[seed] = max(both)
            ones.append(held_out_at(chain, steps[seed]))
            others.append(held_out_at(seeds[seed], steps[seed]))
    if not steps:
        names = " and ".join(", ".join(chain.name for chain in chains) for chains in (first, second))
        raise SystemExit(f"--compare: no seed has a chain of both kinds, {names}")
    return steps, ones, others


def difference(
    before: Sequence[dict[str, list[Outcome]]], after: Sequence[dict[str, list[Outcome]]], sets: Sequence[str]
) -> list[float]:
    """Difference in macro EM between two groups of policies on the same questions, with its 95 % bootstrap interval.

    With several seeds, the EM of a question is its mean over them.
    """
    draw = np.random.default_rng(0)
    mean, resampled = 0.0, np.zeros(RESAMPLES)
    for name in sets:
        ids = [one.id for one in before[0].get(name, ())]
        gains = mean_em(after, name, ids) - mean_em(before, name, ids)
        mean += gains.mean() / len(sets)
        picks = draw.integers(len(gains), size=(RESAMPLES, len(gains)))
        resampled += gains[picks].mean(axis=1) / len(sets)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return [round(float(value), 4) for value in (mean, low, high)]


def mean_em(policies: Sequence[dict[str, list[Outcome]]], name: str, ids: Sequence[str]) -> np.ndarray:
    """EM of each question of a set, averaged over the policies."""
    found = [{one.id: one.em for one in policy.get(name, ())} for policy in policies]
    if not ids or any(not policy.keys() >= set(ids) for policy in found):
        raise SystemExit(f"the policies were asked different questions of {name}: compare runs with the same ones")
    return np.array([[policy[id] for id in ids] for policy in found]).mean(axis=0)


def zero(policy: dict[str, list[Outcome]]) -> list[dict[str, list[Outcome]]]:
    """A policy that answers all these questions wrong: the difference from it is the score."""
    return [{name: [replace(one, em=0.0) for one in group] for name, group in policy.items()}]


def row_of(mode: str, policies: Sequence[dict[str, list[Outcome]]]) -> dict[str, Any]:
    """The table row of a policy, or of several that differ only in their seed: EM by set, averages, costs."""
    groups = {name: [one for policy in policies for one in policy[name]] for name in SETS}
    average = macro(mode, groups)
    unanswered = sum(one.answer is None for group in groups.values() for one in group)
    row: dict[str, Any] = {name: round(summarize(mode, group).em, 4) for name, group in groups.items()}
    for title, names in AVERAGES.items():
        # Every seed has the same questions, so questions are resampled.
        em, low, high = difference(zero(policies[0]), policies, names)
        row[title] = {"em": em, "interval": [low, high]}
    return row | {
        "f1": round(average.f1, 4),
        "searches": round(average.searches, 3),
        "model_tokens": round(average.model_tokens, 1),
        "observation_tokens": round(average.observation_tokens, 1),
        "malformed": round(average.malformed, 4),
        "reflective_ratio": round(average.reflective_ratio, 4),
        "unanswered": round(unanswered / average.questions, 4),
    }


def report(args: argparse.Namespace) -> None:
    """Reads every chain under a folder, prints the table and writes its raw numbers."""
    rows: dict[str, Any] = {}
    kinds: dict[str, list[Path]] = {}
    for chain in sorted(path for path in Path(args.folder).iterdir() if path.is_dir()):
        for mode in MODES:
            if len(found := outcomes_of(chain / "eval_base", mode)) == len(SETS):
                rows[f"{chain.name}/{mode}"] = row_of(mode, [found])
        if len(evaluated_steps(chain)) > 1:
            kinds.setdefault(chain.name.rpartition("_")[0], []).append(chain)
    histories = {chain.name: history_of(chain) for chains in kinds.values() for chain in chains}
    before, after = {}, {}
    for kind, chains in kinds.items():
        before[kind] = [held_out_at(chain, 0) for chain in chains]
        after[kind] = [held_out_at(chain, evaluated_steps(chain)[-1]) for chain in chains]
        rows[f"{kind}/before"], rows[f"{kind}/after"] = row_of("search", before[kind]), row_of("search", after[kind])
        rows[f"{kind}/after"]["seeds"] = {
            chain.name: {
                "step": evaluated_steps(chain)[-1],
                **{title: difference(zero(last), [last], names) for title, names in AVERAGES.items()},
                **{f"gain_{title}": difference([first], [last], names) for title, names in AVERAGES.items()},
            }
            for chain, first, last in zip(chains, before[kind], after[kind], strict=True)
        }
        for title, names in AVERAGES.items():
            rows[f"{kind}/after"][f"gain_{title}"] = difference(before[kind], after[kind], names)
    compared = {}
    for first, second in (pair.split(":") for pair in args.compare):
        steps, ones, others = compare(kinds[first], kinds[second])
        compared[f"{second} - {first}"] = {"step of each seed": steps} | {
            title: difference(ones, others, names) for title, names in AVERAGES.items()
        }
    columns = ["policy", *SETS, "multi-hop", "all", "F1", "searches", "tokens written", "gain by GRPO, all"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, row in rows.items():
        cells = [f"{row[one]:.3f}" for one in SETS]
        cells += [
            f"{part['em']:.3f} ({part['interval'][0]:.3f}–{part['interval'][1]:.3f})"
            for part in map(row.get, AVERAGES)
        ]
        cells += [f"{row['f1']:.3f}", f"{row['searches']:.2f}", f"{row['model_tokens']:.0f}"]
        gain = row.get("gain_all")
        cells += [f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f})" if gain else ""]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(json.dumps(compared, indent=1))
    for line in reflection(histories):
        print(line)
    if args.figure:
        draw(histories, args.figure)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        content = {"note": args.note, "rows": rows, "compared": compared, "histories": histories}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


def evaluated_steps(chain: Path) -> list[int]:
    """The steps of a chain's GRPO with a held-out evaluation; an interrupted run has fewer."""
    files = (chain / "grpo" / "held_out").glob("*-step_*.jsonl")
    return sorted(int(path.stem.rpartition("_")[2]) for path in files)


def history_of(chain: Path) -> list[dict[str, Any]]:
    """The evaluation before the first step, then the log of every step up to the last evaluation."""
    before = macro("search", held_out_at(chain, 0))
    first = {"step": 0, EM: before.em, "eval/searches": before.searches, RATIO: before.reflective_ratio}
    lines = map(json.loads, (chain / "grpo" / "metrics.jsonl").read_text().splitlines())
    # A metric that was not finite is null in the log.
    steps = [
        {key: value and float(f"{value:.5g}") for key, value in line.items() if key.startswith(LOGGED)}
        for line in lines
    ]
    return [first, *(line for line in steps if "reward" in line and line["step"] <= evaluated_steps(chain)[-1])]


def reflection(histories: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Correlation of held-out EM and the share of answers with a reflective phrase, over the checkpoints of chains."""
    lines = []
    for name, history in histories.items():
        points = [ReflectionPoint(int(log["step"]), log[RATIO], log[EM]) for log in history if EM in log]
        lines += [f"{name}: {line}" for line in words(points, correlate(points))[:2]]
    return lines


def draw(histories: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Draws held-out EM, reward, groups without a gradient, searches and reflection over the steps of every run."""
    from matplotlib.figure import Figure

    panels = {
        "held-out EM": EM,
        "sampled reward": "reward",
        "groups without a gradient": "frac_reward_zero_std",
        "searches per trajectory": "search/searches",
        "reflective trajectories": "reflection/ratio",
    }
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    kinds = sorted({name.rpartition("_")[0] for name in histories})
    for axes, (title, key) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, history in histories.items():
            kind, _, seed = name.rpartition("_")
            points = [(log["step"], log[key]) for log in history if key in log]
            style = {"color": f"C{kinds.index(kind)}", "linestyle": LINES[int(seed) % len(LINES)], "lw": 1.2}
            axes.plot(*zip(*points, strict=True), **style, label=name)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    chain = commands.add_parser("run", help="one chain on one GPU")
    chain.add_argument("name", help="name of the chain; base... evaluates the untrained model")
    chain.add_argument("--model", required=True, help="a folder, or a model on the hub")
    chain.add_argument("--kit", required=True, help="folder with questions, index and collection")
    chain.add_argument("--output", required=True, help="folder of all chains")
    chain.add_argument("--seed", type=int, default=0)
    chain.add_argument("--steps", type=int, default=80, help="GRPO steps")
    chain.add_argument("--sft_recipe", default="qwen1.5b_kit_sft")
    chain.add_argument("--recipe", default="qwen1.5b_kit")
    chain.add_argument("--sft_model", help="a policy after its cold start; skips the cold start")
    chain.add_argument("--protocol", default="search_r1", help="protocol of the untrained model")
    chain.add_argument("--backend", default="vllm")
    chain.add_argument(
        "--processes",
        type=int,
        default=1,
        help="GPUs for GRPO, one process each; gradient_accumulation_steps and steps_per_generation are per process",
    )
    chain.add_argument("--sft_options", nargs="*", default=[], help="more options of trl-search sft: NAME=VALUE")
    chain.set_defaults(do=run_chain)
    table = commands.add_parser("report", help="the table of all chains")
    table.add_argument("folder")
    table.add_argument(
        "--compare", nargs="*", default=[], help="pairs of kinds: nomask:em is EM of em minus EM of nomask, per seed"
    )
    table.add_argument("--json", help="file to write the raw numbers to")
    table.add_argument("--figure", help="PNG file to draw the curves to")
    table.add_argument("--note", default="", help="hardware and versions, stored with the numbers")
    table.set_defaults(do=report)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:cut])
    args.options = given[cut + 1 :]  # options of trl-search train
    args.do(args)


if __name__ == "__main__":
    main()
