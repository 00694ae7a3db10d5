"""Learning curves of the quickstart on unseen worlds: three seeds, and ablations with the same budget.

    python benchmarks/learning.py --output runs/learning --jobs 1          # two CPU cores: about 5 minutes per run
    python benchmarks/learning.py --output runs/learning --jobs 8 --steps 60 --ablation_seeds 3

Every run is `trl-search train recipes/quickstart.yaml` with the options of `ABLATIONS`. One seed sets the world, the
warm start and GRPO. Prints a Markdown table, and writes it with all numbers to OUTPUT.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
ABLATIONS: dict[str, list[str]] = {
    "search, masked": [],
    "loss mask off": ["--mask_observations", "false"],
    "no search": ["--max_searches", "0"],
    "format reward alone": ["--reward_weights", "0.0", "1.0", "0.0"],
    "learning rate x 10": ["--learning_rate", "1e-3"],
}


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    options: list[str]

    def folder(self, root: Path) -> Path:
        return root / f"{self.name.replace(' ', '_').replace(',', '')}_{self.seed}"


def train(run: Run, root: Path, steps: int, every: int, extra: list[str], threads: int) -> None:
    folder = run.folder(root)
    command = [
        sys.executable, "-m", "trl_search", "train", str(RECIPE), "--output_dir", str(folder),
        "--world_seed", str(1000 + run.seed), "--seed", str(run.seed), "--max_steps", str(steps),
        "--evaluate_every", str(every), "--save_strategy", "no", *run.options, *extra,
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        raise RuntimeError(f"{run.name}, seed {run.seed} failed ({code}); see {folder / 'log.txt'}")


def table(runs: list[Run], root: Path, every: int) -> str:
    loaded = [(run, json.loads((run.folder(root) / "results.json").read_text())) for run in runs]
    curves = [{row["step"]: row["eval/em"] for row in result["history"] if "eval/em" in row} for _, result in loaded]
    marks = sorted({step for curve in curves for step in curve})
    shown = [step for step in marks if step in {every, 2 * every, 4 * every, *marks[-1:]}]
    lines = [
        "| run | seed | direct | one-shot RAG | warm start | "
        + " | ".join(f"step {step}" for step in shown)
        + " | gain | / RAG | searches per question |",
        "|" + "---|" * (8 + len(shown)),
    ]
    for (run, result), curve in zip(loaded, curves, strict=True):
        rows = result["rows"]
        before, after = next(v for k, v in rows.items() if "before" in k or "warm" in k), rows["search, after GRPO"]
        direct, rag = rows["direct answer, no search"]["em"], rows["one-shot RAG"]["em"]
        lines.append(
            f"| {run.name} | {run.seed} | {direct:.3f} | {rag:.3f} | {before['em']:.3f} | "
            + " | ".join(f"{curve.get(step, float('nan')):.3f}" for step in shown)
            + f" | {after['em'] - before['em']:+.3f} | {after['em'] / max(rag, 1e-9):.2f} | "
            f"{before['searches']:.2f} → {after['searches']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60, help="GRPO steps of every run (default 60)")
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations (default 10)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the main run (default 3)")
    parser.add_argument("--ablation_seeds", type=int, default=1, help="seeds of each ablation (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    parser.add_argument("--only", nargs="*", choices=list(ABLATIONS), help="run only these")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options for every run")
    arguments = parser.parse_args()
    runs = [
        Run(name, seed, options)
        for name, options in ABLATIONS.items()
        for seed in range(arguments.seeds if not options else arguments.ablation_seeds)
        if not arguments.only or name in arguments.only
    ]
    threads = max(1, (os.cpu_count() or 2) // arguments.jobs)
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(runs), unit="run", disable=None) as bar:

        def one(run: Run) -> None:
            train(run, arguments.output, arguments.steps, arguments.every, arguments.options, threads)
            bar.update()

        list(pool.map(one, runs))
    text = table(runs, arguments.output, arguments.every)
    (arguments.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
