"""Do the guards against collapse save runs that would collapse, and do they harm healthy runs?

    nice -n 5 python benchmarks/guards.py --output runs/guards          # one CPU core: 5 minutes per run, 12 runs
    python benchmarks/guards.py --output runs/guards --seeds 0 --rates healthy --guards none llds
    python benchmarks/guards.py --output runs/guards --steps 60 --guards none rollback llds clip_higher …

Runs the quickstart in unseen worlds, at its learning rate and at five times that. All runs of a seed begin with the
same warmed-up policy. EM is on held-out questions, with greedy decoding. A run has collapsed if its last policy has
less than half the EM of its best one. Runs that are in OUTPUT already are not repeated.

| guard              | what differs                                                                                   |
|--------------------|------------------------------------------------------------------------------------------------|
| none               | nothing: alarms are only logged (`on_collapse: warn`)                                          |
| rollback           | after a collapse, continues from the best checkpoint with half the learning rate: at once if   |
|                    | the held-out EM has halved (`held_out_halved`), otherwise once an alarm has lasted ten logs    |
| dr_grpo            | `loss_type: dr_grpo`, which divides by a constant length                                       |
| search_floor       | in the first 20 steps, a trajectory without a search gets no reward                            |
| overlong           | `soft_overlong_punishment` as an additional reward with weight 0.1                             |
| two_steps          | two optimizer steps per batch (`num_iterations: 2`), as the baseline of the next two           |
| llds, clip_higher  | like two_steps, with `llds_coef: 0.1`, or with `epsilon_high: 0.28`                            |
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from shared_start import kept, make_parser, options_of, start, train, write_table

RATES = {"fast": ["--learning_rate", "5e-4"], "healthy": []}
TWO_STEPS = ["--num_iterations", "2"]
GUARDS = {
    "none": [],
    "rollback": ["--on_collapse", "rollback"],
    "dr_grpo": ["--loss_type", "dr_grpo"],
    "search_floor": ["--search_floor_steps", "20"],
    "overlong": [
        "--reward_funcs", "em", "format", "reflection", "soft_overlong_punishment",
        "--reward_weights", "1.0", "0.0", "0.0", "0.1",
    ],
    "two_steps": TWO_STEPS,
    "llds": [*TWO_STEPS, "--llds_coef", "0.1"],
    "clip_higher": [*TWO_STEPS, "--epsilon_high", "0.28"],
}  # fmt: skip
COLUMNS = ("warm start", "best", "last", "collapsed", "rollbacks", "steps taken")


def one(rate: str, guards: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one run: EM of the warm start, of the best evaluation and of the last policy."""
    options = [*options_of(arguments), *RATES[rate], "--on_collapse", "warn", *GUARDS[guards]]
    run = start(f"{rate}_{guards}", seed, arguments.output, options)
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
    parser = make_parser(__doc__, steps=40, every=4)
    parser.add_argument("--rates", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--guards", nargs="+", choices=list(GUARDS), default=["none", "rollback"])
    arguments = parser.parse_args()
    rows = []
    for rate in arguments.rates:
        for seed in arguments.seeds:
            for guards in arguments.guards:
                file = arguments.output / f"{rate}_{guards}_{seed}.json"
                rows.append(kept(file, partial(one, rate, guards, seed, arguments)))
                print(line(rows[-1]), flush=True)
    write_table(arguments.output, ["run", "seed", *COLUMNS], map(line, rows))


if __name__ == "__main__":
    main()
