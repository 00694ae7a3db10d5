"""Runs of the quickstart that begin with the same warmed-up policy, so that they can be compared per seed.

One seed sets the world, the warm start and GRPO. The first run of a seed trains the policy in
OUTPUT/seed_<seed>/warm_start, and the others load it. Results in OUTPUT are not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import ModelConfig

from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.recipe import build_arguments, recipe_values
from trl_search.config.task import TaskArguments
from trl_search.evaluation.outcomes import Evaluation
from trl_search.trainer.pipeline import WARM_START, Run, add_measurements, build, load, warm_up


def make_parser(description: str | None, *, steps: int, every: int) -> argparse.ArgumentParser:
    """The options of all these benchmarks; `options_of` converts them to recipe keys."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help=f"GRPO steps of every run (default: {steps})")
    parser.add_argument("--every", type=int, default=every, help=f"steps between two evaluations (default: {every})")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions (default: 100)")
    return parser


def options_of(arguments: argparse.Namespace) -> list[str]:
    return [
        "--max_steps", str(arguments.steps), "--evaluate_every", str(arguments.every),
        "--max_eval_questions", str(arguments.questions),
    ]  # fmt: skip


def start(name: str, seed: int, output: Path, options: Sequence[str]) -> Run:
    """Prepares a run up to the creation of its trainer. The run writes to OUTPUT/seed_<seed>/<name>.

    Args:
        options (`Sequence[str]`): Recipe keys and their values, as on the command line.
    """
    folder = (output / f"seed_{seed}").absolute()
    warm = folder / WARM_START
    argv = [
        "quickstart", "--output_dir", str(folder / name), "--world_seed", str(1000 + seed), "--seed", str(seed),
        *options,
    ]  # fmt: skip
    if (warm / "config.json").is_file():
        argv += ["--model_name_or_path", str(warm), "--warm_start_steps", "0"]
    classes = (TaskArguments, SearchGRPOConfig, ModelConfig)
    task, config, model_config = build_arguments(recipe_values(argv, classes, command="train"), classes)
    task.baselines = []
    run = load(task, config, model_config)
    if not task.warm_start_steps:
        return run
    warm_up(run.model, run.tokenizer, task, config, warm)
    return start(name, seed, output, options)


class Course(TrainerCallback):
    """The log of a training, including steps that a rollback gave up. Add it after all other callbacks."""

    def __init__(self) -> None:
        self.cpu_s = 0.0  # logs of the training, including evaluations
        self.begun = 0  # one, plus one per rollback
        self.steps: list[dict[str, Any]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.steps.append({"step": state.global_step, "begun": self.begun, **logs})

    @property
    def em(self) -> list[float]:
        """Held-out EM of every evaluation, in order."""
        return [entry["eval/em"] for entry in self.steps if "eval/em" in entry]


def train(run: Run, prepare: Callable[[Any], None] = lambda trainer: None) -> tuple[Course, Evaluation]:
    """Trains. Returns the log, and the evaluation of the last policy on the held-out questions.

    Args:
        prepare (`Callable`): Called with the trainer before the first evaluation.
    """
    trainer = build(run)
    prepare(trainer)
    held_out = add_measurements(run, trainer)
    assert held_out is not None
    course = Course()
    trainer.add_callback(course)
    began = time.process_time()
    trainer.train()
    course.cpu_s = time.process_time() - began
    return course, held_out.measure().average


def kept(file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row in the file; measures and writes it if there is no file."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(), indent=1) + "\n")
    row: dict[str, Any] = json.loads(file.read_text())
    return row


def write_table(output: Path, columns: Sequence[str], lines: Iterable[str]) -> None:
    """Prints the table and writes it to OUTPUT/table.md."""
    table = "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *lines])
    (output / "table.md").write_text(table + "\n")
    print(f"\n{table}")
