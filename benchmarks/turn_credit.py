"""Does credit for single turns help? The quickstart with each kind of `turn_credit`, and without.

    nice -n 5 python benchmarks/turn_credit.py --output runs/credit        # one CPU core: 1 minute per run, 9 runs

All runs of a seed start from the same warmed-up policy, in a world that it has not seen. EM is on held-out questions,
greedily; "seconds" are CPU seconds of the training, its evaluations included. Runs that are in OUTPUT already are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from shared_start import Course, start

from trl_search.config.grpo import TURN_CREDIT
from trl_search.trainer.pipeline import add_measurements, build

COLUMNS = ("EM on the way", "EM at the end", "reward, mean", "searches", "gain per turn", "seconds")


def one(kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one run."""
    options = [
        "--max_steps", str(arguments.steps), "--evaluate_every", str(arguments.every),
        "--max_eval_questions", str(arguments.questions), "--on_collapse", "warn", "--turn_credit", kind,
    ]  # fmt: skip
    run = start(kind, seed, arguments.output, options)
    run.arguments.evaluate = False  # before the training: the policy is that of the other runs
    trainer = build(run)
    held_out = add_measurements(run, trainer)
    assert held_out is not None
    course = Course()
    trainer.add_callback(course)
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    after = held_out.measure().average
    return {
        "kind": kind, "seed": seed, "course": course.em, "after": after.as_json(),
        "seconds": seconds, "history": course.steps,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    steps = row["history"]
    gains = [step["credit/gain"] for step in steps if "credit/gain" in step]
    shown = [
        " ".join(f"{em:.2f}" for em in row["course"]),
        f"{row['after']['em']:.3f} ± {row['after']['em_ci95']:.3f}",
        f"{statistics.mean(step['reward'] for step in steps):.3f}",
        f"{row['after']['searches']:.2f}",
        f"{statistics.mean(gains):.3f}" if gains else "",
        f"{row['seconds']:.0f}",
    ]
    return f"| {row['kind']} | {row['seed']} | {' | '.join(shown)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6, help="GRPO steps of every run (default: 6)")
    parser.add_argument("--every", type=int, default=3, help="steps between two evaluations (default: 3)")
    parser.add_argument("--questions", type=int, default=100, help="to measure on (default: 100)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in arguments.seeds:
        for kind in TURN_CREDIT:
            done = arguments.output / f"{kind}_{seed}.json"
            if not done.is_file():
                done.write_text(json.dumps(one(kind, seed, arguments), indent=1) + "\n")
            rows.append(json.loads(done.read_text()))
            print(line(rows[-1]), flush=True)
    head = f"| turn_credit | seed | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}"
    table = "\n".join([head, *map(line, rows)])
    (arguments.output / "table.md").write_text(table + "\n")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
