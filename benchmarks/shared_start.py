"""Runs of the quickstart that begin with the same warmed-up policy, so that they can be compared seed by seed.

The seed is that of the world, of the warm start and of GRPO. The first run of a seed makes its policy, in
OUTPUT/seed_<seed>/warm_start, and the others load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import ModelConfig

from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.recipe import parse_recipe
from trl_search.config.task import TaskArguments
from trl_search.trainer.pipeline import WARM_START, Run, load, warm_up


def start(name: str, seed: int, output: Path, options: Sequence[str]) -> Run:
    """Everything that the run needs before its trainer is built. It writes to OUTPUT/seed_<seed>/<name>.

    Args:
        options (`Sequence[str]`): Keys of the recipe and their values, as on the command line.
    """
    folder = (output / f"seed_{seed}").absolute()
    warm = folder / WARM_START
    argv = [
        "quickstart", "--output_dir", str(folder / name), "--world_seed", str(1000 + seed), "--seed", str(seed),
        *options,
    ]  # fmt: skip
    if (warm / "config.json").is_file():
        argv += ["--model_name_or_path", str(warm), "--warm_start_steps", "0"]
    task, config, model_config = parse_recipe(argv, (TaskArguments, SearchGRPOConfig, ModelConfig), command="train")
    task.baselines = []
    run = load(task, config, model_config)
    if not task.warm_start_steps:
        return run
    warm_up(run.model, run.tokenizer, task, config, warm)
    return start(name, seed, output, options)


class Course(TrainerCallback):
    """What a training logged, with all that a rollback gave up. Add it after every other callback."""

    def __init__(self) -> None:
        self.begun = 0  # once, and once more after each rollback
        self.steps: list[dict[str, Any]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.steps.append({"step": state.global_step, "begun": self.begun, **logs})

    @property
    def em(self) -> list[float]:
        """Held-out EM of every evaluation, in its order."""
        return [entry["eval/em"] for entry in self.steps if "eval/em" in entry]
