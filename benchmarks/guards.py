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
from functools import partial
from typing import Any

from shared_start import kept, make_parser, options_of, start, train, write_table

RATES = {"learning rate x 5": ["--learning_rate", "5e-4"], "healthy": []}
GUARDS = {"no guards": ["--on_collapse", "warn"], "guards": ["--on_collapse", "rollback"]}
COLUMNS = ("warm start", "best", "last", "collapsed", "rollbacks", "steps taken")


def one(rate: str, guards: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one run: EM of the warm start, of the best evaluation and of the last policy."""
    name = f"{rate}, {guards}".replace(",", "").replace(" ", "_")
    options = [*options_of(arguments), *RATES[rate], *GUARDS[guards]]
    run = start(name, seed, arguments.output, options)
    course, after = train(run)
    (before,) = (evaluation.em for evaluation in run.measured.values())
    last = after.em
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
    arguments = make_parser(__doc__, steps=40, every=4).parse_args()
    rows = []
    for rate in RATES:
        for seed in arguments.seeds:
            for guards in GUARDS:
                file = arguments.output / f"{rate}_{guards}_{seed}.json".replace(" ", "_")
                rows.append(kept(file, partial(one, rate, guards, seed, arguments)))
                print(line(rows[-1]), flush=True)
    write_table(arguments.output, ["run", "seed", *COLUMNS], map(line, rows))


if __name__ == "__main__":
    main()
