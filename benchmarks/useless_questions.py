"""Half of the training questions give no signal: the effect of refilling, of the curriculum and of a filter.

    nice -n 15 python benchmarks/useless_questions.py --output runs/useless          # two quiet CPU cores: 10 minutes

The quickstart's world and policy. A quarter of the training questions accept any name or number of the world as their
answer, and a quarter accept nothing from it. All runs of a seed start from the same warmed-up policy.

| run         | questions      | options                                                    | trajectories       |
|-------------|----------------|------------------------------------------------------------|--------------------|
| plain       | half useless   |                                                            | steps × 64         |
| refill      | half useless   | refill_groups                                              | at most 60 % of it |
| both        | half useless   | refill_groups, curriculum: pass_rate                       | at most 60 % of it |
| filtered    | the useful half, as a perfect `trl-search data filter` would leave it       | at most 60 % of it |

The trajectories that a refill replaced are counted, those of the filter (8 per question, once) are not. EM is on
useful held-out questions. Prints a Markdown table, and writes it with all numbers to OUTPUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from shared_start import start
from transformers import TrainerCallback

from trl_search.data.world import generate_world
from trl_search.trainer.callbacks.held_out import HeldOut
from trl_search.trainer.pipeline import build

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refill": {"refill_groups": 6},
    "both": {"refill_groups": 6, "curriculum": "pass_rate"},
    "filtered": {},
}
SHARE = 0.6


class Budget(TrainerCallback):
    """Counts trajectories, and ends the training before it exceeds its share."""

    def __init__(self, per_step: int, limit: float) -> None:
        self.per_step, self.limit, self.used = per_step, limit, 0.0
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if "loss" in (logs or {}):
            self.logs.append(dict(logs))
            self.used += self.per_step + logs.get("refill/extra_trajectories", 0)
            last = self.used / len(self.logs)
            control.should_training_stop = control.should_training_stop or self.used + last > self.limit


def half_useless(questions: Dataset, values: list[str], seed: int) -> Dataset:
    """A quarter of the questions accepts every answer in the world, a quarter none; `useful` marks the other half."""
    kinds = ["any", "none", "as it was", "as it was"] * (len(questions) // 4 + 1)
    kinds = kinds[: len(questions)]
    random.Random(seed).shuffle(kinds)
    answers = {"any": values, "none": ["no word of this world"]}
    rows = [
        {**row, "golden_answers": answers.get(kind, row["golden_answers"]), "useful": kind == "as it was"}
        for row, kind in zip(questions, kinds, strict=True)
    ]
    return Dataset.from_list(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12, help="steps of the plain run (default: 12)")
    parser.add_argument(
        "--questions", type=int, default=128, help="training questions, half of them useless (default: 128)"
    )
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="recipe keys for every run")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for name in arguments.only:
            done = arguments.output / f"{name}_{seed}.json"
            if not done.is_file():
                done.parent.mkdir(parents=True, exist_ok=True)
                done.write_text(json.dumps(one(name, seed, arguments), indent=1) + "\n")
            rows.append(json.loads(done.read_text()))
            print(line(rows[-1]), flush=True)
    head = "| run | seed | steps | trajectories | groups with a gradient, drawn → trained on | EM before | EM after |"
    table = "\n".join([head, "|" + "---|" * 7, *map(line, rows)])
    (arguments.output / "table.md").write_text(table + "\n")
    print(f"\n{table}")


def one(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one run."""
    options = [
        "--max_steps", str(arguments.steps), "--max_train_questions", str(arguments.questions),
        "--on_collapse", "warn",
        *arguments.options, *(word for key, value in RUNS[name].items() for word in (f"--{key}", str(value))),
    ]  # fmt: skip
    run = start(name, seed, arguments.output, options)
    task, config = run.arguments, run.config
    world = generate_world(passages=task.world_passages, seed=task.world_seed)
    values = sorted({answer for question in world.questions("train") for answer in question.golden_answers})
    train = half_useless(run.task.train, values, seed)
    if name == "filtered":
        train = train.filter(lambda row: row["useful"])
    run.task = dataclasses.replace(run.task, train=train)
    trainer = build(run)
    assert run.task.held_out is not None and config.generation_batch_size is not None
    held_out = HeldOut(trainer, run.task.held_out)
    before = held_out.measure().average
    total = config.generation_batch_size * arguments.steps
    budget = Budget(config.generation_batch_size, total if name == "plain" else SHARE * total)
    trainer.add_callback(budget)
    trainer.train()
    after = held_out.measure().average
    trained = [1 - log["frac_reward_zero_std"] for log in budget.logs]
    drawn = [log.get("refill/gradient_before", share) for log, share in zip(budget.logs, trained, strict=True)]
    return {
        "run": name, "seed": seed, "steps": len(budget.logs), "trajectories": budget.used, "drawn": drawn,
        "trained": trained, "before": before.as_json(), "after": after.as_json(), "history": budget.logs,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    drawn, trained = (sum(row[key]) / len(row[key]) for key in ("drawn", "trained"))
    return (
        f"| {row['run']} | {row['seed']} | {row['steps']} | {row['trajectories']:.0f} | {drawn:.2f} → {trained:.2f} | "
        f"{row['before']['em']:.3f} | {row['after']['em']:.3f} ± {row['after']['em_ci95']:.3f} |"
    )


if __name__ == "__main__":
    main()
