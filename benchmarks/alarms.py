"""Records runs that collapse and runs that do not, and shows at which step each alarm fires.

    python benchmarks/alarms.py --output runs/alarms               # two CPU cores, nothing else on them: half an hour
    python benchmarks/alarms.py --output runs/alarms --only healthy --steps 60
    python benchmarks/alarms.py --replay                           # show the recorded runs, in a second

Every run is the quickstart with half the batch (4 questions x 8), so that its numbers are noisier than a user's, and
with a small `beta`, so that there is a KL to watch. The metrics that the alarms read are written to
tests/support/data/histories.json, against which tests/trainer/callbacks/test_alarms.py tests the rules. An earlier
record of the same run is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trl_search.records.alarm_rules import NEAR, SETTLED, Fell, NeverScored, NotFinite, Rule
from trl_search.records.folder import read_run
from trl_search.trainer.callbacks.alarms import RULES, Watch, is_training_log

HISTORIES = Path(__file__).parents[1] / "tests" / "support" / "data" / "histories.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
COMMON = ["--beta", "0.001", "--per_device_train_batch_size", "8", "--rollout_batch_size", "32"]
RUNS: dict[str, tuple[int, list[str]]] = {
    "healthy_0": (0, []),
    "healthy_1": (1, []),
    "healthy_2": (2, []),
    "learning_rate_x_5_0": (0, ["--learning_rate", "5e-4"]),
}
# The step and the metrics that the alarms read, including each one in the list of NotFinite.
KEPT = ["step", "eval/em_upper", *dict.fromkeys(name for rule in RULES for name in rule.metric.split(", "))]


def record(name: str, output: Path, steps: int) -> list[dict[str, Any]]:
    """Trains a run, and returns the recorded part of its log."""
    seed, options = RUNS[name]
    folder = output / name
    command = [
        sys.executable, "-m", "trl_search", "train", str(RECIPE), "--seed", str(seed), "--world_seed", str(seed),
        "--max_steps", str(steps), "--evaluate", "False", "--save_strategy", "no", "--output_dir", str(folder),
        *COMMON, *options,
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        if code := subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode:
            raise RuntimeError(f"{name} failed ({code}); see {folder / 'log.txt'}")
    return [kept(row) for row in read_run(folder).history if is_training_log(row)]


def kept(row: dict[str, Any]) -> dict[str, Any]:
    values = {name: row[name] for name in KEPT if name in row}
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}


def first_alarms(history: Sequence[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """Alarm -> the step at which it first fires, and its message."""
    watch, first = Watch(), dict[str, tuple[int, str]]()
    for row in history:
        for name, what in watch.add(row).items():
            if what:
                first.setdefault(name, (row["step"], what))
    return first


def condition(rule: Rule) -> str:
    """When a rule fires, in words: a column of docs/monitoring.md."""
    if isinstance(rule, NotFinite):
        return "not a finite number, in one log"
    if isinstance(rule, NeverScored):
        return f"0 in the first {SETTLED} logs, until a rollout scores"
    if isinstance(rule, Fell):
        highest = "its highest (or its value before training)"
        said = f"whole 95 % interval below {rule.falls:g}× {highest}, in one log, if that is at least {rule.worth:g}"
        return said + (f", while `reward` is above {NEAR:g}× its highest" if rule.while_reward_is_best else "")
    if rule.rises is not None:
        said = f"above {rule.beyond:g}" + (f" and {rule.rises:g}× its lowest" if rule.rises else "")
    else:
        said = f"below {rule.falls:g}× its highest"
        said += f" and {rule.beyond:g}" if math.isfinite(rule.beyond) else ""
        said += f", if its highest is at least {rule.worth:g}" if rule.worth else ""
    return said + (", unless the reward is at its best" if rule.unless_solved else "")


def table(histories: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| run | steps | alarms, at the step at which each first fires |", "|---|---|---|"]
    for name, history in histories.items():
        fired = sorted(first_alarms(history).items(), key=lambda item: item[1][0])
        said = "; ".join(f"{step}: `{alarm}` ({what})" for alarm, (step, what) in fired)
        lines.append(f"| {name} | {len(history)} | {said or 'none'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/alarms"), help="folder for the runs")
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps of every run (default 40)")
    parser.add_argument("--only", help="only runs whose name begins with this")
    parser.add_argument("--replay", action="store_true", help="train nothing: show the recorded runs")
    arguments = parser.parse_args()
    histories = json.loads(HISTORIES.read_text()) if HISTORIES.is_file() else {}
    if not arguments.replay:
        for name in tqdm([name for name in RUNS if name.startswith(arguments.only or "")], unit="run", disable=None):
            histories[name] = record(name, arguments.output, arguments.steps)
            rows = {
                run: "[\n" + ",\n".join(json.dumps(row) for row in history) + "\n]"
                for run, history in histories.items()
            }
            text = ",\n".join(f'"{run}": {lines}' for run, lines in rows.items())
            HISTORIES.write_text("{\n" + text + "\n}\n")
    print(table(histories))


if __name__ == "__main__":
    main()
