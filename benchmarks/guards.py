"""Does a run that would collapse end well with the guards on, and does a healthy run lose nothing by them?

    python benchmarks/guards.py --output runs/guards               # two CPU cores: about 4 minutes a run, 12 runs
    python benchmarks/guards.py --output runs/guards --seeds 1

The quickstart on worlds nobody has seen, at its learning rate and at five times that; without guards
(`on_collapse: warn`) and with them (`on_collapse: rollback`, which goes back to the best checkpoint with half the
learning rate). A run has collapsed if its last policy has less than half the held-out EM of its best. Runs that are in
OUTPUT already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from learning import Run, train

RATES = {"learning rate x 5": ["--learning_rate", "5e-4"], "healthy": []}
GUARDS = {"no guards": ["--on_collapse", "warn"], "guards": ["--on_collapse", "rollback"]}


def outcome(run: Run, root: Path) -> dict[str, Any]:
    """EM of the warm start, of the best evaluation and of the last policy, and what happened on the way."""
    result = json.loads((run.folder(root) / "results.json").read_text())
    rows, history = result["rows"], result["history"]
    last = rows["search, after GRPO"]["em"]
    best = max([last, *(row["eval/em"] for row in history if "eval/em" in row)])
    return {
        "warm start": next(row["em"] for name, row in rows.items() if "before" in name or "warm" in name),
        "best": best,
        "last": last,
        "collapsed": last < best / 2,
        "rollbacks": (run.folder(root) / "log.txt").read_text().count("rollback "),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50, help="GRPO steps of every run (default 50)")
    parser.add_argument("--every", type=int, default=5, help="steps between two evaluations (default 5)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options for every run")
    arguments = parser.parse_args()
    print(
        "| run | seed | warm start | best | last | collapsed | rollbacks |\n|---|---|---|---|---|---|---|", flush=True
    )
    for rate, its_options in RATES.items():
        for seed in range(arguments.seeds):
            for guards, their_options in GUARDS.items():
                run = Run(f"{rate}, {guards}", seed, [*its_options, *their_options])
                if not (run.folder(arguments.output) / "results.json").is_file():
                    threads = os.cpu_count() or 1
                    train(run, arguments.output, arguments.steps, arguments.every, arguments.options, threads)
                found = outcome(run, arguments.output)
                shown = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in found.values())
                print(f"| {run.name} | {seed} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
