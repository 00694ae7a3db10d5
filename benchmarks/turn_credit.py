"""Does credit for single turns help? The quickstart with each kind of `turn_credit`, and without it.

    nice -n 5 python benchmarks/turn_credit.py --output runs/credit        # one CPU core: 1 minute per run, 9 runs

All runs of a seed start from the same warmed-up policy, in an unseen world. EM is on held-out questions, with greedy
decoding; "seconds" are CPU seconds of the training with its evaluations. Runs that are in OUTPUT already are not
repeated.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

from shared_start import kept, make_parser, options_of, start, train, write_table

from trl_search.config.grpo import TURN_CREDIT

COLUMNS = ("EM on the way", "EM at the end", "reward, mean", "searches", "gain per turn", "seconds")


def one(kind: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one run."""
    options = [*options_of(arguments), "--on_collapse", "warn", "--turn_credit", kind]
    run = start(kind, seed, arguments.output, options)
    run.arguments.evaluate = False  # before training, the policy is the same in all runs
    course, after = train(run)
    return {
        "kind": kind, "seed": seed, "course": course.em, "after": after.as_json(),
        "seconds": course.cpu_s, "history": course.steps,
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
    arguments = make_parser(__doc__, steps=6, every=3).parse_args()
    rows = []
    for seed in arguments.seeds:
        for kind in TURN_CREDIT:
            rows.append(kept(arguments.output / f"{kind}_{seed}.json", partial(one, kind, seed, arguments)))
            print(line(rows[-1]), flush=True)
    write_table(arguments.output, ["turn_credit", "seed", *COLUMNS], map(line, rows))


if __name__ == "__main__":
    main()
