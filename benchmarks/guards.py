"""Does a run that would collapse end well with the guards on, and does a healthy run lose nothing by them?

    nice -n 5 python benchmarks/guards.py --output runs/guards          # one CPU core: 5 minutes per run, 12 runs
    python benchmarks/guards.py --output runs/guards --seeds 0

The quickstart on worlds nobody has seen, at its learning rate and at five times that; without guards
(`on_collapse: warn`) and with them (`on_collapse: rollback`, which goes back to the best checkpoint with half the
learning rate). All runs of a seed start from the same warmed-up policy. EM is on held-out questions, greedily. A run
has collapsed if its last policy has less than half the EM of its best one. An alarm must last ten logs before a guard
acts, so a collapse needs some twenty steps behind it. Runs that are in OUTPUT already are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shared_start import Course, start

from trl_search.trainer.pipeline import add_measurements, build

RATES = {"learning rate x 5": ["--learning_rate", "5e-4"], "healthy": []}
GUARDS = {"no guards": ["--on_collapse", "warn"], "guards": ["--on_collapse", "rollback"]}
COLUMNS = ("warm start", "best", "last", "collapsed", "rollbacks", "steps taken")


def one(rate: str, guards: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one run: EM of the warm start, of the best evaluation and of the last policy."""
    name = f"{rate}, {guards}".replace(",", "").replace(" ", "_")
    options = [
        "--max_steps", str(arguments.steps), "--evaluate_every", str(arguments.every),
        "--max_eval_questions", str(arguments.questions), *RATES[rate], *GUARDS[guards],
    ]  # fmt: skip
    run = start(name, seed, arguments.output, options)
    trainer = build(run)
    held_out = add_measurements(run, trainer)
    course = Course()
    trainer.add_callback(course)
    trainer.train()
    assert held_out is not None
    (before,) = (evaluation.em for evaluation in run.measured.values())
    last = held_out.measure().average.em
    best = max([before, last, *course.em])
    return {
        "run": f"{rate}, {guards}",
        "seed": seed,
        "warm start": before,
        "best": best,
        "last": last,
        "collapsed": last < best / 2,
        "rollbacks": course.begun - 1,
        "steps taken": len(course.steps),
        "alarms": sorted(
            {name for entry in course.steps for name, value in entry.items() if "alarm/" in name and value}
        ),
        "history": course.steps,
    }


def line(row: dict[str, Any]) -> str:
    shown = (f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS)
    return f"| {row['run']} | {row['seed']} | {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps of every run (default: 40)")
    parser.add_argument("--every", type=int, default=4, help="steps between two evaluations (default: 4)")
    parser.add_argument("--questions", type=int, default=100, help="to measure on (default: 100)")
    arguments = parser.parse_args()
    rows = []
    for rate in RATES:
        for seed in arguments.seeds:
            for guards in GUARDS:
                done = arguments.output / f"{rate}_{guards}_{seed}.json".replace(" ", "_")
                if not done.is_file():
                    done.parent.mkdir(parents=True, exist_ok=True)
                    done.write_text(json.dumps(one(rate, guards, seed, arguments), indent=1) + "\n")
                rows.append(json.loads(done.read_text()))
                print(line(rows[-1]), flush=True)
    head = f"| run | seed | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}"
    table = "\n".join([head, *map(line, rows)])
    (arguments.output / "table.md").write_text(table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
