"""A real language model learns to search real Wikipedia: one chain per GPU, then one table of all chains.

    python benchmarks/real_model.py run em_0 --model MODEL --kit KIT --output runs/real --seed 0 --steps 80
    python benchmarks/real_model.py run nomask_0 ... -- --mask_observations false      what differs from the recipe
    python benchmarks/real_model.py report runs/real --json docs/data/real_model.json  the table, and its raw numbers

A chain is what a user would type: `trl-search sft` on the collection of the kit, `trl-search eval`, then
`trl-search train` from there and `trl-search eval` again. A chain whose name begins with `base` evaluates the model as
it is, in all four modes. Finished steps are not run again. Chains share only the kit, so they run side by side, one
per GPU.

KIT is a folder with `train.jsonl`, `eval/*.jsonl` (FlashRAG rows), `index/` (`trl-search index`) and `collection/`
(`trl-search sft --collect_only true`). OUTPUT/NAME/{sft,grpo,eval_sft,eval_grpo} is what a chain leaves.

Every interval is a 95 % bootstrap over questions within each set. Two policies are compared question by question.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.outcomes import RESAMPLES, Outcome, macro, summarize

MULTI_HOP = ("hotpotqa", "2wikimultihopqa", "musique")
ONE_HOP = ("nq", "popqa")
SETS = (*MULTI_HOP, *ONE_HOP)
# The metrics of a step that are kept with the numbers.
LOGGED = (
    "step", "reward", "rewards/", "eval/", "search/", "reflection/", "tokens/", "alarm/", "grad_norm", "entropy",
    "frac_reward_zero_std", "completions/mean_length", "time/",
)  # fmt: skip
MODES = ("search", "direct", "cot", "rag")


def run_chain(args: argparse.Namespace) -> None:
    """Runs the steps of one chain that are not finished, each as a command line of its own."""
    folder, kit = Path(args.output) / args.name, Path(args.kit)
    folder.mkdir(parents=True, exist_ok=True)
    index = ["--retriever_options", json.dumps({"index": str(kit / "index")})]
    if args.name.startswith("base"):
        evaluate(args.model, folder / "eval_base", kit, args, MODES, ["--protocol", args.protocol])
        return
    model = args.sft_model or str(folder / "sft")
    if not args.sft_model:
        collection = ["--collection", str(kit / "collection"), "--questions", str(kit / "train.jsonl"), *index]
        # The recipe's seed belongs to the collection; the chain's own decides the order of the rows.
        options = ["--model_name_or_path", args.model, "--data_seed", str(args.seed), "--output_dir", model]
        sft_options = [part for option in args.sft_options for part in f"--{option}".split("=", 1)]
        command = ["sft", args.sft_recipe, *options, *collection, *sft_options]
        step(folder / "sft.log", Path(model) / "config.json", command)
    options = ["--model_name_or_path", model, "--seed", str(args.seed), "--output_dir", str(folder / "grpo"), *index]
    options += ["--questions", str(kit / "train.jsonl"), "--max_steps", str(args.steps)]
    options += ["--eval_questions", ",".join(str(kit / "eval" / f"{name}.jsonl") for name in SETS)]
    step(folder / "grpo.log", folder / "grpo" / "results.json", ["train", args.recipe, *options, *args.options])
    evaluate(str(folder / "grpo"), folder / "eval_grpo", kit, args, ["search"])
    evaluate(model, folder / "eval_sft", kit, args, ["search"])


def evaluate(
    model: str, output: Path, kit: Path, args: argparse.Namespace, modes: Sequence[str], asked: Sequence[str] = ()
) -> None:
    sets = [str(kit / "eval" / f"{name}.jsonl") for name in SETS]
    options = ["--datasets", *sets, "--modes", ",".join(modes), "--retriever", str(kit / "index"), *asked]
    options += ["--backend", args.backend, "--concurrency", "512", "--published", "none", "--output", str(output)]
    if args.backend == "vllm":
        options += ["--engine_options", json.dumps({"gpu_memory_utilization": 0.6, "max_model_len": 4096})]
    step(output.with_suffix(".log"), output / "results.json", ["eval", model, *options])


def step(log: Path, result: Path, command: Sequence[str]) -> None:
    """Runs one command unless its result is there; says what it took."""
    if result.exists():
        return
    started = time.perf_counter()
    with open(log, "a") as file:
        process = subprocess.run(
            [sys.executable, "-m", "trl_search", *command],
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
    """The outcomes of a finished evaluation, by set and in the order of the questions; empty where there is none."""
    read = {name: Records(folder, mode, name).read() for name in SETS}
    return {name: [found[index] for index in sorted(found)] for name, found in read.items() if found}


def paired_difference(
    first: dict[str, list[Outcome]], second: dict[str, list[Outcome]], sets: Sequence[str], seed: int = 0
) -> tuple[float, float, float]:
    """Macro EM of the second less that of the first on the same questions, with its 95 % bootstrap interval."""
    draw = np.random.default_rng(seed)
    mean, resampled = 0.0, np.zeros(RESAMPLES)
    for name in sets:
        before = {one.id: one.em for one in first[name]}
        gains = np.array([one.em - before[one.id] for one in second[name]])
        mean += gains.mean() / len(sets)
        picks = draw.integers(len(gains), size=(RESAMPLES, len(gains)))
        resampled += gains[picks].mean(axis=1) / len(sets)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return mean, float(low), float(high)


def row_of(outcomes: dict[str, list[Outcome]], mode: str) -> dict[str, Any]:
    """What the table says of one evaluation: EM by set, averages with intervals, what it costs."""
    average = macro(mode, outcomes)
    silent = sum(one.answer is None for group in outcomes.values() for one in group)
    row: dict[str, Any] = {name: round(summarize(mode, group).em, 4) for name, group in outcomes.items()}
    for title, names in (("multi_hop", MULTI_HOP), ("all", SETS)):
        one = macro(mode, {name: outcomes[name] for name in names})
        row[title] = {"em": round(one.em, 4), "interval": [round(bound, 4) for bound in one.em_interval]}
    return row | {
        "f1": round(average.f1, 4),
        "searches": round(average.searches, 3),
        "model_tokens": round(average.model_tokens, 1),
        "observation_tokens": round(average.observation_tokens, 1),
        "malformed": round(average.malformed, 4),
        "reflective_ratio": round(average.reflective_ratio, 4),
        "unanswered": round(silent / average.questions, 4),
    }


def report(args: argparse.Namespace) -> None:
    """Reads every chain under a folder, prints the table and writes its raw numbers."""
    rows: dict[str, Any] = {}
    for chain in sorted(path for path in Path(args.folder).iterdir() if path.is_dir()):
        for stage in ("base", "sft", "grpo"):
            for mode in MODES:
                if len(found := outcomes_of(chain / f"eval_{stage}", mode)) == len(SETS):
                    rows[f"{chain.name}/{stage}/{mode}"] = row_of(found, mode)
        before, after = (outcomes_of(chain / f"eval_{stage}", "search") for stage in ("sft", "grpo"))
        if len(before) == len(after) == len(SETS):
            for title, names in (("multi_hop", MULTI_HOP), ("all", SETS)):
                gain, low, high = paired_difference(before, after, names)
                rows[f"{chain.name}/grpo/search"][f"gain_{title}"] = [round(value, 4) for value in (gain, low, high)]
        history = chain / "grpo" / "results.json"
        if history.is_file() and f"{chain.name}/grpo/search" in rows:
            run = json.loads(history.read_text())
            rows[f"{chain.name}/grpo/search"]["seconds"] = round(run["seconds"])
            rows[f"{chain.name}/grpo/search"]["history"] = [
                {key: value for key, value in log.items() if key.startswith(LOGGED)} for log in run["history"]
            ]
    columns = ["policy", *SETS, "multi-hop", "all", "F1", "searches", "tokens written", "gain on the cold start"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, row in rows.items():
        gain = row.get("gain_all")
        cells = [f"{row[one]:.3f}" for one in SETS]
        cells += [
            f"{part['em']:.3f} ({part['interval'][0]:.3f}–{part['interval'][1]:.3f})"
            for part in (row["multi_hop"], row["all"])
        ]
        cells += [f"{row['f1']:.3f}", f"{row['searches']:.2f}", f"{row['model_tokens']:.0f}"]
        cells += [f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f})" if gain else ""]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.figure:
        draw(rows, args.figure)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps({"note": args.note, "rows": rows}, indent=1) + "\n")


def draw(rows: dict[str, Any], path: str) -> None:
    """Held-out EM by set, what is sampled, and what is searched, over the steps of every GRPO run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, row in rows.items():
        history = row.get("history", ())
        for one in SETS:
            points = [(log["step"], log[f"eval/{one}/em"]) for log in history if f"eval/{one}/em" in log]
            if points:
                panels[0].plot(*zip(*points, strict=True), marker="o", label=f"{name.split('/')[0]} {one}")
        for panel, keys in ((panels[1], ("reward", "frac_reward_zero_std")), (panels[2], ("search/searches",))):
            for key in keys:
                points = [(log["step"], log[key]) for log in history if key in log]
                if points:
                    panel.plot(*zip(*points, strict=True), label=f"{name.split('/')[0]} {key}")
    for panel, title in zip(panels, ("held-out EM", "sampled", "searches per trajectory"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    chain = commands.add_parser("run", help="one chain on one GPU")
    chain.add_argument("name", help="of the chain; base... evaluates the model as it is")
    chain.add_argument("--model", required=True, help="a folder or a model of the hub")
    chain.add_argument("--kit", required=True, help="questions, index and collection")
    chain.add_argument("--output", required=True, help="the folder of all chains")
    chain.add_argument("--seed", type=int, default=0)
    chain.add_argument("--steps", type=int, default=80, help="of GRPO")
    chain.add_argument("--sft_recipe", default="qwen1.5b_kit_sft")
    chain.add_argument("--recipe", default="qwen1.5b_kit")
    chain.add_argument("--sft_model", help="a policy that has had its cold start: none is trained")
    chain.add_argument("--protocol", default="search_r1", help="of the model as it is")
    chain.add_argument("--backend", default="vllm")
    chain.add_argument("--sft_options", nargs="*", default=[], help="more options of trl-search sft: NAME=VALUE")
    chain.set_defaults(do=run_chain)
    table = commands.add_parser("report", help="the table of all chains")
    table.add_argument("folder")
    table.add_argument("--json", help="where the raw numbers go")
    table.add_argument("--figure", help="where the curves go, as PNG")
    table.add_argument("--note", default="", help="hardware and versions, kept with the numbers")
    table.set_defaults(do=report)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:cut])
    args.options = given[cut + 1 :]  # of trl-search train
    args.do(args)


if __name__ == "__main__":
    main()
